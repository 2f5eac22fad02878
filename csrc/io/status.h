// The result of an I/O call. The core throws nothing; bind_io.cpp turns a status into a Python exception.
#pragma once

#include <string>

namespace pymerge::io {

struct Status {
    enum class Kind { Ok, Argument, System };

    Kind kind = Kind::Ok;
    int error = 0;     // errno, for System
    std::string text;  // what was asked, what was found
    std::string path;  // for System

    bool ok() const { return kind == Kind::Ok; }
};

// The caller passed something that no file could satisfy.
Status argument_error(std::string text);

// The system refused: `asked` names the request with its offset and lengths.
Status system_error(int error, const std::string& asked, const std::string& path);

// "N bytes at offset O"
std::string describe_range(unsigned long long offset, unsigned long long num_bytes);

}  // namespace pymerge::io
