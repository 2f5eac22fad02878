// One anonymous mapping from which the engine cuts its blocks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace pymerge::io {

// Memory is reserved, not touched: pages arrive at first use. Large arenas are aligned to, and ask for, huge pages.
class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena();

    Status map(size_t num_bytes);

    // Gives the whole pages inside the range back to the system; they read as zeros afterwards.
    Status release_pages(size_t offset, size_t num_bytes);

    void* data() const { return data_; }
    size_t num_bytes() const { return num_bytes_; }

  private:
    void* data_ = nullptr;
    size_t num_bytes_ = 0;
    size_t mapped_bytes_ = 0;
};

}  // namespace pymerge::io
