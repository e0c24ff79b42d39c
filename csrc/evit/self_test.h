// self_test: does this device run the kernels of this build?
//
// Launches one small kernel on `device` and reads its result back (so it synchronises: not for use inside
// other work). Returns an empty string, or what went wrong, e.g. that no code for the device's architecture
// was built.
#pragma once

#include <string>

namespace evit::cuda {

std::string self_test(int device);

}  // namespace evit::cuda
