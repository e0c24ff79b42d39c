// What the tests of attention_with_scores and of its gradient have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "../evit/cpu/simd/row_kernels.h"
#include "data.h"
#include "tiles.h"

namespace evit::tests {

// A packed projection [B, N, 3, H, D] with `gap` elements between tokens and between batch entries.
template <typename T>
struct Projection {
  Projection(int64_t batch, int64_t tokens, int64_t heads, int64_t channels, int64_t gap, uint32_t seed)
      : width(heads * channels),
        stride_n(3 * width + gap),
        stride_b(std::max<int64_t>(tokens, 1) * stride_n + gap),
        // No gap behind the last token: the sanitizer sees the first element beyond.
        data(random_values<T>(
            batch > 0 && tokens > 0 ? (batch - 1) * stride_b + (tokens - 1) * stride_n + 3 * width : 0,
            seed)) {}
  Tokens<T> view() const { return {data.data.get(), stride_b, stride_n}; }
  // part 0: queries, 1: keys, 2: values
  double at(int64_t b, int64_t n, int64_t part, int64_t offset) const {
    return to_double(data[b * stride_b + n * stride_n + part * width + offset]);
  }
  int64_t width, stride_n, stride_b;
  Buffer<T> data;
};

// softmax(q_m . k * scale + bias) of one head, in double; no bias if there is none for every key.
template <typename T>
std::vector<double> probabilities(const Projection<T>& qkv, int64_t b, int64_t m, int64_t first_channel,
                                  int64_t tokens, int64_t channels, double scale,
                                  const std::vector<double>& bias = {}) {
  std::vector<double> p(tokens, 0);
  double largest = -INFINITY, sum = 0;
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t c = 0; c < channels; ++c)
      p[n] += qkv.at(b, m, 0, first_channel + c) * qkv.at(b, n, 1, first_channel + c) * scale;
    if (!bias.empty()) p[n] += bias[n];
    largest = std::max(largest, p[n]);
  }
  for (auto& value : p) sum += value = std::exp(value - largest);
  for (auto& value : p) value /= sum;
  return p;
}

// Biases [B, N] of the keys, with the batch innermost, of the size of logarithms of small numbers; the first
// key of every sequence is masked if there are others.
template <typename A>
struct Biases {
  Biases(int64_t batch, int64_t tokens, uint32_t seed)
      : batch(batch), tokens(tokens), data(random_values<A>(batch * tokens, seed)) {
    for (int64_t b = 0; tokens > 1 && b < batch; ++b) data[b] = -std::numeric_limits<A>::infinity();
  }
  Tokens<A> view() const { return {data.data.get(), 1, batch}; }
  std::vector<double> of(int64_t b) const {
    std::vector<double> row(tokens);
    for (int64_t n = 0; n < tokens; ++n) row[n] = to_double(data[n * batch + b]);
    return row;
  }
  // As the kernels of one head take it.
  Buffer<A> padded(int64_t b) const {
    Buffer<A> row(cpu::padded(tokens));
    for (int64_t n = 0; n < row.size; ++n) row[n] = n < tokens ? data[n * batch + b] : A{0};
    return row;
  }
  int64_t batch, tokens;
  Buffer<A> data;
};

// Scratch memory as aligned as it is promised to kernels and exactly as long, full of what is NaN if it is
// read before it is written.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t bytes) : bytes_(bytes), memory_(bytes + 64, 0xff) {
    offset_ = (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64;
  }
  void* get() { return memory_.data() + offset_; }
  // Whether nothing was written behind its end.
  bool kept_to() const {
    return std::all_of(memory_.begin() + offset_ + bytes_, memory_.end(),
                       [](unsigned char byte) { return byte == 0xff; });
  }

 private:
  int64_t bytes_, offset_;
  std::vector<unsigned char> memory_;
};

// The instruction levels of this processor; says which it has not.
inline std::vector<cpu::SimdLevel> available_levels() {
  std::vector<cpu::SimdLevel> levels;
  for (const cpu::SimdLevel level : {cpu::SimdLevel::baseline, cpu::SimdLevel::avx2, cpu::SimdLevel::avx512,
                                     cpu::SimdLevel::avx512_bf16, cpu::SimdLevel::amx_bf16}) {
    if (level == cpu::SimdLevel::amx_bf16 ? tiles_testable() : cpu::simd_level_available(level))
      levels.push_back(level);
    else
      std::printf("not run: %s, which this processor has not\n", cpu::simd_level_name(level));
  }
  return levels;
}

template <typename Body>
void for_each_level(const Body& body) {
  for (const cpu::SimdLevel level : available_levels()) body(level);
}

}  // namespace evit::tests
