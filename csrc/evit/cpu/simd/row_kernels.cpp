#include "row_kernels.h"

#include <cstdlib>
#include <cstring>
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
#endif

namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::avx512_bf16, SimdLevel::avx512, SimdLevel::avx2,
                                 SimdLevel::baseline};

SimdLevel choose_level() {
  const char* wanted = std::getenv("EVIT_CPU_CAPABILITY");
  bool allowed = wanted == nullptr || *wanted == '\0';
  for (const SimdLevel level : kLevels) {
    // From the requested level downwards; evit_ext warns about unknown names.
    allowed = allowed || std::strcmp(wanted, simd_level_name(level)) == 0;
    if (allowed && simd_level_available(level)) return level;
  }
  return SimdLevel::baseline;
}

}  // namespace

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512_bf16:
      return "avx512_bf16";
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx2:
      return "avx2";
    case SimdLevel::baseline:
      break;
  }
  return "baseline";
}

bool simd_level_available(SimdLevel level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == SimdLevel::avx512_bf16)
    return simd_level_available(SimdLevel::avx512) && __builtin_cpu_supports("avx512bf16");
  if (level == SimdLevel::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == SimdLevel::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return level == SimdLevel::baseline;
}

SimdLevel simd_level() {
  static const SimdLevel level = choose_level();
  return level;
}

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
  if constexpr (std::is_same_v<T, BFloat16>)
    if (level == SimdLevel::avx512_bf16) return avx512_bf16::attention_table();
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
