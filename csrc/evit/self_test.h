// self_test: does this device run the kernels of this build?
//
// Launches one small kernel on `device` and reads its result back. This synchronises, so do not call it
// during other work. Returns an empty string, or what went wrong, e.g. that no code was built for the
// device's architecture.
#pragma once

#include <string>

namespace evit::cuda {

std::string self_test(int device);

}  // namespace evit::cuda
