// A block of threads, as the kernels see it: on the device the real thing, elsewhere a loop.
//
// A kernel is a struct of parameters with a call operator that takes a Block. Its work is a sequence of
// phases: block.phase(body) runs body(thread) for every thread and ends with a barrier. What one thread
// keeps from phase to phase is a PerThread; what threads share is in block.shared(). Code between phases
// runs in every thread and must do the same in all of them. Compiled by nvcc, a phase is the thread's own
// call and __syncthreads(); compiled by a C++ compiler, it is a loop over the threads, so a kernel that is
// right here computes the same integers there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __CUDACC__
#define PM_DEVICE __device__ __forceinline__
#define PM_UNROLL _Pragma("unroll")
#define PM_ROLLED _Pragma("unroll 1")
#else
#define PM_DEVICE inline
#define PM_UNROLL
#define PM_ROLLED
#endif

namespace pymerge {
namespace cuda {
namespace {

#ifdef __CUDACC__

template <class T, int kThreads>
class PerThread {
  public:
    PM_DEVICE T& operator[](int) { return value_; }

  private:
    T value_;
};

template <int kThreads>
class Block {
  public:
    template <class T>
    using Own = PerThread<T, kThreads>;

    PM_DEVICE explicit Block(unsigned char* shared) : shared_(shared) {}
    PM_DEVICE int64_t index() const { return blockIdx.x; }
    PM_DEVICE int64_t num() const { return gridDim.x; }
    template <class T>
    PM_DEVICE T* shared(size_t offset = 0) const {
        return reinterpret_cast<T*>(shared_ + offset);
    }
    template <class Body>
    PM_DEVICE void phase(Body body) const {
        body(static_cast<int>(threadIdx.x));
        __syncthreads();
    }

  private:
    unsigned char* shared_;
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run_block(const __grid_constant__ Kernel kernel) {
    extern __shared__ __align__(16) unsigned char shared[];
    kernel(Block<Kernel::kThreads>(shared));
}

PM_DEVICE void atomic_or(uint32_t* bits, uint32_t x) { atomicOr(bits, x); }
PM_DEVICE void atomic_add(uint32_t* sum, uint32_t x) { atomicAdd(sum, x); }
PM_DEVICE void atomic_add(uint64_t* sum, uint64_t x) {
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(x));
}

#else

template <class T, int kThreads>
class PerThread {
  public:
    T& operator[](int thread) { return values_[thread]; }

  private:
    T values_[kThreads];
};

template <int kThreads>
class Block {
  public:
    template <class T>
    using Own = PerThread<T, kThreads>;

    Block(int64_t index, int64_t num, unsigned char* shared) : index_(index), num_(num), shared_(shared) {}
    int64_t index() const { return index_; }
    int64_t num() const { return num_; }
    template <class T>
    T* shared(size_t offset = 0) const {
        return reinterpret_cast<T*>(shared_ + offset);
    }
    template <class Body>
    void phase(Body body) const {
        for (int thread = 0; thread < kThreads; ++thread) body(thread);
    }

  private:
    int64_t index_;
    int64_t num_;
    unsigned char* shared_;
};

// Every block finds its shared memory poisoned, as a device would leave anything there.
template <class Kernel>
void run_blocks(const Kernel& kernel, int64_t num_blocks, size_t shared_bytes) {
    unsigned char* shared = static_cast<unsigned char*>(aligned_alloc(64, (shared_bytes + 127) / 64 * 64));
    for (int64_t block = 0; block < num_blocks; ++block) {
        memset(shared, 0xa5, shared_bytes);
        kernel(Block<Kernel::kThreads>(block, num_blocks, shared));
    }
    free(shared);
}

inline void atomic_or(uint32_t* bits, uint32_t x) { *bits |= x; }
inline void atomic_add(uint32_t* sum, uint32_t x) { *sum += x; }
inline void atomic_add(uint64_t* sum, uint64_t x) { *sum += x; }

#endif

}  // namespace
}  // namespace cuda
}  // namespace pymerge
