// Instruction levels: which there are, which this processor has, and which is in use.
#pragma once

namespace evit::cpu {

// avx512_bf16 and amx_bf16 have their own loops only for attention in bfloat16.
enum class SimdLevel { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };

// The level in use: the best one for this processor up to avx512_bf16, or the one that the environment
// variable EVIT_CPU_CAPABILITY asks for by its name, or the best below it. amx_bf16 must be asked for, as
// long as its speed was not measured.
SimdLevel simd_level();
// Uses another level, for tests: while no operator runs.
void set_simd_level(SimdLevel level);
const char* simd_level_name(SimdLevel level);
// Whether this build has the level, and this processor and system support it.
bool simd_level_available(SimdLevel level);

}  // namespace evit::cpu
