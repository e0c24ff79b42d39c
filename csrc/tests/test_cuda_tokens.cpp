// The CUDA kernels for tokens against those of the CPU: gather, scatter, fuse and restore, with their
// gradients; and all of them wherever tensors lie.
#include <algorithm>

#include "../evit/add_reorganize_norm.h"
#include "../evit/fuse_tokens.h"
#include "../evit/gather_tokens.h"
#include "../evit/restore_tokens.h"
#include "../evit/scatter_tokens.h"
#include "cuda_tokens.h"

namespace evit::tests {
namespace {

struct Index {
  Buffer<int64_t> host;
  DeviceBuffer<int64_t> device;
  int64_t count;

  // Every second element is one.
  Index(const Shape& s, uint32_t seed) : host(values(s, seed)), device(host), count(s.count) {}
  static Buffer<int64_t> values(const Shape& s, uint32_t seed) {
    std::mt19937 generator(seed);
    Buffer<int64_t> index(s.batch * s.count * 2);
    for (int64_t i = 0; i < index.size; ++i)
      index[i] = i % 2 ? -1000 : static_cast<int64_t>(generator() % s.tokens);
    return index;
  }
  TokenIndex cpu() const { return {host.data.get(), count * 2, 2}; }
  TokenIndex cuda() const { return {device.data(), count * 2, 2}; }
};

template <typename T>
void gather_and_scatter(const Shape& s) {
  const GatherSizes sizes = {s.batch, s.tokens, s.count, s.channels};
  const Input<T> x(s, s.tokens, 1), small(s, s.count, 2);
  const Index index(s, 3);
  const auto [gathered, scattered] = same_every_time([&] {
    DeviceBuffer<T> gather(s.batch * s.count * s.channels), scatter(s.batch * s.tokens * s.channels);
    cuda::gather_tokens<T>(sizes, x.cuda(), index.cuda(), gather.data(), test_stream());
    cuda::scatter_tokens<T>(sizes, small.cuda(), index.cuda(), scatter.data(), test_stream());
    return std::tuple(gather.read(), scatter.read());
  });
  Buffer<T> expected(gathered.size), sums(scattered.size);
  cpu::gather_tokens<T>(sizes, x.cpu(), index.cpu(), expected.data.get(), serial_executor());
  cpu::scatter_tokens<T>(sizes, small.cpu(), index.cpu(), sums.data.get(), serial_executor());
  CHECK(same_bits(gathered, expected));
  CHECK(same_bits(scattered, sums));  // the same sums in the same order
}

template <typename T>
void fuse(const Shape& s, bool exact = false) {
  using A = accumulate_t<T>;
  const GatherSizes sizes = {s.batch, s.tokens, s.count, s.channels};
  const Input<T> x(s, s.tokens, 4, exact), grad(s, 1, 5, exact);
  const Index index(s, 6);
  const auto weights = values<A>(s.batch * s.tokens * 3, 7, exact, true);
  const DeviceBuffer<A> device_weights(weights);
  const int64_t stride = s.tokens * 3;
  const auto [out, grad_x, grad_weights] = same_every_time([&] {
    DeviceBuffer<T> sum(s.batch * s.channels), dx(s.batch * s.tokens * s.channels);
    DeviceBuffer<A> dw(s.batch * s.tokens);
    const Tokens<A> view = {device_weights.data(), stride, 3};
    cuda::fuse_tokens<T>(sizes, x.cuda(), view, index.cuda(), sum.data(), test_stream());
    cuda::fuse_tokens_backward<T>(sizes, grad.device.data(), grad.row, x.cuda(), view, index.cuda(),
                                  dx.data(), dw.data(), test_stream());
    return std::tuple(sum.read(), dx.read(), dw.read());
  });
  Buffer<T> sum(out.size), dx(grad_x.size);
  Buffer<A> dw(grad_weights.size);
  const Tokens<A> view = {weights.data.get(), stride, 3};
  cpu::fuse_tokens<T>(sizes, x.cpu(), view, index.cpu(), sum.data.get(), serial_executor());
  cpu::fuse_tokens_backward<T>(sizes, grad.host.data.get(), grad.row, x.cpu(), view, index.cpu(),
                               dx.data.get(), dw.data.get(), serial_executor());
  if (exact) CHECK(all_same_bits(std::tie(out, grad_x, grad_weights), std::tie(sum, dx, dw)));
  check_close(out, sum, tolerance<T>() * 2, 1);
  check_close(grad_x, dx, tolerance<T>() * 2);
  check_close(grad_weights, dw, tolerance<A>() * 2, 1);
}

enum class Fill { zeros, fused, given };

template <typename T>
Tokens<T> fill_view(Fill fill, const RestoreSizes& sizes, const Tokens<T>& tokens, const Tokens<T>& given) {
  if (fill == Fill::given) return given;
  if (fill == Fill::zeros) return {nullptr, 0, 0};
  return {tokens.row(0, sizes.in_tokens() - 1), tokens.stride_b, 0};
}

template <typename T>
void restore(const RestoreSizes& sizes, Fill fill, int64_t padding, uint32_t seed, bool exact = false) {
  const auto [batch, num_tokens, prefix, keep, channels, fused] = sizes;
  const bool fill_fused = fill == Fill::fused;
  const Shape shape = {batch, num_tokens, channels, keep, padding};
  const Input<T> tokens(shape, sizes.in_tokens(), seed), filling(shape, num_tokens, seed + 1),
      grad(shape, num_tokens, seed + 2, exact);
  const auto kept = random_kept(batch, keep, sizes.patches(), seed);
  const DeviceBuffer<int64_t> device_kept(kept);
  const auto [restored, grad_tokens] = same_every_time([&] {
    DeviceBuffer<T> out(batch * num_tokens * channels), dx(batch * sizes.in_tokens() * channels);
    DeviceBuffer<char> workspace(cuda::restore_tokens_backward_workspace<T>(sizes, fill_fused));
    cuda::restore_tokens<T>(sizes, tokens.cuda(), device_kept.data(),
                            fill_view(fill, sizes, tokens.cuda(), filling.cuda()), out.data(), test_stream());
    cuda::restore_tokens_backward<T>(sizes, fill_fused, grad.cuda(), device_kept.data(), dx.data(),
                                     workspace.data(), test_stream());
    return std::tuple(out.read(), dx.read());
  });
  Buffer<T> out(restored.size), dx(grad_tokens.size);
  cpu::restore_tokens<T>(sizes, tokens.cpu(), kept.data.get(),
                         fill_view(fill, sizes, tokens.cpu(), filling.cpu()), out.data.get(),
                         serial_executor());
  cpu::restore_tokens_backward<T>(sizes, fill_fused, grad.cpu(), kept.data.get(), dx.data.get(),
                                  serial_executor());
  CHECK(same_bits(restored, out));
  if (exact || !fill_fused) CHECK(same_bits(grad_tokens, dx));
  check_close(grad_tokens, dx, tolerance<T>() * 2, 1);
  // What is copied is copied to the bit.
  for (int64_t b = 0; b < batch && channels > 0; ++b)
    CHECK(std::memcmp(&grad_tokens[b * sizes.in_tokens() * channels], &dx[b * sizes.in_tokens() * channels],
                      static_cast<size_t>((prefix + keep) * channels) * sizeof(T)) == 0);
}

TEST(cuda_gather_and_scatter_agree) {
  for (const Shape& shape : kShapes) {
#define CALL(T) gather_and_scatter<T>(shape);
    FOR_EACH_TYPE(CALL)
#undef CALL
  }
}

TEST(cuda_fuse_agrees) {
  for (const Shape& shape : kShapes) {
#define CALL(T) fuse<T>(shape);
    FOR_EACH_TYPE(CALL)
#undef CALL
  }
}

TEST(cuda_restore_agrees) {
  uint32_t seed = 500;
  for (const int64_t prefix : {0, 1, 5})
    for (const Shape& shape : kShapes)
      for (const bool fused : {true, false})
        for (const Fill fill : {Fill::zeros, Fill::fused, Fill::given}) {
          const int64_t patches = shape.tokens - prefix, keep = std::min(shape.count, patches);
          if (patches < 0 || (fill == Fill::fused && (!fused || keep == patches))) continue;
          const RestoreSizes sizes = {shape.batch, shape.tokens, prefix, keep, shape.channels, fused};
#define CALL(T) restore<T>(sizes, fill, shape.padding, ++seed);
          FOR_EACH_TYPE(CALL)
#undef CALL
        }
}

// Partial sums; kept tokens that are looked through and, where there are many, searched among.
TEST(cuda_restore_agrees_on_long_sequences) {
  restore<BFloat16>({2, 1300, 1, 700, 8, true}, Fill::fused, 0, 801);
  restore<float>({1, 1537, 2, 100, 5, true}, Fill::fused, 1, 802);
  restore<Half>({1, 1030, 0, 0, 16, true}, Fill::fused, 0, 803);
  restore<double>({1, 2600, 1, 2598, 2, true}, Fill::fused, 0, 804);
  restore<float>({1, 4000, 1, 1700, 1, true}, Fill::fused, 0, 805);
  restore<float>({1, 2600, 1, 2300, 1, false}, Fill::given, 0, 806);
  // As long as one sum takes them, and one more.
  restore<float>({1, 1024, 1, 300, 8, true}, Fill::fused, 0, 807);
  restore<float>({1, 1025, 1, 300, 8, true}, Fill::fused, 0, 808);
}

// More indices than a block has threads; and three tokens, each with many.
TEST(cuda_long_indices_agree) {
  for (const Shape& shape : {Shape{1, 400, 3, 600, 1}, Shape{2, 3, 8, 300, 0}}) {
#define CALL(T) gather_and_scatter<T>(shape), fuse<T>(shape);
    FOR_EACH_TYPE(CALL)
#undef CALL
  }
}

// Rounded once, from sums that are exact.
TEST(cuda_exact_sums_have_the_bits_of_the_cpu) {
#define CALL(T)                                                    \
  fuse<T>({2, 129, 64, 57, 0}, true);                              \
  restore<T>({2, 40, 1, 20, 24, true}, Fill::fused, 0, 405, true); \
  restore<T>({2, 1100, 1, 500, 8, true}, Fill::fused, 0, 407, true);
  FOR_EACH_TYPE(CALL)
#undef CALL
}

// Vectors are read where tensors are aligned, elements where they are not: the sums are the same.
template <typename T>
void lies_anywhere() {
  using A = accumulate_t<T>;
  const ReorganizeSizes sizes = {2, 21, 1, 9, 24, true};
  const RestoreSizes restoring = {2, 21, 1, 9, 24, true};
  const GatherSizes gather = {2, 21, 15, 24};
  const Shape shape = {2, 21, 24, 15, 0};
  const auto x = random_values<T>(2 * 21 * 24, 1), y = random_values<T>(2 * 21 * 24, 2),
             weight = random_values<T>(24, 3), bias = random_values<T>(24, 4);
  const auto scores = random_values<A>(2 * 21, 5);
  const DeviceBuffer<A> device_scores(scores), ds(2 * 20), dw(2 * 21);
  const DeviceBuffer<int64_t> kept(2 * 9);
  const Index index(shape, 6);
  same_wherever_tensors_lie(7, [&](const std::vector<Place>& at) {
    // y serves as the branch, as the gradient of the tokens and as what is scattered.
    const Placed<T> first(x, 21, 24, at[0]), second(y, 21, 24, at[1]);
    const DeviceBuffer<T> w(weight, at[2].offset), b(bias, at[3].offset), out(2 * 11 * 24, at[4].offset),
        sum(2 * 11 * 24, at[4].offset), norm(2 * 11 * 24, at[5].offset), gathered(2 * 15 * 24, at[6].offset),
        scattered(2 * 21 * 24, at[6].offset), fused(2 * 24), fused_dx(2 * 21 * 24, at[6].offset),
        dx(2 * 21 * 24, at[6].offset), restored(2 * 21 * 24, at[4].offset),
        refilled(2 * 21 * 24, at[5].offset), restored_dx(2 * 11 * 24, at[6].offset);
    const Tokens<A> view = {device_scores.data(), 21, 1};
    const Stream stream = test_stream();
    cuda::reorganize_tokens<T, A>(sizes, first.view, view, out.data(), kept.data(), nullptr, stream);
    cuda::add_reorganize_norm<T, A>(sizes, first.view, second.view, view, {w.data(), b.data(), 1}, sum.data(),
                                    norm.data(), kept.data(), nullptr, stream);
    cuda::reorganize_tokens_backward<T>(sizes, second.view, first.view, view, kept.data(), dx.data(),
                                        ds.data(), 0, stream);
    cuda::gather_tokens<T>(gather, first.view, index.cuda(), gathered.data(), stream);
    cuda::scatter_tokens<T>(gather, second.view, index.cuda(), scattered.data(), stream);
    cuda::fuse_tokens<T>(gather, first.view, view, index.cuda(), fused.data(), stream);
    cuda::fuse_tokens_backward<T>(gather, second.view.data, second.view.stride_b, first.view, view,
                                  index.cuda(), fused_dx.data(), dw.data(), stream);
    // The first 11 rows of x are the tokens, y is the filling; then the gradient.
    cuda::restore_tokens<T>(restoring, first.view, kept.data(),
                            fill_view(Fill::fused, restoring, first.view, first.view), restored.data(),
                            stream);
    cuda::restore_tokens<T>(restoring, first.view, kept.data(), second.view, refilled.data(), stream);
    cuda::restore_tokens_backward<T>(restoring, true, second.view, kept.data(), restored_dx.data(), nullptr,
                                     stream);
    return std::tuple(out.read(), sum.read(), norm.read(), dx.read(), ds.read(), gathered.read(),
                      scattered.read(), fused.read(), fused_dx.read(), dw.read(), restored.read(),
                      refilled.read(), restored_dx.read());
  });
}

TEST(cuda_tokens_may_lie_anywhere) {
#define CALL(T) lies_anywhere<T>();
  FOR_EACH_TYPE(CALL)
#undef CALL
}

}  // namespace
}  // namespace evit::tests
