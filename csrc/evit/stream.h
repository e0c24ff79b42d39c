// Where a CUDA kernel runs: handed in by the caller, so that the kernels know no stream pool.
#pragma once

namespace evit {

struct Stream {
  int device;    // number of the device that holds the tensors
  void* handle;  // a cudaStream_t of that device
};

}  // namespace evit
