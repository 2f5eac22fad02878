#include "filesystem.h"

#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "descriptor.h"

namespace pymerge::io {
namespace {

struct Magic {
    uint32_t number;
    const char* name;
};

// From the kernel's magic.h and the sources of filesystems outside the kernel. ext2 to ext4 share one number.
constexpr Magic kMagics[] = {
    {0x0000ef53, "ext4"},    {0x58465342, "xfs"},       {0x9123683e, "btrfs"},   {0xf2f52010, "f2fs"},
    {0x2fc12fc1, "zfs"},     {0xca451a4e, "bcachefs"},  {0x794c7630, "overlay"}, {0x01021994, "tmpfs"},
    {0x858458f6, "ramfs"},   {0x958458f6, "hugetlbfs"}, {0x65735546, "fuse"},    {0x00006969, "nfs"},
    {0x0bd00bd0, "lustre"},  {0x00c36400, "ceph"},      {0x47504653, "gpfs"},    {0x19830326, "beegfs"},
    {0xff534d42, "cifs"},    {0xfe534d42, "smb2"},      {0x01021997, "9p"},      {0x73717368, "squashfs"},
    {0xe0f5e1e2, "erofs"},   {0x00004d44, "vfat"},      {0x2011bab0, "exfat"},   {0x7366746e, "ntfs3"},
    {0x00009660, "iso9660"},
};

}  // namespace

Status filesystem_name(const std::string& path, std::string* name) {
    struct statfs info;
    if (statfs(path.c_str(), &info) != 0) return system_error(errno, "asking for the filesystem type", path);
    const auto number = static_cast<uint32_t>(info.f_type);
    for (const Magic& magic : kMagics) {
        if (magic.number == number) {
            *name = magic.name;
            return {};
        }
    }
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", number);
    *name = text;
    return {};
}

bool is_in_memory(const std::string& filesystem) {
    return filesystem == "tmpfs" || filesystem == "ramfs" || filesystem == "hugetlbfs";
}

Status free_bytes(const std::string& path, uint64_t* num_bytes) {
    struct statvfs info;
    if (statvfs(path.c_str(), &info) != 0) return system_error(errno, "asking for the free space", path);
    *num_bytes = static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
    return {};
}

Status fsync_directory(const std::string& path) {
    const Descriptor folder = Descriptor::open(path.c_str(), O_RDONLY | O_DIRECTORY);
    if (!folder.valid()) return system_error(errno, "opening a folder to make it durable", path);
    int result;
    do {
        result = fsync(folder.get());
    } while (result != 0 && errno == EINTR);
    if (result != 0) return system_error(errno, "making a folder durable (fsync)", path);
    return {};
}

}  // namespace pymerge::io
