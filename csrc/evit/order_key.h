// The order of scores in the selection of the K best: one definition for CPU and CUDA.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

namespace evit {

// An unsigned number with the same order as the score: NaN above everything, -0 equal to +0.
template <typename S>
EVIT_HOST_DEVICE auto order_key(S score) {
  using Key = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;
  if (score != score) return ~Key{0};
  score += S{0};  // -0 becomes +0
  Key bits;
  std::memcpy(&bits, &score, sizeof bits);
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  return static_cast<Key>((bits & sign) != 0 ? ~bits : bits | sign);
}

}  // namespace evit
