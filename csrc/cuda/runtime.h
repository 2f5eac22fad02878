// What the ops and the engine need of a device: memory, copies, streams, scratch, launches. Compiled by nvcc it
// calls the CUDA runtime; compiled by a C++ compiler the one device is the host, copies are memmove and a launch
// is a loop. Every call is checked: what fails throws Failure with the call, its sizes and the runtime's own words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pymerge {
namespace cuda {

class Failure : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

struct DeviceInfo {
    std::string name;
    int major = 0;
    int minor = 0;
    int num_multiprocessors = 0;
    size_t shared_bytes = 0;  // of a block, where it asks for it
    uint64_t total_bytes = 0;
    uint64_t free_bytes = 0;
};

// A place for work: the index of a device and the address of a stream there, 0 for the default one.
struct Place {
    int device = 0;
    uint64_t stream = 0;
};

bool is_emulated();
// Why no kernel can run on any device, as a sentence; empty where it can.
std::string why_not();
int num_devices();
DeviceInfo device_info(int device);

uint64_t allocate(int device, uint64_t bytes);
void release(int device, uint64_t address);
void register_host(uint64_t address, uint64_t bytes);
void unregister_host(uint64_t address);

uint64_t make_stream(int device);
void destroy_stream(const Place& place);
// The first place waits, without holding up the host, for what was so far given to the second.
void wait_for(const Place& place, const Place& other);
void synchronize(const Place& place);
void copy(const Place& place, uint64_t target, uint64_t source, uint64_t bytes);

// Where the ops of the calling thread run. The thread's default is the default stream of device 0.
void use(const Place& place);
const Place& current();

// Refuses memory that the current device cannot reach: a wrong address would take the whole process's context down.
void require_reachable(const char* op, const char* what, uint64_t address);

// Memory of the current device that lasts until the thread's next call of scratch(). Contents are anything.
unsigned char* scratch(size_t bytes);

// Within the current place. `what` names the op in errors.
void upload(const char* what, void* target, const void* source, size_t bytes);
void download(const char* what, void* target, const void* source, size_t bytes);  // waits
void clear(const char* what, void* target, size_t bytes);

// What one block may have of the shared memory of the current device.
size_t most_shared_bytes();

// Blocks that fill the current device: so many blocks of a grid-stride loop keep it busy.
int64_t filling_blocks(int threads);

}  // namespace cuda
}  // namespace pymerge
