// Where a CUDA kernel runs: chosen by the caller, so that the kernels do not depend on a stream pool.
#pragma once

namespace evit {

struct Stream {
  int device;    // number of the device that holds the tensors
  void* handle;  // a cudaStream_t of that device
};

}  // namespace evit
