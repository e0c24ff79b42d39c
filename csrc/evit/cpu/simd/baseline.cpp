// The loops for the compiler's default target: any x86-64, or NEON on Arm.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention_kernels.h"
#include "row_kernels.h"

#define EVIT_SIMD_NAMESPACE baseline
#define EVIT_SIMD_BYTES 16
#include "vectors.inc"

// These use vectors.inc and must come after it.
#include "attention_kernels.inc"
#include "row_kernels.inc"
#include "tables.inc"
