// The loops for whatever the compiler targets by default: any x86-64, or NEON on Arm.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention_kernels.h"
#include "row_kernels.h"

// Nothing here crosses the ABI with a vector in a register: every such function is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define EVIT_SIMD_NAMESPACE baseline
#define EVIT_SIMD_BYTES 16
#include "vectors.inc"

// In its terms.
#include "attention_kernels.inc"
#include "row_kernels.inc"
#include "tables.inc"
