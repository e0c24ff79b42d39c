// Inputs for the tests of the CUDA kernels for tokens: shapes that nobody would choose, and values.
#pragma once

#include <random>

#include "device.h"

namespace evit::tests {

struct Shape {
  int64_t batch, tokens, channels, count;
  int64_t padding;  // elements between rows: with it, or with odd channels, no 16 bytes can be read at once
};
inline constexpr Shape kShapes[] = {{2, 7, 5, 11, 3}, {1, 1, 1, 1, 0},     {3, 9, 16, 4, 0},
                                    {0, 3, 3, 2, 0},  {2, 5, 0, 3, 1},     {2, 6, 7, 0, 0},
                                    {1, 50, 8, 1, 8}, {2, 129, 64, 57, 0}, {1, 40, 264, 39, 1}};

// Random values; or `exact` ones, of whose products with `exact` weights float holds sums exactly, in any
// order, but not BFloat16 or Half. Nor does BFloat16 hold the sum of any two.
template <typename T>
Buffer<T> values(int64_t count, uint32_t seed, bool exact, bool weights = false) {
  if (!exact) return random_values<T>(count, seed);
  std::mt19937 generator(seed);
  Buffer<T> out(count);
  // Doubles lie far from zero, for the variance.
  const double range = weights ? 4000 : 250, unit = weights ? 1. / 1024 : 1,
               offset = sizeof(T) == 8 && !weights ? 30000 : 0;
  for (int64_t i = 0; i < count; ++i)
    out[i] = from_double<T>((generator() % static_cast<unsigned>(2 * range + 1) - range) * unit + offset);
  return out;
}

template <typename T>
struct Input {
  Shape shape;
  int64_t row;
  Buffer<T> host;
  DeviceBuffer<T> device;

  Input(const Shape& s, int64_t rows, uint32_t seed, bool exact = false)
      : shape(s),
        row(s.channels + s.padding),
        host(values<T>(s.batch * rows * row, seed, exact)),
        device(host),
        stride_b(rows * row) {}
  int64_t stride_b;
  Tokens<T> cpu() const { return {host.data.get(), stride_b, row}; }
  Tokens<T> cuda() const { return {device.data(), stride_b, row}; }
};

#define FOR_EACH_TYPE(call) call(float) call(double) call(Half) call(BFloat16)

}  // namespace evit::tests
