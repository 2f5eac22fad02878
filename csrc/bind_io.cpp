// File I/O for Python. Every call that can block runs without the GIL; a status becomes an exception here and only
// here.
#include <pybind11/pybind11.h>
#include <pybind11/stl/filesystem.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <utility>

#include "io/arena.h"
#include "io/checksum.h"
#include "io/filesystem.h"
#include "io/read_method.h"
#include "io/residency.h"
#include "io/shard_file.h"
#include "io/source_file.h"
#include "io/system_calls.h"

namespace py = pybind11;
using namespace py::literals;
using std::filesystem::path;

namespace {

using namespace pymerge::io;

void check(const Status& status) {
    if (status.ok()) return;
    if (status.kind == Status::Kind::Argument) throw py::value_error(status.text);
    py::object file = py::none();
    if (!status.path.empty()) {
        file = py::reinterpret_steal<py::object>(
            PyUnicode_DecodeFSDefaultAndSize(status.path.data(), static_cast<Py_ssize_t>(status.path.size())));
        if (!file) throw py::error_already_set();
    }
    // OSError picks the subclass (FileNotFoundError, ...) by the number.
    PyErr_SetObject(PyExc_OSError, py::make_tuple(status.error, status.text, file).ptr());
    throw py::error_already_set();
}

// Runs a call of the core without the GIL and raises what it reports.
template <typename Call>
void run(Call&& call) {
    Status status;
    {
        const py::gil_scoped_release release;
        status = call();
    }
    check(status);
}

char* pointer(uintptr_t address) { return reinterpret_cast<char*>(address); }

ReadMethod parse_method(const std::string& name) {
    ReadMethod method;
    if (!parse(name, &method)) {
        throw py::value_error("expected a read method \"dontcache\", \"direct\", \"buffered\" or \"plain\", found \"" +
                              name + "\"");
    }
    return method;
}

Descriptor open_to_read(const path& file) {
    Descriptor descriptor = Descriptor::open_to_read(file.c_str());
    if (!descriptor.valid()) check(system_error(errno, "opening to read", file.native()));
    return descriptor;
}

void bind_memory(py::module_& module) {
    py::class_<Arena>(module, "Arena", py::buffer_protocol())
        .def(py::init([](size_t num_bytes) {
                 auto arena = std::make_unique<Arena>();
                 run([&] { return arena->map(num_bytes); });
                 return arena;
             }),
             "num_bytes"_a)
        .def_property_readonly("address", [](const Arena& arena) { return reinterpret_cast<uintptr_t>(arena.data()); })
        .def_property_readonly("num_bytes", &Arena::num_bytes)
        .def(
            "release_pages",
            [](Arena& arena, size_t offset, size_t num_bytes) {
                run([&] { return arena.release_pages(offset, num_bytes); });
            },
            "offset"_a, "num_bytes"_a)
        .def_buffer([](Arena& arena) {
            return py::buffer_info(static_cast<unsigned char*>(arena.data()),
                                   static_cast<py::ssize_t>(arena.num_bytes()));
        });
    module.def(
        "copy",
        [](uintptr_t destination, uintptr_t source, size_t num_bytes) {
            const py::gil_scoped_release release;
            std::memmove(pointer(destination), pointer(source), num_bytes);
        },
        "destination"_a, "source"_a, "num_bytes"_a);
}

void bind_files(py::module_& module) {
    py::class_<SourceFile>(module, "SourceFile")
        .def(py::init([](const path& file, const std::string& method) {
                 auto source = std::make_unique<SourceFile>();
                 const ReadMethod parsed = parse_method(method);
                 run([&] { return source->open(file.native(), parsed); });
                 return source;
             }),
             "path"_a, "method"_a)
        .def(
            "read",
            [](SourceFile& source, uint64_t offset, size_t length, uintptr_t block_address, size_t block_bytes) {
                char* data = nullptr;
                run([&] { return source.read(offset, length, pointer(block_address), block_bytes, &data); });
                return reinterpret_cast<uintptr_t>(data);
            },
            "offset"_a, "length"_a, "block_address"_a, "block_bytes"_a)
        .def("close", [](SourceFile& source) { run([&] { return source.close(); }); })
        .def_property_readonly("method", [](const SourceFile& source) { return to_string(source.method()); })
        .def_property_readonly("path", [](const SourceFile& source) { return path(source.path()); });

    py::class_<ShardFile>(module, "ShardFile")
        .def(py::init([](const path& file, uint64_t num_bytes, bool drop_cache, bool resume) {
                 auto shard = std::make_unique<ShardFile>();
                 run([&] { return shard->open(file.native(), num_bytes, drop_cache, resume); });
                 return shard;
             }),
             "path"_a, "num_bytes"_a, "drop_cache"_a = false, "resume"_a = false)
        .def(
            "write",
            [](ShardFile& shard, uint64_t offset, uintptr_t address, size_t length) {
                run([&] { return shard.write(offset, pointer(address), length); });
            },
            "offset"_a, "address"_a, "length"_a)
        .def("sync", [](ShardFile& shard) { run([&] { return shard.sync(); }); })
        .def("close", [](ShardFile& shard) { run([&] { return shard.close(); }); })
        .def_property_readonly("preallocated", &ShardFile::preallocated)
        .def_property_readonly("num_bytes", &ShardFile::num_bytes)
        .def_property_readonly("path", [](const ShardFile& shard) { return path(shard.path()); });
}

void bind_questions(py::module_& module) {
    module.def(
        "probe_read_method",
        [](const path& file) {
            ReadMethod method = ReadMethod::Plain;
            std::string reason;
            run([&] { return probe_read_method(file.native(), &method, &reason); });
            return std::pair<std::string, std::string>(to_string(method), reason);
        },
        "path"_a);
    module.def(
        "direct_alignment",
        [](const path& file) -> py::object {
            const DirectAlignment alignment = direct_alignment(open_to_read(file).get());
            if (!alignment.known) return py::none();
            return py::make_tuple(alignment.memory, alignment.offset);
        },
        "path"_a);
    module.def(
        "cached_fraction",
        [](const path& file) {
            const Descriptor descriptor = open_to_read(file);
            double fraction = 0;
            run([&] { return cached_fraction(descriptor.get(), file.native(), &fraction); });
            return fraction;
        },
        "path"_a);
    module.def(
        "filesystem",
        [](const path& file) {
            std::string name;
            run([&] { return filesystem_name(file.native(), &name); });
            return name;
        },
        "path"_a);
    module.def(
        "free_bytes",
        [](const path& file) {
            uint64_t num_bytes = 0;
            run([&] { return free_bytes(file.native(), &num_bytes); });
            return num_bytes;
        },
        "path"_a);
    module.def(
        "fsync_directory", [](const path& folder) { run([&] { return fsync_directory(folder.native()); }); }, "path"_a);
}

void bind_checksums(py::module_& module) {
    using Checksum = uint32_t (*)(const void*, size_t, uint32_t);
    const std::pair<const char*, Checksum> checksums[] = {{"crc32c", crc32c}, {"crc32c_tables", crc32c_tables}};
    for (const auto& [name, checksum] : checksums) {
        module.def(
            name,
            [checksum = checksum](uintptr_t address, size_t num_bytes, uint32_t crc) {
                const py::gil_scoped_release release;
                return checksum(pointer(address), num_bytes, crc);
            },
            "address"_a, "num_bytes"_a, "crc"_a = 0);
    }
    module.def("crc32c_combine", crc32c_combine, "crc_a"_a, "crc_b"_a, "num_bytes_b"_a);
    module.def("crc32c_implementation", crc32c_implementation);
}

}  // namespace

void bind_io(py::module_& module) {
    bind_memory(module);
    bind_files(module);
    bind_questions(module);
    bind_checksums(module);
}
