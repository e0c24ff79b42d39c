// The CUDA kernels of reorganize_tokens and add_reorganize_norm, with the gradient, against those of the CPU.
#include <algorithm>

#include "../evit/add_reorganize_norm.h"
#include "../evit/reorganize_tokens.h"
#include "cuda_tokens.h"

namespace evit::tests {
namespace {

// Scores with many ties and the values that are hard to order, where the seed is even.
template <typename S>
Buffer<S> hard_scores(int64_t count, uint32_t seed) {
  Buffer<S> scores = random_values<S>(count, seed);
  if (seed % 2 != 0) return scores;
  std::mt19937 generator(seed);
  const double all_bits = -std::nan("0xfffffffffffff");  // as in memory that nobody has written
  const double odd[] = {0.0, -0.0, all_bits, INFINITY, -INFINITY, 1e-42, -1e-42};
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t draw = generator() % 16;
    scores[i] = static_cast<S>(draw < 7 ? odd[draw] : draw < 12 ? 0.25 : -0.5 * draw);
  }
  return scores;
}

template <typename T, typename S>
void reorganize(const ReorganizeSizes& sizes, int64_t padding, uint32_t seed, bool exact = false) {
  using A = accumulate_t<T>;
  const auto [batch, num_tokens, prefix, keep, channels, fuse] = sizes;
  const int64_t patches = sizes.patches(), out_size = batch * sizes.out_tokens() * channels, skip = 2;
  const Shape shape = {batch, num_tokens, channels, keep, padding};
  const Input<T> x(shape, num_tokens, seed, exact), branch(shape, num_tokens, seed + 1, exact),
      grad(shape, sizes.out_tokens(), seed + 2, exact);
  const auto scores = exact ? values<S>(batch * patches * 2, seed, true, true)
                            : hard_scores<S>(batch * patches * 2, seed);  // every second element
  const auto accumulated = values<A>(batch * patches, seed + 3, exact, true);
  const auto weight = random_values<T>(channels, seed + 4), bias = random_values<T>(channels, seed + 5);
  const DeviceBuffer<S> device_scores(scores);
  const DeviceBuffer<A> device_accumulated(accumulated);
  const DeviceBuffer<T> device_weight(weight), device_bias(bias);
  const int64_t stride = patches * 2;
  const bool normalises = channels > 0, differentiates = fuse;

  const auto [tokens, kept, added, normed, kept_again, grad_x, grad_scores] = same_every_time([&] {
    const Tokens<S> view = {device_scores.data(), stride, 2};
    DeviceBuffer<T> out(out_size), sum(normalises ? out_size : 0), norm(normalises ? out_size : 0);
    DeviceBuffer<T> dx(differentiates ? batch * num_tokens * channels : 0);
    DeviceBuffer<A> ds(differentiates ? batch * (skip + patches) : 0);
    DeviceBuffer<int64_t> places(batch * keep), places_again(normalises ? batch * keep : 0);
    DeviceBuffer<char> workspace(cuda::reorganize_tokens_workspace<T, S>(sizes));
    cuda::reorganize_tokens<T, S>(sizes, x.cuda(), view, out.data(), places.data(), workspace.data(),
                                  test_stream());
    if (normalises) {
      const LayerNorm<T> parameters = {seed % 3 ? device_weight.data() : nullptr,
                                       seed % 5 ? device_bias.data() : nullptr, 0.03};
      cuda::add_reorganize_norm<T, S>(sizes, x.cuda(), branch.cuda(), view, parameters, sum.data(),
                                      norm.data(), places_again.data(), workspace.data(), test_stream());
    }
    if (differentiates)
      cuda::reorganize_tokens_backward<T>(sizes, grad.cuda(), x.cuda(),
                                          {device_accumulated.data(), patches, 1}, places.data(), dx.data(),
                                          ds.data(), skip, test_stream());
    return std::tuple(out.read(), places.read(), sum.read(), norm.read(), places_again.read(), dx.read(),
                      ds.read());
  });

  const Tokens<S> view = {scores.data.get(), stride, 2};
  Buffer<T> out(out_size), norm(out_size);
  Buffer<int64_t> places(batch * keep);
  cpu::reorganize_tokens<T, S>(sizes, x.cpu(), view, out.data.get(), places.data.get(), serial_executor());
  CHECK(same_bits(kept, places));
  check_close(tokens, out, tolerance<T>() * 2);
  if (exact) CHECK(same_bits(tokens, out));
  // What is copied is copied to the bit.
  for (int64_t b = 0; b < batch; ++b)
    CHECK(channels == 0 ||
          std::memcmp(&tokens[b * sizes.out_tokens() * channels], &out[b * sizes.out_tokens() * channels],
                      static_cast<size_t>((prefix + keep) * channels) * sizeof(T)) == 0);
  if (normalises) {
    const LayerNorm<T> parameters = {seed % 3 ? weight.data.get() : nullptr,
                                     seed % 5 ? bias.data.get() : nullptr, 0.03};
    cpu::add_reorganize_norm<T, S>(sizes, x.cpu(), branch.cpu(), view, parameters, out.data.get(),
                                   norm.data.get(), places.data.get(), serial_executor());
    CHECK(same_bits(kept_again, places));
    check_close(added, out, tolerance<T>() * 2);
    if (exact) CHECK(same_bits(added, out));
    // A fused token that is one rounding apart is as much apart when it is normalised.
    check_close(normed, norm, tolerance<T>() * 8);
  }
  if (differentiates) {
    Buffer<T> dx(grad_x.size);
    Buffer<A> ds(grad_scores.size);
    cpu::reorganize_tokens_backward<T>(sizes, grad.cpu(), x.cpu(), {accumulated.data.get(), patches, 1},
                                       places.data.get(), dx.data.get(), ds.data.get(), skip,
                                       serial_executor());
    check_close(grad_x, dx, tolerance<T>());
    if (exact) CHECK(same_bits(grad_x, dx) && same_bits(grad_scores, ds));
    check_close(grad_scores, ds, tolerance<A>() * 4, 1);
  }
}

template <typename T>
void reorganize_all(const ReorganizeSizes& sizes, int64_t padding, uint32_t seed) {
  reorganize<T, float>(sizes, padding, seed);
  reorganize<T, double>(sizes, padding, seed + 1);
}

TEST(cuda_reorganize_agrees) {
  uint32_t seed = 20;
  for (const int64_t prefix : {0, 1, 5})
    for (const Shape& shape : kShapes)
      for (const bool fused : {true, false}) {
        const int64_t patches = shape.tokens - prefix;
        const int64_t keep = std::min(std::max<int64_t>(shape.count, 1), fused ? patches - 1 : patches);
        if (patches < 1 || keep < 1) continue;
        const ReorganizeSizes sizes = {shape.batch, shape.tokens, prefix, keep, shape.channels, fused};
#define CALL(T) reorganize_all<T>(sizes, shape.padding, seed += 2);
        FOR_EACH_TYPE(CALL)
#undef CALL
        ++seed;
      }
}

// So large a batch that a block has all columns, or a third of them, and a thread several row lanes.
TEST(cuda_reorganize_agrees_in_large_batches) {
  for (const int64_t padding : {0, 1}) {
    reorganize<float, float>({70, 70, 1, 31, 400, true}, padding, 601 + padding);
    reorganize<BFloat16, float>({200, 40, 1, 20, 24, true}, padding, 603 + padding);
    reorganize<Half, float>({200, 9, 0, 4, 40, true}, padding, 605 + padding);
    reorganize<double, double>({200, 33, 2, 30, 6, true}, padding, 607 + padding);
    reorganize<BFloat16, float>({200, 5, 1, 3, 8, false}, padding, 609 + padding);
  }
  reorganize<BFloat16, float>({200, 40, 1, 20, 24, true}, 0, 611, true);
}

// Rows that a warp holds in half of its registers, in all, and not.
TEST(cuda_norms_agree_on_every_width) {
  for (const int64_t channels : {248, 256, 264, 504, 512, 520, 1016, 1024, 1032, 1100})
    for (const int64_t padding : {0, 1}) {
      reorganize<float, float>({1, 4, 1, 2, channels, true}, padding, 701);
      reorganize<BFloat16, float>({1, 4, 1, 2, channels, true}, padding, 702);
      reorganize<Half, float>({1, 4, 1, 2, channels, true}, padding, 703);
      reorganize<double, double>({1, 4, 1, 2, channels, true}, padding, 704);
    }
}

// Several chunks of rows, the selection in a launch of its own.
TEST(cuda_reorganize_agrees_on_long_sequences) {
  reorganize<BFloat16, float>({2, 1300, 1, 700, 8, true}, 0, 301);
  reorganize<float, float>({1, 1537, 2, 100, 5, true}, 1, 302);
  reorganize<double, float>({1, 1100, 1, 1099, 2, false}, 0, 303);
  reorganize<Half, double>({1, 1030, 0, 1, 16, true}, 0, 304);
  reorganize<double, double>({1, 1100, 1, 400, 2, true}, 1, 306);
  // So many kept patches that the gradient searches among them.
  reorganize<float, float>({1, 2600, 1, 1200, 1, true}, 0, 307);
  // As long as one launch takes them.
  reorganize<float, float>({1, 1025, 1, 300, 8, true}, 0, 305);
}

// Rounded once, from sums that are exact.
TEST(cuda_exact_reorganized_sums_have_the_bits_of_the_cpu) {
#define CALL(T)                                                 \
  reorganize<T, float>({2, 40, 1, 20, 24, true}, 0, 401, true); \
  reorganize<T, double>({2, 600, 1, 500, 8, true}, 0, 403, true);
  FOR_EACH_TYPE(CALL)
#undef CALL
}

// Several blocks select, of 4096 scores each; the last one has few. And a row too few.
TEST(cuda_selects_in_chunks) {
  for (const auto& [batch, patches] : {std::pair(2, 16389), {1, 20480}, {1, 16383}, {5, 16384}})
    for (const uint32_t seed : {4, 5})  // many ties, none
      for (const int64_t keep : {1, 7000, 16000}) {
        const ReorganizeSizes sizes = {batch, patches + 1, 1, keep, 1, false};
        const auto x = random_values<BFloat16>(batch * (patches + 1), 1);
        const auto scores = hard_scores<float>(batch * patches * 2, seed);  // every second one
        const DeviceBuffer<BFloat16> device_x(x), out(batch * sizes.out_tokens());
        const DeviceBuffer<float> device_scores(scores);
        const DeviceBuffer<int64_t> kept(batch * keep);
        const DeviceBuffer<char> workspace(cuda::reorganize_tokens_workspace<BFloat16, float>(sizes));
        cuda::reorganize_tokens<BFloat16, float>(sizes, {device_x.data(), patches + 1, 1},
                                                 {device_scores.data(), 2 * patches, 2}, out.data(),
                                                 kept.data(), workspace.data(), test_stream());
        Buffer<BFloat16> expected(batch * sizes.out_tokens());
        Buffer<int64_t> expected_kept(batch * keep);
        cpu::reorganize_tokens<BFloat16, float>(sizes, {x.data.get(), patches + 1, 1},
                                                {scores.data.get(), 2 * patches, 2}, expected.data.get(),
                                                expected_kept.data.get(), serial_executor());
        CHECK(same_bits(kept.read(), expected_kept) && same_bits(out.read(), expected));
      }
}

TEST(cuda_selects_from_65536) {
  const auto x = random_values<float>(65536, 1), scores = hard_scores<float>(65536, 4);
  for (const int64_t keep : {20000, 45876}) {  // among the many equal scores; among few
    const ReorganizeSizes sizes = {1, 65536, 0, keep, 1, true};
    const DeviceBuffer<float> device_x(x), device_scores(scores), out(sizes.out_tokens());
    const DeviceBuffer<int64_t> kept(sizes.keep);
    const DeviceBuffer<char> workspace(cuda::reorganize_tokens_workspace<float, float>(sizes));
    cuda::reorganize_tokens<float, float>(sizes, {device_x.data(), 65536, 1},
                                          {device_scores.data(), 65536, 1}, out.data(), kept.data(),
                                          workspace.data(), test_stream());
    Buffer<float> expected(sizes.out_tokens());
    Buffer<int64_t> expected_kept(sizes.keep);
    cpu::reorganize_tokens<float, float>(sizes, {x.data.get(), 65536, 1}, {scores.data.get(), 65536, 1},
                                         expected.data.get(), expected_kept.data.get(), serial_executor());
    CHECK(same_bits(kept.read(), expected_kept));
    check_close(out.read(), expected, tolerance<float>() * 2);
  }
}

}  // namespace
}  // namespace evit::tests
