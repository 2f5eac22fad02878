// What a kernel takes beside memory of elements: tables of models, weights, keeps.
//
// The host packs the tables into one run of bytes. A short one travels with the launch, a long one through the
// scratch of the device; either way a block brings it into its shared memory first.
#pragma once

#include <string>
#include <vector>

#include "launch.h"
#include "memory.h"
#include "ops.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr size_t kNearBytes = 2560;
constexpr size_t rounded_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Arguments {
    alignas(16) unsigned char near[kNearBytes];
    const unsigned char* far;  // nullptr: near
    uint32_t num_bytes;        // a multiple of 16

    template <class Block>
    PM_DEVICE void bring(const Block& block, int num_threads, unsigned char* shared) const {
        block.phase([&](int thread) {
            const Words4* from = reinterpret_cast<const Words4*>(far ? far : near);
            for (uint32_t i = static_cast<uint32_t>(thread); i < num_bytes / 16;
                 i += static_cast<uint32_t>(num_threads)) {
                reinterpret_cast<Words4*>(shared)[i] = from[i];
            }
        });
    }
};

// The places of one op in the scratch: reserve everything, then allocate, then ask for addresses.
class Workspace {
  public:
    size_t reserve(size_t bytes) {
        const size_t offset = total_;
        total_ = rounded_up(total_ + bytes, 256);
        return offset;
    }
    void allocate() { memory_ = scratch(total_ ? total_ : 1); }
    template <class T>
    T* at(size_t offset) const {
        return reinterpret_cast<T*>(memory_ + offset);
    }

  private:
    size_t total_ = 0;
    unsigned char* memory_ = nullptr;
};

class Tables {
  public:
    template <class T>
    uint32_t add(const T* items, size_t num) {
        const size_t offset = bytes_.size();
        const unsigned char* bytes = reinterpret_cast<const unsigned char*>(items);
        bytes_.insert(bytes_.end(), bytes, bytes + num * sizeof(T));
        bytes_.resize(rounded_up(bytes_.size(), 16));
        return static_cast<uint32_t>(offset);
    }
    template <class T>
    uint32_t add(const std::vector<T>& items) {
        return add(items.data(), items.size());
    }
    // Room that the kernel fills.
    uint32_t leave(size_t bytes) {
        const size_t offset = bytes_.size();
        bytes_.resize(rounded_up(offset + bytes, 16));
        return static_cast<uint32_t>(offset);
    }
    size_t num_bytes() const { return bytes_.size(); }
    void reserve(Workspace* workspace) {
        if (bytes_.size() > kNearBytes) place_ = workspace->reserve(bytes_.size());
    }
    Arguments finish(const char* op, const Workspace& workspace) const {
        Arguments arguments{};
        arguments.num_bytes = static_cast<uint32_t>(bytes_.size());
        if (bytes_.size() > most_shared_bytes() / 2) {
            throw Failure(std::string(op) + ": the tables of so many models take " + std::to_string(bytes_.size()) +
                          " bytes, a block has room for " + std::to_string(most_shared_bytes() / 2) +
                          "; merge fewer at once");
        }
        if (bytes_.size() <= kNearBytes) {
            memcpy(arguments.near, bytes_.data(), bytes_.size());
        } else {
            arguments.far = workspace.at<unsigned char>(place_);
            upload(op, workspace.at<unsigned char>(place_), bytes_.data(), bytes_.size());
        }
        return arguments;
    }

  private:
    std::vector<unsigned char> bytes_;
    size_t place_ = 0;
};

inline int32_t width_of(uint64_t address) { return address % 16 == 0 ? 16 : address % 8 == 0 ? 8 : 1; }

inline Source source_of(const View& view) {
    return {reinterpret_cast<const unsigned char*>(view.address), view.format, width_of(view.address)};
}

inline Target target_of(const View& view) {
    const int32_t width = width_of(view.address);
    return {reinterpret_cast<unsigned char*>(view.address), view.format,
            width == 1 && view.address % 4 == 0 ? 4 : width};
}

// The base and the models of an op in its tables.
struct Inputs {
    uint32_t sources;  // Source [1 + num_models], the base first
    int32_t num_models;
    bool has_base;
};

inline Inputs add_inputs(Tables* tables, const Models& models) {
    std::vector<Source> sources(1, models.base ? source_of(*models.base) : Source{});
    for (const View& view : models.views) sources.push_back(source_of(view));
    return {tables->add(sources), static_cast<int32_t>(models.views.size()), models.base.has_value()};
}

}  // namespace
}  // namespace cuda
}  // namespace pymerge
