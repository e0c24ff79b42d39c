#include "simd_level.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace evit::cpu {
namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::amx_bf16, SimdLevel::avx512_bf16, SimdLevel::avx512,
                                 SimdLevel::avx2, SimdLevel::baseline};

#if defined(__x86_64__) && defined(__linux__)
constexpr long kSupportedStates = 0x1021, kPermitState = 0x1023;  // ARCH_GET_XCOMP_SUPP, ARCH_REQ_XCOMP_PERM
constexpr unsigned long kTileData = 18;                           // XFEATURE_XTILEDATA

// Whether the processor and the system have tiles.
bool has_tiles() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;  // in edx of leaf 7
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kBFloat16) == 0 || (edx & kTiles) == 0) return false;
  unsigned long states = 0;
  return syscall(SYS_arch_prctl, kSupportedStates, &states) == 0 && (states >> kTileData & 1) != 0;
}
// Linux wants to be asked before a process uses them, as it then has more to save at signals. Not asked
// before somebody wants this level: afterwards it refuses small stacks for signals, which other code may
// have.
bool permit_tiles() { return syscall(SYS_arch_prctl, kPermitState, kTileData) == 0; }
#else
bool has_tiles() { return false; }
bool permit_tiles() { return false; }
#endif

SimdLevel choose_level() {
  const char* wanted = std::getenv("EVIT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') wanted = simd_level_name(SimdLevel::avx512_bf16);
  bool allowed = false;
  for (const SimdLevel level : kLevels) {
    // From the requested level downwards; evit_ext warns about unknown names, and those that are not to be
    // had.
    allowed = allowed || std::strcmp(wanted, simd_level_name(level)) == 0;
    if (allowed && simd_level_available(level) && (level != SimdLevel::amx_bf16 || permit_tiles()))
      return level;
  }
  return SimdLevel::baseline;
}

SimdLevel& level_in_use() {
  static SimdLevel level = choose_level();
  return level;
}

}  // namespace

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::amx_bf16:
      return "amx_bf16";
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
  if (level == SimdLevel::amx_bf16) return simd_level_available(SimdLevel::avx512_bf16) && has_tiles();
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

SimdLevel simd_level() { return level_in_use(); }
void set_simd_level(SimdLevel level) {
  if (level == SimdLevel::amx_bf16) permit_tiles();  // refused where tests execute tiles in software
  level_in_use() = level;
}

}  // namespace evit::cpu
