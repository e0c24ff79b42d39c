#include "row_kernels.h"

#include <type_traits>

#include "attention_kernels.h"

namespace evit::cpu {

namespace baseline {
template <typename T>
const RowKernels<T>& table();
template <typename T>
const AttentionKernels<T>& attention_table();
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
template <typename T>
const RowKernels<T>& table();
template <typename T>
const AttentionKernels<T>& attention_table();
}  // namespace avx2
namespace avx512 {
template <typename T>
const RowKernels<T>& table();
template <typename T>
const AttentionKernels<T>& attention_table();
}  // namespace avx512
namespace avx512_bf16 {
const AttentionKernels<BFloat16>& attention_table();
}
namespace amx_bf16 {
const AttentionKernels<BFloat16>& attention_table();
}
#endif

template <typename T>
const RowKernels<T>& row_kernels(SimdLevel level) {
#if defined(__x86_64__)
  if (level >= SimdLevel::avx512) return avx512::table<T>();
  if (level == SimdLevel::avx2) return avx2::table<T>();
#endif
  (void)level;
  return baseline::table<T>();
}

template <typename T>
const AttentionKernels<T>& attention_kernels(SimdLevel level) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (level == SimdLevel::amx_bf16) return amx_bf16::attention_table();
    if (level == SimdLevel::avx512_bf16) return avx512_bf16::attention_table();
  }
  if (level >= SimdLevel::avx512) return avx512::attention_table<T>();
  if (level == SimdLevel::avx2) return avx2::attention_table<T>();
#endif
  (void)level;
  return baseline::attention_table<T>();
}

#define EVIT_INSTANTIATE(T)                                \
  template const RowKernels<T>& row_kernels<T>(SimdLevel); \
  template const AttentionKernels<T>& attention_kernels<T>(SimdLevel);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
