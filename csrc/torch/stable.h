// The one place that includes torch. Only LibTorch's stable ABI is used, as it was in torch 2.10, so that one
// binary serves torch 2.10 and every newer one, whichever it was built with.
#pragma once

// Here and not as a compiler flag: the copy of pybind11 in torch 2.10 to 2.12 does not compile with it, and
// the Python module is built with the same flags.
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in the headers of torch 2.10
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
// Which kernel runs is decided by the tensors, in `on_cuda`. EVIT_CUDA_ON_HOST makes the library of the tests
// that runs the CUDA kernels on CPU tensors.
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

// "[2, 197, 384]", for messages: STD_TORCH_CHECK cannot print sizes.
std::string shape_str(const Tensor& tensor);

// Raises unless the tensor has `dim` dimensions; `shape` says which, e.g. "[B, N, C]".
void check_dim(const Tensor& tensor, const char* name, int64_t dim, const char* shape);
// Raises unless both are on one device.
void check_same_device(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name);
// Raises unless both have one dtype.
void check_same_dtype(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name);

// Raises unless the dtype is one that the operators take.
void check_floating(const Tensor& tensor, const char* name);

// Whether the CUDA kernels take this tensor.
bool on_cuda(const Tensor& tensor);
// torch's threads.
Executor executor();
// The stream on which torch queues work for the tensor's device.
Stream current_stream(const Tensor& tensor);

// The tensor itself where neighbours in the last dimension are neighbours in memory, else a dense copy.
Tensor with_dense_rows(const Tensor& tensor);
// The dtype that sums over `dtype` values have: float64 for float64, else float32.
ScalarType accumulate_dtype(ScalarType dtype);
// The tensor in `dtype`; itself where it has that already.
Tensor to_dtype(const Tensor& tensor, ScalarType dtype);
// An uninitialised dense tensor on `like`'s device.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// Scratch memory of a CUDA kernel, null where it needs none. It may be freed as soon as the kernel is queued:
// torch gives it to nothing but later work of the same stream.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes > 0) memory_ = empty(like, {bytes}, ScalarType::Byte);
  }
  void* data() const { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

// Calls body(T{}) with the element type that belongs to `dtype`.
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

// A view on x [B, N, C] or [B, N] for the kernels; `first` skips leading tokens.
template <typename T>
Tokens<T> tokens(const Tensor& x, int64_t first = 0) {
  return {data<T>(x) + first * x.stride(1), x.stride(0), x.stride(1)};
}

}  // namespace evit::adapter
