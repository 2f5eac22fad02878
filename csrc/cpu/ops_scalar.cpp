// The ops in portable C++, one element at a time: what other processors run, and the check of the others.
#include "ops_inl.h"
#include "pymerge/scalar.h"

namespace pymerge {

constexpr OpTable kOps = op_table<Scalar>("scalar");
const OpTable scalar_ops = kOps;

}  // namespace pymerge
