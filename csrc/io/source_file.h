// One file open for reading by several threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <shared_mutex>
#include <string>

#include "descriptor.h"
#include "read_method.h"
#include "residency.h"
#include "status.h"
#include "system_calls.h"

namespace pymerge::io {

class SourceFile {
  public:
    Status open(const std::string& path, ReadMethod method);

    // Reads exactly num_bytes at offset into the block and says where in the block they begin: at its start, except for
    // direct reads, which begin where the device's alignment puts them. A file that ends earlier is an EIO. May be
    // called by several threads at once.
    Status read(uint64_t offset, size_t num_bytes, char* block, size_t block_bytes, char** data);

    // Waits for reads under way. Drops what buffered reads left in the cache.
    Status close();

    // The method in use: another than asked for once the kernel refused that one.
    ReadMethod method() const { return method_; }
    const std::string& path() const { return path_; }

  private:
    Status read_direct(uint64_t offset, size_t num_bytes, char* block, size_t block_bytes, char** data);
    // Completes a range of which `got` bytes are there.
    Status read_range(uint64_t offset, size_t num_bytes, char* data, size_t got);
    Status open_direct();

    std::string path_;
    std::atomic<ReadMethod> method_{ReadMethod::Plain};
    std::shared_mutex in_use_;  // shared by reads, exclusive for close: a number may not be reused under a read
    Descriptor file_;
    Descriptor direct_file_;
    DirectAlignment alignment_;
    Residency before_;
    std::atomic<bool> has_read_{false};
};

}  // namespace pymerge::io
