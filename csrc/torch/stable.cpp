#include "stable.h"

#ifdef USE_CUDA
#include <dlfcn.h>
#endif

namespace evit::adapter {

std::string shape_str(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

void check_dim(const Tensor& tensor, const char* name, int64_t dim, const char* shape) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have shape ", shape, ", got ", shape_str(tensor));
}

void check_same_device(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  const bool same = a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() &&
                    (a.is_cpu() || a.get_device_index() == b.get_device_index());
  STD_TORCH_CHECK(same, a_name, " and ", b_name, " must be on one device");
}

void check_same_dtype(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), a_name, " and ", b_name, " must have one dtype, got ",
                  torch::headeronly::toString(a.scalar_type()), " and ",
                  torch::headeronly::toString(b.scalar_type()));
}

void check_floating(const Tensor& tensor, const char* name) {
  dispatch(tensor.scalar_type(), name, [](auto) {});
}

bool on_cuda(const Tensor& tensor) {
#ifdef EVIT_CUDA_ON_HOST
  (void)tensor;
  return true;
#else
  return kHasCuda && tensor.is_cuda();
#endif
}

#if defined(USE_CUDA) && !defined(EVIT_CUDA_ON_HOST)
CurrentStream::CurrentStream(const Tensor& tensor)
    : stream_{static_cast<int>(tensor.get_device_index()), nullptr}, guard_(stream_.device) {
  // Looked up in the library that torch has loaded for its CUDA tensors instead of linked, so that the module
  // also loads with a torch without CUDA.
  using GetStream = int32_t (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    constexpr char name[] = "aoti_torch_get_current_cuda_stream";
    return reinterpret_cast<GetStream>(dlsym(library != nullptr ? library : RTLD_DEFAULT, name));
  }();
  STD_TORCH_CHECK(get_stream != nullptr && get_stream(stream_.device, &stream_.handle) == 0,
                  "torch does not say which CUDA stream is the current one");
}
#else
CurrentStream::CurrentStream(const Tensor&) : stream_{0, nullptr} {}  // of the host, which has no others
#endif

Executor executor() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t end, int64_t grain, Executor::Range range, void* context) {
            STD_TORCH_CHECK(torch_parallel_for(0, end, grain, range, context) == 0,
                            "a parallel loop of an evit operator failed");
          }};
}

Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace evit::adapter
