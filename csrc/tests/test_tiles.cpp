// The instructions of tiles, as tiles.cpp executes them or as the processor does: what amx_bf16.cpp builds
// on.
#include "tiles.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "data.h"

namespace evit::tests {
namespace {

#if defined(__x86_64__) && defined(__linux__)

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {};
  uint8_t rows[16] = {};
};

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#endif
void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
void release() { asm volatile("tilerelease" ::: "memory"); }

// sums += left right, in tiles of `rows` by `columns` and `depth` pairs; what tile 0 has then, with a stride
// of 80.
void multiply(const void* left, const void* right, float* sums, int64_t rows, int64_t columns,
              int64_t depth) {
  Config config;
  const auto tile = [&](int i, int64_t height, int64_t width) {
    config.rows[i] = static_cast<uint8_t>(height);
    config.bytes_of_row[i] = static_cast<uint16_t>(4 * width);
  };
  tile(0, rows, columns);
  tile(1, rows, depth);
  tile(7, depth, columns);
  configure(config);
  const int64_t stride = 80;
  asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(sums), "r"(stride) : "memory");
  asm volatile("tileloadd (%0,%1,4), %%tmm1" ::"r"(left), "r"(stride / 4) : "memory");
  asm volatile("tileloaddt1 16(%0,%1,8), %%tmm7" ::"r"(static_cast<const char*>(right) - 16), "r"(stride / 8)
               : "memory");
  asm volatile("tdpbf16ps %%tmm7, %%tmm1, %%tmm0" ::: "memory");
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(sums), "r"(stride) : "memory");
  release();
}
#if defined(__clang__)
#pragma clang attribute pop
#endif

constexpr int64_t kStride = 80 / sizeof(float);

struct Matrices {
  Matrices()
      : left(random_values<BFloat16>(16 * 2 * kStride, 61)),
        right(random_values<BFloat16>(16 * 2 * kStride, 62)),
        sums(random_values<float>(16 * kStride, 63)) {}
  double product(int64_t i, int64_t j, int64_t depth) const {
    double sum = 0;
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t half = 0; half < 2; ++half)
        sum += to_double(left[i * 2 * kStride + 2 * d + half]) *
               to_double(right[d * 2 * kStride + 2 * j + half]);
    return sum;
  }
  Buffer<BFloat16> left, right;
  Buffer<float> sums;
};

TEST(tiles_multiply_pairs_of_bfloat16) {
  if (!tiles_testable()) return;
  for (const int64_t rows : {1, 5, 16})
    for (const int64_t columns : {1, 7, 16})
      for (const int64_t depth : {1, 3, 16}) {
        Matrices matrices;
        const Matrices before;
        multiply(matrices.left.data.get(), matrices.right.data.get(), matrices.sums.data.get(), rows, columns,
                 depth);
        for (int64_t i = 0; i < 16; ++i)
          for (int64_t j = 0; j < kStride; ++j) {
            const bool inside = i < rows && j < columns;
            const double expected = before.sums[i * kStride + j] + (inside ? before.product(i, j, depth) : 0);
            CHECK_NEAR(matrices.sums[i * kStride + j], expected, inside ? 2e-6 : 0);
          }
        CHECK(tiles_released());
      }
}

// Subnormal numbers are 0, as operands and as results; even and odd products are summed apart.
TEST(tiles_round_as_the_manual_says) {
  if (!tiles_testable()) return;
  const auto result = [](std::vector<double> left, std::vector<double> right, float sum) {
    Buffer<BFloat16> a(2 * kStride), b(16 * 2 * kStride);
    std::memset(b.data.get(), 0, b.size * sizeof(BFloat16));
    for (size_t i = 0; i < left.size(); ++i) {
      a[i] = from_double<BFloat16>(left[i]);
      b[i / 2 * 2 * kStride + i % 2] = from_double<BFloat16>(right[i]);
    }
    float sums[kStride] = {sum};
    multiply(a.data.get(), b.data.get(), sums, 1, 1, static_cast<int64_t>(left.size() / 2));
    return sums[0];
  };
  CHECK(result({2, 3}, {5, 7}, 1) == 32);
  CHECK(result({0x1p-130, 0}, {0x1p120, 0}, 0) == 0);
  CHECK(result({0x1p-126, 0}, {0x1p120, 0}, 0) == 0x1p-6f);
  CHECK(result({0x1p-70, 0}, {0x1p-60, 0}, 0) == 0);
  CHECK(result({0, 0}, {0, 0}, 0x1p-130f) == 0);
  CHECK(std::isinf(result({0x1p100, 0}, {0x1p100, 0}, 0)));
  CHECK(std::isnan(result({INFINITY, 0}, {0, 0}, 0)));
  // 2^24 + 1 rounds to 2^24, so that added one after the other both ones would be lost.
  CHECK(result({0x1p12, 1, 0, 1}, {0x1p12, 1, 0, 1}, 0) == 0x1p24f + 2);
  CHECK(result({1, 0}, {1, 0}, 0x1p24f) == 0x1p24f);
}

#endif

}  // namespace
}  // namespace evit::tests
