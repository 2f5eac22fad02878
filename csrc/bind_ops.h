// What the bindings of the ops share: addresses come as integers, pymerge/ops/cpu.py has checked the arguments
// and says what is wrong with them; what is checked again here keeps a wrong call from touching foreign memory.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "pymerge/ops.h"

namespace binding {

namespace py = pybind11;

// A pymerge.ops.View: address, format code, number of elements.
using View = std::tuple<uintptr_t, int32_t, size_t>;
// A pymerge.ops.selection.Keep: threshold, cutoff, ceiling, ceiling_cutoff, draws, seed.
using KeepTuple = std::tuple<int32_t, int64_t, int32_t, int64_t, uint64_t, uint64_t>;
using Views = std::vector<View>;
using Numbers = std::vector<float>;

pymerge::Input input(const View& view);
pymerge::Output output(const View& view);
pymerge::Input optional_input(const std::optional<View>& view);
std::vector<pymerge::Keep> keeps(const char* op, const std::vector<KeepTuple>& tuples, size_t num_models);

inline size_t count_of(const View& view) { return std::get<2>(view); }

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct AlignedDelete {
    void operator()(void* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
template <class T>
using Scratch = std::unique_ptr<T[], AlignedDelete>;

template <class T>
Scratch<T> scratch(size_t count) {
    return Scratch<T>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64})));
}

// The models of a call with their workspace; keeps what `models` points to.
class ModelSet {
  public:
    // Throws unless every view has `num` elements. num_blocks: workspace for each model, in blocks.
    ModelSet(const char* op, const std::optional<View>& base, const Views& views, size_t num, size_t num_blocks);
    pymerge::Models models;

  private:
    std::vector<pymerge::Input> inputs_;
    Scratch<float> workspace_;
};

void raise_unless_ok(const char* op, const pymerge::Status& status);
void require_count(const char* op, const char* what, size_t found, size_t expected);
// Throws where `count` things are to be read or written at address 0.
void require_memory(const char* op, const char* what, uintptr_t address, size_t count);
// Every view has `expected` elements.
void require_equal_counts(const char* op, size_t expected, const Views& views,
                          const std::optional<View>& base = std::nullopt);

// Runs call() without the GIL.
template <class Call>
void run(const char* op, Call call) {
    pymerge::Status status;
    {
        py::gil_scoped_release release;
        status = call();
    }
    raise_unless_ok(op, status);
}

// Op itself, but not deduced from an argument, so that a braced list can be one.
template <class Op>
using Same = typename std::enable_if<true, Op>::type;

// Runs an op that writes elements; returns how many are not finite.
template <class Op>
uint64_t run_write(const char* name, pymerge::Status (*call)(const Op&, uint64_t*), const Same<Op>& op) {
    uint64_t num_nonfinite = 0;
    run(name, [&] { return call(op, &num_nonfinite); });
    return num_nonfinite;
}

template <class Op>
void run_measure(const char* name, pymerge::Status (*call)(const Op&), const Same<Op>& op) {
    run(name, [&] { return call(op); });
}

}  // namespace binding
