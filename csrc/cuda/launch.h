// Runs a kernel of block.h in the current place.
#pragma once

#include "block.h"
#include "runtime.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr size_t kSharedWithoutAsking = size_t{48} << 10;

// `num` is the number of elements, for the error's text.
template <class Kernel>
void launch(const char* op, int64_t num, int64_t num_blocks, size_t shared_bytes, const Kernel& kernel) {
    if (num_blocks <= 0) return;
#ifdef __CUDACC__
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kSharedWithoutAsking) {
        error = cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess) {
        run_block<Kernel><<<static_cast<unsigned>(num_blocks), Kernel::kThreads, shared_bytes,
                            reinterpret_cast<cudaStream_t>(current().stream)>>>(kernel);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess) {
        throw Failure(std::string(op) + " on " + std::to_string(num) + " elements, " + std::to_string(num_blocks) +
                      " blocks of " + std::to_string(Kernel::kThreads) + " threads, " + std::to_string(shared_bytes) +
                      " bytes of shared memory: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
    }
#else
    static_cast<void>(op);
    static_cast<void>(num);
    run_blocks(kernel, num_blocks, shared_bytes);
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace pymerge
