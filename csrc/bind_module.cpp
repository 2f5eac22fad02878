// The extension pymerge._C: kernels on raw pointers and file I/O. Not linked against libtorch.
#include <pybind11/pybind11.h>

void bind_ops(pybind11::module_& module);
void bind_maps(pybind11::module_& module);
void bind_io(pybind11::module_& module);

PYBIND11_MODULE(_C, module) {
    module.doc() = "CPU kernels and file I/O of pymerge";
    bind_ops(module);
    bind_maps(module);
    bind_io(module);
}
