// Test data: random values of every element type, exact conversions, buffers with guarded ends, executors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "../evit/executor.h"
#include "../evit/types.h"

namespace evit::tests {

inline double to_double(float v) { return v; }
inline double to_double(double v) { return v; }
inline double to_double(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
// By the definition of binary16.
inline double to_double(Half v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  double magnitude;
  if (exponent == 31)
    magnitude = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    magnitude = std::ldexp(mantissa, -24);
  else
    magnitude = std::ldexp(1024 + mantissa, exponent - 25);
  return v.bits & 0x8000 ? -magnitude : magnitude;
}

// The nearest value of a 16-bit type, ties to even, by search over all of them: slow and certain.
template <typename T>
T nearest(double value) {
  static const std::vector<std::pair<double, uint16_t>> table = [] {
    std::vector<std::pair<double, uint16_t>> out;
    for (uint32_t bits = 0; bits < 0x8000; ++bits) {
      const double v = to_double(T{static_cast<uint16_t>(bits)});
      if (std::isfinite(v)) out.emplace_back(v, static_cast<uint16_t>(bits));
    }
    // Infinity begins where the next value would be.
    const double last = out.back().first, step = last - out[out.size() - 2].first;
    out.emplace_back(last + step, static_cast<uint16_t>(out.back().second + 1));
    return out;
  }();
  const double magnitude = std::abs(value);
  auto above = std::lower_bound(table.begin(), table.end(), std::make_pair(magnitude, uint16_t{0}));
  uint16_t bits;
  if (above == table.end()) {
    bits = table.back().second;
  } else if (above == table.begin()) {
    bits = above->second;
  } else {
    const auto below = above - 1;
    const double down = magnitude - below->first, up = above->first - magnitude;
    bits = down < up || (down == up && below->second % 2 == 0) ? below->second : above->second;
  }
  return T{static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0))};
}

template <typename T>
T from_double(double v) {
  if constexpr (sizeof(T) == 2)
    return nearest<T>(v);
  else
    return static_cast<T>(v);
}

// Rounding of one result to T, plus a few roundings of its sum.
template <typename T>
constexpr double tolerance() {
  if (std::is_same_v<T, double>) return 1e-14;
  if (std::is_same_v<T, float>) return 2e-6;
  return std::is_same_v<T, Half> ? 5e-4 : 4e-3;
}

// Exactly as many elements as asked for, on the heap: the sanitizer sees the first one beyond.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t count) : size(count), data(new T[count > 0 ? count : 1]) {}
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
  int64_t size;
  std::unique_ptr<T[]> data;
};

template <typename T>
Buffer<T> random_values(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  Buffer<T> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = from_double<T>(static_cast<float>(normal(generator)));
  return out;
}

// `keep` different numbers below `patches` for each of `batch` sequences, ascending: [batch, keep].
inline Buffer<int64_t> random_kept(int64_t batch, int64_t keep, int64_t patches, uint32_t seed) {
  std::mt19937 generator(seed);
  Buffer<int64_t> kept(batch * keep);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0, i = 0; j < patches; ++j)
      if (static_cast<int64_t>(generator() % static_cast<uint64_t>(patches - j)) < keep - i)
        kept[b * keep + i++] = j;
  return kept;
}

// A thread for every part, of which there are five where there is enough to share, however small they are: a
// kernel that depends on how its work is split, or whose parts touch the same memory, shows it at every size.
inline Executor thread_executor() {
  constexpr int64_t parts = 5;
  return {parts,
          [](int64_t end, int64_t grain, Executor::Range range, void* context) {
            const int64_t size = std::max(grain, (end + parts - 1) / parts);
            std::vector<std::thread> threads;
            for (int64_t begin = 0; begin < end; begin += size)
              threads.emplace_back(range, begin, std::min(begin + size, end), context);
            for (auto& thread : threads) thread.join();
          },
          1};
}

}  // namespace evit::tests
