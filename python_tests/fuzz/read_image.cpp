// The C++ example's reader of images under libFuzzer: scripts/fuzz builds and runs it.
#include "../../examples/cpp/read_image.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const at::Tensor pixels = decode_image({data, data + size});
    if (pixels.dim() != 3 || pixels.size(0) != 3) std::abort();
  } catch (const std::runtime_error&) {  // the only error that it documents
  }
  return 0;
}
