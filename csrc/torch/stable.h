// The only file that includes torch. It uses only LibTorch's stable ABI of torch 2.10, so that one binary
// works with torch 2.10 and every newer version, whichever it was built with.
#pragma once

// Defined here and not as a compiler flag, because the copy of pybind11 in torch 2.10 to 2.12 does not
// compile with it, and the Python module is built with the same flags.
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in the headers of torch 2.10
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#pragma GCC diagnostic pop

#include <optional>
#include <string>
#include <type_traits>

#include "../evit/executor.h"
#include "../evit/stream.h"
#include "../evit/types.h"

// Registers operators for every device that the build has kernels for:
//
//   EVIT_REGISTER(m) { m.impl("gather_tokens", TORCH_BOX(&gather_tokens)); }
//
// The tensors decide which kernel runs, in `on_cuda`. EVIT_CUDA_ON_HOST builds the test library that runs the
// CUDA kernels on CPU tensors.
#if defined(USE_CUDA) && !defined(EVIT_CUDA_ON_HOST)
#define EVIT_REGISTER(m)                                                          \
  static void register_operators(StableLibrary&);                                 \
  STABLE_TORCH_LIBRARY_IMPL(evit, CPU, library) { register_operators(library); }  \
  STABLE_TORCH_LIBRARY_IMPL(evit, CUDA, library) { register_operators(library); } \
  static void register_operators(StableLibrary& m)
#else
#define EVIT_REGISTER(m)                                                         \
  static void register_operators(StableLibrary&);                                \
  STABLE_TORCH_LIBRARY_IMPL(evit, CPU, library) { register_operators(library); } \
  static void register_operators(StableLibrary& m)
#endif

namespace evit::adapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using StableLibrary = torch::stable::detail::StableLibrary;

#if defined(USE_CUDA) || defined(EVIT_CUDA_ON_HOST)
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// For messages, e.g. "[2, 197, 384]": STD_TORCH_CHECK cannot print sizes.
std::string shape_str(const Tensor& tensor);

// Raises unless the tensor has `dim` dimensions; `shape` says which, e.g. "[B, N, C]".
void check_dim(const Tensor& tensor, const char* name, int64_t dim, const char* shape);
// Raises unless both are on one device.
void check_same_device(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name);
// Raises unless both have one dtype.
void check_same_dtype(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name);

// Raises unless the operators support the dtype.
void check_floating(const Tensor& tensor, const char* name);

// Whether the CUDA kernels run on this tensor.
bool on_cuda(const Tensor& tensor);
// torch's threads.
Executor executor();
// The stream on which torch queues work for a tensor's device, which is current as long as this exists: made
// so, and set back, by torch, which knows the devices that the process does not use and leaves them alone.
class CurrentStream {
 public:
  explicit CurrentStream(const Tensor& tensor);
  operator Stream() const { return stream_; }

 private:
  Stream stream_;
#if defined(USE_CUDA) && !defined(EVIT_CUDA_ON_HOST)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// To be passed to a kernel's entry: it lives until that returns.
inline CurrentStream current_stream(const Tensor& tensor) { return CurrentStream(tensor); }

// The tensor itself if its last dimension is dense, else a dense copy.
Tensor with_dense_rows(const Tensor& tensor);
// The dtype in which `dtype` values are summed: float64 for float64, else float32.
ScalarType accumulate_dtype(ScalarType dtype);
// The tensor in `dtype`; the tensor itself if it already is.
Tensor to_dtype(const Tensor& tensor, ScalarType dtype);
// An uninitialised dense tensor on `like`'s device.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// Scratch memory of a CUDA kernel, null if it needs none. It may be freed as soon as the kernel is queued:
// torch reuses it only for later work on the same stream.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes > 0) memory_ = empty(like, {bytes}, ScalarType::Byte);
  }
  void* data() const { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

// Calls body(T{}) with the element type for `dtype`.
template <typename Body>
void dispatch(ScalarType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float16, bfloat16 or float64, got ",
                      torch::headeronly::toString(dtype));
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A view of x [B, N, C] or [B, N] for the kernels; `first` skips leading tokens.
template <typename T>
Tokens<T> tokens(const Tensor& x, int64_t first = 0) {
  return {data<T>(x) + first * x.stride(1), x.stride(0), x.stride(1)};
}

}  // namespace evit::adapter
