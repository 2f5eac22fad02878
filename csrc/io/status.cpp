#include "status.h"

#include <system_error>
#include <utility>

namespace pymerge::io {

Status argument_error(std::string text) { return {Status::Kind::Argument, 0, std::move(text), {}}; }

Status system_error(int error, const std::string& asked, const std::string& path) {
    return {Status::Kind::System, error, asked + ": " + std::generic_category().message(error), path};
}

std::string describe_range(unsigned long long offset, unsigned long long num_bytes) {
    return std::to_string(num_bytes) + " bytes at offset " + std::to_string(offset);
}

}  // namespace pymerge::io
