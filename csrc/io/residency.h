// Which pages of a file are in the page cache.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "status.h"

namespace pymerge::io {

// The share of the file's pages that are cached, 0 to 1; an empty file is 0. EPERM where this process may not know.
Status cached_fraction(int fd, const std::string& path, double* fraction);

// The pages that were cached at one moment, so that later only the others are dropped.
class Residency {
  public:
    // Where the kernel does not tell, every page counts as cached: nothing of unknown origin is dropped.
    static Residency snapshot(int fd, const std::string& path);

    // Drops the pages of [offset, offset + num_bytes) that were not cached then. A hint: it cannot fail.
    void drop_others(int fd, uint64_t offset, uint64_t num_bytes) const;

  private:
    bool all_cached_ = false;
    std::vector<bool> cached_;  // [pages]; empty: none
};

}  // namespace pymerge::io
