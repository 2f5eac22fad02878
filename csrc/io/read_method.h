// How a file is read, and which way suits a file here.
#pragma once

#include <string>

#include "status.h"

namespace pymerge::io {

enum class ReadMethod {
    DontCache,  // through the page cache, leaving nothing there but what the kernel read ahead in vain
    Direct,     // past the page cache, over-reading to the alignment of the device
    Buffered,   // through the page cache, dropping afterwards what was not there before
    Plain,      // through the page cache
};

const char* to_string(ReadMethod method);
bool parse(const std::string& name, ReadMethod* method);

// O_DIRECT is used up to this alignment, because a caller's block has 2 x 4096 bytes to spare for the over-read.
constexpr size_t kMaxDirectAlignment = 4096;

// The first method of the order above that works for this file, and why those before it do not.
Status probe_read_method(const std::string& path, ReadMethod* method, std::string* reason);

}  // namespace pymerge::io
