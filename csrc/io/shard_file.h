// One output file of known length, written in place by several threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <string>

#include "descriptor.h"
#include "status.h"

namespace pymerge::io {

class ShardFile {
  public:
    // Creates or empties the file and reserves its blocks; a full disk removes it again. With resume the file must
    // exist with exactly num_bytes, and nothing of it is changed.
    Status open(const std::string& path, uint64_t num_bytes, bool drop_cache, bool resume);

    // May be called by several threads at once on ranges that do not overlap.
    Status write(uint64_t offset, const char* data, size_t num_bytes);

    // Returns when everything written before is on the device. Never call it again after it failed: the kernel
    // reports lost pages once and forgets them.
    Status sync();

    // Waits for writes under way.
    Status close();

    // Whether the filesystem reserved the blocks, so that writing cannot run out of space.
    bool preallocated() const { return preallocated_; }
    uint64_t num_bytes() const { return num_bytes_; }
    const std::string& path() const { return path_; }

  private:
    Status reserve(bool resume);
    void start_write_back(uint64_t offset, size_t num_bytes);

    std::string path_;
    uint64_t num_bytes_ = 0;
    bool preallocated_ = false;
    bool drop_cache_ = false;
    std::atomic<bool> dontcache_{false};
    std::shared_mutex in_use_;  // shared by writes, exclusive for close: a number may not be reused under a write
    Descriptor file_;

    std::mutex pending_lock_;
    uint64_t pending_begin_ = 0;  // bounds of what was written since write-back was last started
    uint64_t pending_end_ = 0;
    uint64_t pending_bytes_ = 0;
    bool is_starting_ = false;
};

}  // namespace pymerge::io
