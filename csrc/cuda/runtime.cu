#include <cstdlib>
#include <cstring>

#include "runtime.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace pymerge {
namespace cuda {
namespace {

thread_local Place place_of_thread;

}  // namespace

const Place& current() { return place_of_thread; }

#ifdef __CUDACC__

namespace {

constexpr int kMaxDevices = 64;

void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw Failure(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

std::string on(int device) { return " on GPU " + std::to_string(device); }

cudaStream_t stream_of(const Place& place) { return reinterpret_cast<cudaStream_t>(place.stream); }

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

// Makes a device current and puts back the one before.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) check(cudaSetDevice(device), "cudaSetDevice" + on(device));
        changed_ = device != before_;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// The scratch of one thread, one allocation for each device, grown when more is asked for. Ops wait for their
// stream before they return, so the next op may use the same memory on another one.
struct Scratch {
    void* memory[kMaxDevices] = {};
    size_t bytes[kMaxDevices] = {};

    ~Scratch() {
        for (int device = 0; device < kMaxDevices; ++device) {
            if (memory[device] && cudaSetDevice(device) == cudaSuccess) cudaFree(memory[device]);
        }
    }
};

thread_local Scratch scratch_of_thread;

// An attribute of the current device, asked for once in a thread.
class Attribute {
  public:
    explicit Attribute(cudaDeviceAttr attribute) : attribute_(attribute) {}
    int get() {
        int& value = values_[current().device];
        if (!value) check(cudaDeviceGetAttribute(&value, attribute_, current().device), "cudaDeviceGetAttribute");
        return value;
    }

  private:
    cudaDeviceAttr attribute_;
    int values_[kMaxDevices] = {};
};

thread_local Attribute num_multiprocessors(cudaDevAttrMultiProcessorCount);
thread_local Attribute shared_bytes(cudaDevAttrMaxSharedMemoryPerBlockOptin);

}  // namespace

bool is_emulated() { return false; }

std::string why_not() {
    int num = 0;
    const cudaError_t error = cudaGetDeviceCount(&num);
    if (error != cudaSuccess) {
        cudaGetLastError();
        int driver = 0;
        if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
            return "no NVIDIA driver is loaded on this machine";
        }
        return std::string("the CUDA runtime says: ") + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
               ")";
    }
    if (num == 0) return "no CUDA device is visible";
    std::string found;
    for (int device = 0; device < num; ++device) {
        const DeviceInfo info = device_info(device);
        if (info.major >= 8) return "";
        found += (device ? ", " : "") + info.name + " " + std::to_string(info.major) + "." + std::to_string(info.minor);
    }
    return "a device of compute capability 8.0 or above is needed; found " + found;
}

int num_devices() {
    int num = 0;
    check(cudaGetDeviceCount(&num), "cudaGetDeviceCount");
    return num < kMaxDevices ? num : kMaxDevices;
}

DeviceInfo device_info(int device) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties" + on(device));
    DeviceInfo info;
    info.name = properties.name;
    info.major = properties.major;
    info.minor = properties.minor;
    info.num_multiprocessors = properties.multiProcessorCount;
    info.shared_bytes = properties.sharedMemPerBlockOptin;
    const OnDevice here(device);
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo" + on(device));
    info.free_bytes = free_bytes;
    info.total_bytes = total_bytes;
    return info;
}

uint64_t allocate(int device, uint64_t bytes) {
    const OnDevice here(device);
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc of " + std::to_string(bytes) + " bytes" + on(device));
    return reinterpret_cast<uint64_t>(memory);
}

void release(int device, uint64_t address) {
    const OnDevice here(device);
    check(cudaFree(pointer(address)), "cudaFree" + on(device));
}

void register_host(uint64_t address, uint64_t bytes) {
    check(cudaHostRegister(pointer(address), bytes, cudaHostRegisterPortable),
          "cudaHostRegister of " + std::to_string(bytes) + " bytes");
}

void unregister_host(uint64_t address) { check(cudaHostUnregister(pointer(address)), "cudaHostUnregister"); }

uint64_t make_stream(int device) {
    const OnDevice here(device);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate" + on(device));
    return reinterpret_cast<uint64_t>(stream);
}

void destroy_stream(const Place& place) {
    const OnDevice here(place.device);
    check(cudaStreamDestroy(stream_of(place)), "cudaStreamDestroy" + on(place.device));
}

void wait_for(const Place& place, const Place& other) {
    cudaEvent_t event = nullptr;
    {
        const OnDevice there(other.device);
        check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate" + on(other.device));
        const cudaError_t error = cudaEventRecord(event, stream_of(other));
        if (error != cudaSuccess) cudaEventDestroy(event);
        check(error, "cudaEventRecord" + on(other.device));
    }
    const OnDevice here(place.device);
    const cudaError_t error = cudaStreamWaitEvent(stream_of(place), event, 0);
    cudaEventDestroy(event);
    check(error, "cudaStreamWaitEvent" + on(place.device));
}

void synchronize(const Place& place) {
    const OnDevice here(place.device);
    check(cudaStreamSynchronize(stream_of(place)), "cudaStreamSynchronize" + on(place.device));
}

void copy(const Place& place, uint64_t target, uint64_t source, uint64_t bytes) {
    const OnDevice here(place.device);
    check(cudaMemcpyAsync(pointer(target), pointer(source), bytes, cudaMemcpyDefault, stream_of(place)),
          "cudaMemcpyAsync of " + std::to_string(bytes) + " bytes" + on(place.device));
}

