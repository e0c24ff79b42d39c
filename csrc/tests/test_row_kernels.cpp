// Every instruction level of the inner loops that this processor runs, against plain loops in double.
#include <algorithm>

#include "../evit/cpu/simd/row_kernels.h"
#include "check.h"
#include "data.h"

namespace evit::tests {
namespace {

using cpu::padded;
using cpu::RowKernels;
using cpu::SimdLevel;

template <typename Body>
void for_each_level(const Body& body) {
  for (const SimdLevel level : {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512}) {
    if (cpu::simd_level_available(level))
      body(level);
    else
      std::printf("not run: %s, which this processor has not\n", cpu::simd_level_name(level));
  }
}

#define FOR_EACH_TYPE_AND_LEVEL(function)                  \
  for_each_level([](SimdLevel level) {                     \
    function<float>(cpu::row_kernels<float>(level));       \
    function<double>(cpu::row_kernels<double>(level));     \
    function<Half>(cpu::row_kernels<Half>(level));         \
    function<BFloat16>(cpu::row_kernels<BFloat16>(level)); \
  })

constexpr int64_t kChannels[] = {1, 3, 15, 16, 17, 64, 65, 80, 129, 384};

template <typename A, typename T>
Buffer<A> widened(const Buffer<T>& values) {
  Buffer<A> out(padded(values.size));
  for (int64_t i = 0; i < out.size; ++i)
    out[i] = i < values.size ? static_cast<A>(to_double(values[i])) : A{0};
  return out;
}

template <typename T>
void rows_agree(const RowKernels<T>& kernels) {
  using A = accumulate_t<T>;
  for (const int64_t channels : kChannels)
    for (const int64_t count : {0, 1, 3, 4, 7, 9}) {
      const int64_t stride = channels + 2, rows = 12;
      const auto x = random_values<T>(rows * stride, 1);
      const auto a = widened<A>(random_values<float>(channels, 2));
      const auto weights = random_values<A>(count, 3);
      const int64_t index[] = {11, 0, 5, 5, 2, 1, 7, 3, 10};
      for (const int64_t* rows_of : {static_cast<const int64_t*>(nullptr), index}) {
        const auto row = [&](int64_t i) { return &x[(rows_of ? rows_of[i] : i) * stride]; };
        Buffer<A> dots(count);
        kernels.dot_rows(a.data.get(), x.data.get(), stride, rows_of, count, channels, dots.data.get());
        for (int64_t i = 0; i < count; ++i) {
          double sum = 0;
          for (int64_t c = 0; c < channels; ++c) sum += a[c] * to_double(row(i)[c]);
          CHECK_NEAR(dots[i], sum, tolerance<A>() * 10);
        }
        auto total = widened<A>(random_values<float>(channels, 4));
        const auto before = widened<A>(random_values<float>(channels, 4));
        kernels.add_rows(weights.data.get(), x.data.get(), stride, rows_of, count, channels,
                         total.data.get());
        for (int64_t c = 0; c < channels; ++c) {
          double sum = before[c];
          for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(weights[i]) * to_double(row(i)[c]);
          CHECK_NEAR(total[c], sum, tolerance<A>() * 10);
        }
      }
      // Rows are written to their last element and not beyond.
      auto out = random_values<T>(rows * stride, 5);
      const auto untouched = random_values<T>(rows * stride, 5);
      const int64_t unique[] = {11, 0, 5, 6, 2, 1, 7, 3, 10};
      kernels.outer_rows(weights.data.get(), a.data.get(), out.data.get(), stride, unique, count, channels);
      std::vector<bool> written(rows * stride, false);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < channels; ++c) {
          written[unique[i] * stride + c] = true;
          CHECK_NEAR(to_double(out[unique[i] * stride + c]), static_cast<double>(weights[i]) * a[c],
                     tolerance<T>());
        }
      for (int64_t i = 0; i < out.size; ++i)
        if (!written[i]) CHECK(to_double(out[i]) == to_double(untouched[i]));
    }
}

TEST(rows_agree_with_plain_loops) { FOR_EACH_TYPE_AND_LEVEL(rows_agree); }

template <typename T>
void all_values_convert(const RowKernels<T>& kernels) {
  // Every one of the 65,536 values to float, and back.
  Buffer<T> values(65536), back(65536);
  Buffer<float> wide(65536);
  for (int64_t i = 0; i < 65536; ++i) values[i] = T{static_cast<uint16_t>(i)};
  kernels.load_row(values.data.get(), 65536, wide.data.get());
  kernels.store_row(wide.data.get(), 65536, back.data.get());
  for (int64_t i = 0; i < 65536; ++i) {
    const double expected = to_double(values[i]);
    CHECK_NEAR(wide[i], expected, 0);
    if (std::isnan(expected))
      CHECK(std::isnan(to_double(back[i])));
    else
      CHECK(back[i].bits == values[i].bits);
  }
  // Floats in between: halfway points, their neighbours, overflow, underflow, random bits.
  std::vector<float> floats = {65504.f,       65519.99f, 65520.f,  65536.f,       1e38f,         3.4e38f,
                               3.3961775e38f, 1e-8f,     2.98e-8f, 2.9802322e-8f, 2.9802326e-8f, 5.96e-8f,
                               6.1e-5f,       1e-40f,    0.f,      -0.f};
  for (uint32_t i = 0; i < 65536; i += 7) {
    const double v = to_double(T{static_cast<uint16_t>(i)});
    const double next = to_double(T{static_cast<uint16_t>(i + 1)});
    const float middle = static_cast<float>((v + next) / 2);
    if (!std::isfinite(middle)) continue;
    for (const float f : {middle, std::nextafter(middle, 0.f), std::nextafter(middle, INFINITY)})
      floats.push_back(f);
  }
  std::mt19937 generator(7);
  for (int i = 0; i < 20000; ++i) {
    const uint32_t bits = generator();
    float f;
    std::memcpy(&f, &bits, sizeof f);
    if (std::isfinite(f)) floats.push_back(f);
  }
  for (const float f : std::vector<float>(floats)) floats.push_back(-f);
  const int64_t count = static_cast<int64_t>(floats.size());
  floats.resize(padded(count));
  Buffer<T> rounded(count);
  kernels.store_row(floats.data(), count, rounded.data.get());
  for (int64_t i = 0; i < count; ++i) CHECK(rounded[i].bits == nearest<T>(floats[i]).bits);
}

TEST(every_16_bit_value_converts) {
  for_each_level([](SimdLevel level) {
    all_values_convert<Half>(cpu::row_kernels<Half>(level));
    all_values_convert<BFloat16>(cpu::row_kernels<BFloat16>(level));
  });
}

template <typename T>
void softmax_agrees(const RowKernels<T>& kernels) {
  using A = accumulate_t<T>;
  for (const int64_t count : {1, 2, 15, 16, 17, 50, 197, 1134})
    for (const double spread : {0.1, 1.0, 30.0, -2.0}) {
      auto values = widened<A>(random_values<float>(count, 9));
      const auto logits = widened<A>(random_values<float>(count, 9));
      for (int64_t i = count; i < values.size; ++i) values[i] = 1000;  // padding must not count
      kernels.softmax(values.data.get(), count, static_cast<A>(spread));
      double largest = -INFINITY, sum = 0;
      for (int64_t i = 0; i < count; ++i) largest = std::max(largest, logits[i] * spread);
      for (int64_t i = 0; i < count; ++i) sum += std::exp(logits[i] * spread - largest);
      for (int64_t i = 0; i < count; ++i) {
        const double expected = std::exp(logits[i] * spread - largest) / sum;
        // Relative, small probabilities too. The error of an exponential is that of its argument, which has
        // one rounding of a number as large as the spread times 3.
        CHECK(std::abs(values[i] - expected) <=
              (sizeof(A) == 4 ? 2e-5 : 2e-14) * expected + (sizeof(A) == 4 ? 1.5e-45 : 0));
      }
    }
}

TEST(softmax_agrees_with_double) { FOR_EACH_TYPE_AND_LEVEL(softmax_agrees); }

}  // namespace
}  // namespace evit::tests
