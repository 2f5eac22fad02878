// Questions about the filesystem under a path.
#pragma once

#include <cstdint>
#include <string>

#include "status.h"

namespace pymerge::io {

// "ext4", "tmpfs", ...; a filesystem that we do not know by name is given as its magic number in hexadecimal.
Status filesystem_name(const std::string& path, std::string* name);

bool is_in_memory(const std::string& filesystem);

// Bytes that an unprivileged process may still allocate.
Status free_bytes(const std::string& path, uint64_t* num_bytes);

// Makes creations, renames and removals in the folder durable.
Status fsync_directory(const std::string& path);

}  // namespace pymerge::io
