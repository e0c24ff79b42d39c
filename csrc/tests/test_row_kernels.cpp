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

template <typename T>
void exp_row_agrees(const RowKernels<T>& kernels) {
  using A = accumulate_t<T>;
  const double relative = sizeof(A) == 4 ? 2e-5 : 2e-14, absolute = sizeof(A) == 4 ? 1.5e-45 : 0;
  for (const int64_t count : {1, 15, 16, 17, 197})
    for (const double scale : {0.1, 1.0, 20.0, -2.0})
      for (const A shift : {A{0}, A{3.5}, A{-60}, A{150}}) {
        auto values = widened<A>(random_values<float>(count, 10));
        const auto before = widened<A>(random_values<float>(count, 10));
        kernels.exp_row(values.data.get(), count, static_cast<A>(scale), shift);
        for (int64_t i = 0; i < count; ++i) {
          const double argument = before[i] * static_cast<double>(static_cast<A>(scale)) - shift;
          const double expected = std::exp(argument);
          if (sizeof(A) == 4 && argument > 88.7) {
            CHECK(values[i] > 3e38f);  // Inf, or just below it
            continue;
          }
          CHECK(std::abs(values[i] - expected) <= relative * expected + absolute);
        }
      }
  A edge[16] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f, 1e4f, -1e4f, 0};
  kernels.exp_row(edge, 8, 1, 0);
  CHECK(std::isnan(edge[0]));
  for (const int i : {1, 3, 5}) CHECK(edge[i] == INFINITY);
  for (const int i : {2, 4, 6}) CHECK(edge[i] == 0);
  CHECK(edge[7] == 1);
}

TEST(exp_row_agrees_with_double) { FOR_EACH_TYPE_AND_LEVEL(exp_row_agrees); }

template <typename T>
void sums_of_rows_agree(const RowKernels<T>& kernels) {
  using A = accumulate_t<T>;
  for (const int64_t channels : kChannels)
    for (const int64_t count : {0, 1, 7, 40}) {
      const int64_t a_stride = channels + 2, b_stride = channels + 5, rows = std::max<int64_t>(count, 12);
      const auto a = random_values<T>(rows * a_stride, 1);
      const auto b = random_values<T>(rows * b_stride, 2);
      const auto weights = random_values<A>(count, 3);
      const int64_t some[] = {11, 0, 5, 5, 2, 1, 7};
      for (const int64_t* index : {static_cast<const int64_t*>(nullptr), count <= 7 ? some : nullptr}) {
        const auto added = [&](int64_t i, int64_t c) {
          const int64_t row = index ? index[i] : i;
          return to_double(
              from_double<T>(to_double(a[row * a_stride + c]) + to_double(b[row * b_stride + c])));
        };
        auto total = widened<A>(random_values<float>(channels, 4));
        const auto before = widened<A>(random_values<float>(channels, 4));
        kernels.add_row_sums(weights.data.get(), a.data.get(), a_stride, b.data.get(), b_stride, index, count,
                             channels, total.data.get());
        for (int64_t c = 0; c < channels; ++c) {
          double sum = before[c];
          for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(weights[i]) * added(i, c);
          CHECK_NEAR(total[c], sum, tolerance<A>() * 10);
        }
        if (count == 0) continue;
        Buffer<T> row(channels);
        const int64_t first = index ? index[0] : 0;
        kernels.add_row(&a[first * a_stride], &b[first * b_stride], channels, row.data.get());
        for (int64_t c = 0; c < channels; ++c) CHECK(to_double(row[c]) == added(0, c));
      }
    }
}

TEST(sums_of_rows_agree_with_plain_loops) { FOR_EACH_TYPE_AND_LEVEL(sums_of_rows_agree); }

template <typename T>
void norm_row_agrees(const RowKernels<T>& kernels) {
  using A = accumulate_t<T>;
  for (const int64_t channels : kChannels)
    for (const double offset : {0.0, 100.0})
      for (const double eps : {1e-6, 0.5}) {
        Buffer<T> in(channels), out(channels);
        const auto noise = random_values<float>(channels, 12);
        for (int64_t c = 0; c < channels; ++c) in[c] = from_double<T>(noise[c] + offset);
        const auto weight = widened<A>(random_values<float>(channels, 13));
        const auto bias = widened<A>(random_values<float>(channels, 14));
        kernels.norm_row(in.data.get(), channels, weight.data.get(), bias.data.get(), static_cast<A>(eps),
                         out.data.get());
        double mean = 0, variance = 0;
        for (int64_t c = 0; c < channels; ++c) mean += to_double(in[c]) / channels;
        for (int64_t c = 0; c < channels; ++c) variance += std::pow(to_double(in[c]) - mean, 2) / channels;
        // A rounding of the mean, which is as large as the offset, counts in units of the deviation.
        const double unit = tolerance<A>() * (1 + std::abs(mean) / std::sqrt(variance + eps));
        for (int64_t c = 0; c < channels; ++c)
          CHECK_NEAR(to_double(out[c]),
                     (to_double(in[c]) - mean) / std::sqrt(variance + eps) * weight[c] + bias[c],
                     std::max(tolerance<T>(), 4 * unit));
      }
}

TEST(norm_row_agrees_with_double) { FOR_EACH_TYPE_AND_LEVEL(norm_row_agrees); }

}  // namespace
}  // namespace evit::tests
