// The K best of a row of scores by radix selection, which is linear in N for any values.
#pragma once

#include <cstdint>

#include "../order_key.h"

namespace evit::cpu {

template <typename Key>
struct Threshold {
  Key key;       // all keys above it are selected,
  int64_t ties;  // and this many equal ones, from the first on
};

// The threshold that selects `keep` of the `count` keys, 1 <= keep <= count. It finds the keep-th largest key
// byte by byte from the top, each from a histogram of the keys that agree in the bytes before.
template <typename Key>
Threshold<Key> select_threshold(const Key* keys, int64_t count, int64_t keep) {
  Key prefix = 0, mask = 0;
  int64_t wanted = keep;
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < count; ++i)
      if ((keys[i] & mask) == prefix) ++histogram[(keys[i] >> shift) & 0xff];
    int digit = 255;
    for (; histogram[digit] < wanted; --digit) wanted -= histogram[digit];
    prefix |= static_cast<Key>(digit) << shift;
    mask |= Key{0xff} << shift;
  }
  return {prefix, wanted};
}

// Writes the numbers of the `keep` best scores to kept and those of the rest to others (may be null), both
// ascending. Ties go to the lower number. keys is scratch for `count` keys.
template <typename S, typename Key>
void select(const S* scores, int64_t stride, int64_t count, int64_t keep, Key* keys, int64_t* kept,
            int64_t* others) {
  for (int64_t i = 0; i < count; ++i) keys[i] = order_key(scores[i * stride]);
  auto [threshold, ties] = select_threshold(keys, count, keep);
  for (int64_t i = 0; i < count; ++i) {
    const bool tie = keys[i] == threshold && ties > 0;
    if (tie) --ties;
    if (tie || keys[i] > threshold)
      *kept++ = i;
    else if (others != nullptr)
      *others++ = i;
  }
}

}  // namespace evit::cpu