void use(const Place& place) {
    if (place.device < 0 || place.device >= kMaxDevices) {
        throw Failure("expected a device below " + std::to_string(kMaxDevices) + ", found " +
                      std::to_string(place.device));
    }
    check(cudaSetDevice(place.device), "cudaSetDevice" + on(place.device));
    place_of_thread = place;
}

void require_reachable(const char* op, const char* what, uint64_t address) {
    cudaPointerAttributes found;
    check(cudaPointerGetAttributes(&found, pointer(address)), std::string(op) + ": cudaPointerGetAttributes");
    if (found.type == cudaMemoryTypeManaged || (found.type == cudaMemoryTypeHost && found.devicePointer)) return;
    if (found.type == cudaMemoryTypeDevice && found.device == current().device) return;
    throw Failure(std::string(op) + ": " + what + " is " +
                  (found.type == cudaMemoryTypeDevice ? "in the memory of GPU " + std::to_string(found.device)
                                                      : std::string("in host memory")) +
                  ", expected memory of GPU " + std::to_string(current().device) +
                  "; copy it there, or make its device the current one");
}

unsigned char* scratch(size_t bytes) {
    const int device = current().device;
    Scratch& own = scratch_of_thread;
    if (own.bytes[device] < bytes) {
        size_t rounded = size_t{1} << 20;
        while (rounded < bytes) rounded += rounded / 2;
        if (own.memory[device]) check(cudaFree(own.memory[device]), "cudaFree" + on(device));
        own.memory[device] = nullptr;
        own.bytes[device] = 0;
        check(cudaMalloc(&own.memory[device], rounded),
              "cudaMalloc of " + std::to_string(rounded) + " bytes of scratch" + on(device));
        own.bytes[device] = rounded;
    }
    return static_cast<unsigned char*>(own.memory[device]);
}

void upload(const char* what, void* target, const void* source, size_t bytes) {
    if (!bytes) return;
    check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, stream_of(current())),
          std::string(what) + ": upload of " + std::to_string(bytes) + " bytes");
}

void download(const char* what, void* target, const void* source, size_t bytes) {
    if (bytes) {
        check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToHost, stream_of(current())),
              std::string(what) + ": download of " + std::to_string(bytes) + " bytes");
    }
    check(cudaStreamSynchronize(stream_of(current())), std::string(what));
}

void clear(const char* what, void* target, size_t bytes) {
    if (!bytes) return;
    check(cudaMemsetAsync(target, 0, bytes, stream_of(current())),
          std::string(what) + ": clearing " + std::to_string(bytes) + " bytes");
}

size_t most_shared_bytes() { return static_cast<size_t>(shared_bytes.get()); }

int64_t filling_blocks(int threads) { return int64_t{2048} / threads * num_multiprocessors.get(); }

#else

bool is_emulated() { return true; }

std::string why_not() { return ""; }

int num_devices() { return 1; }

DeviceInfo device_info(int) { return {"emulated on the host", 8, 0, 2, size_t{163} << 10, 0, 0}; }

uint64_t allocate(int, uint64_t bytes) {
    void* memory = aligned_alloc(256, (bytes + 511) / 256 * 256);
    if (!memory) throw Failure("aligned_alloc of " + std::to_string(bytes) + " bytes");
    memset(memory, 0xa5, bytes);
    return reinterpret_cast<uint64_t>(memory);
}

void release(int, uint64_t address) { free(reinterpret_cast<void*>(address)); }
void register_host(uint64_t, uint64_t) {}
void unregister_host(uint64_t) {}
uint64_t make_stream(int) { return 1; }
void destroy_stream(const Place&) {}
void wait_for(const Place&, const Place&) {}
void synchronize(const Place&) {}

void copy(const Place&, uint64_t target, uint64_t source, uint64_t bytes) {
    memmove(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes);
}

void use(const Place& place) {
    if (place.device != 0) throw Failure("the emulator has device 0 only, found " + std::to_string(place.device));
    place_of_thread = place;
}

void require_reachable(const char*, const char*, uint64_t) {}

namespace {

struct Scratch {
    void* memory = nullptr;

    ~Scratch() { free(memory); }
};

thread_local Scratch scratch_of_thread;

}  // namespace

// Fresh each time and exactly as long as asked for, so that a sanitizer sees what runs past it.
unsigned char* scratch(size_t bytes) {
    free(scratch_of_thread.memory);
    scratch_of_thread.memory = aligned_alloc(256, (bytes + 511) / 256 * 256);
    if (!scratch_of_thread.memory) throw Failure("aligned_alloc of " + std::to_string(bytes) + " bytes");
    memset(scratch_of_thread.memory, 0xa5, bytes);
    return static_cast<unsigned char*>(scratch_of_thread.memory);
}

void upload(const char*, void* target, const void* source, size_t bytes) {
    if (bytes) memcpy(target, source, bytes);
}

void download(const char*, void* target, const void* source, size_t bytes) {
    if (bytes) memcpy(target, source, bytes);
}

void clear(const char*, void* target, size_t bytes) {
    if (bytes) memset(target, 0, bytes);
}

// As little as any device has that can be used.
size_t most_shared_bytes() { return size_t{99} << 10; }

// Few, so that small cases already have more than one round of the grid-stride loop and more than one block.
int64_t filling_blocks(int) { return 3; }

#endif

}  // namespace cuda
}  // namespace pymerge
