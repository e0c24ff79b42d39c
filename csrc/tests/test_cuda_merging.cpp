// The CUDA kernels of bipartite_matching and merge_tokens against those of the CPU.
#include "../evit/bipartite_matching.h"
#include "../evit/merge_tokens.h"
#include "cuda_tokens.h"

namespace evit::tests {
namespace {

template <typename T>
void merge(const MergeSizes& s, int64_t padding, bool exact = false) {
  using A = accumulate_t<T>;
  const Shape shape = {s.batch, s.tokens, s.channels, 0, padding};
  const Input<T> x(shape, s.tokens, 1, exact), grad(shape, s.out_tokens(), 2, exact);
  std::mt19937 generator(3);
  Buffer<int64_t> index(s.batch * s.patches() * 2);  // every second element is an owner
  for (int64_t i = 0; i < index.size; ++i)
    index[i] = i % 2 ? -1000 : static_cast<int64_t>(generator() % s.owners);
  Buffer<A> weights(s.batch * s.patches() * 3);
  for (int64_t i = 0; i < weights.size; ++i) weights[i] = static_cast<A>(1 + generator() % 5);
  const auto grad_totals = random_values<A>(s.batch * s.owners, 4);
  const DeviceBuffer<int64_t> device_index(index);
  const DeviceBuffer<A> device_weights(weights), device_totals(grad_totals);
  const int64_t patches = s.patches();
  const auto [out, totals, dx, dw] = same_every_time([&] {
    DeviceBuffer<T> merged(s.batch * s.out_tokens() * s.channels), grad_x(s.batch * s.tokens * s.channels);
    DeviceBuffer<A> sums(s.batch * s.owners), grad_weights(s.batch * patches);
    const TokenIndex owner = {device_index.data(), patches * 2, 2};
    const Tokens<A> weight = {device_weights.data(), patches * 3, 3};
    cuda::merge_tokens<T>(s, x.cuda(), owner, weight, merged.data(), sums.data(), test_stream());
    cuda::merge_tokens_backward<T>(s, grad.cuda(), {device_totals.data(), s.owners, 1}, x.cuda(), owner,
                                   weight, grad_x.data(), grad_weights.data(), test_stream());
    return std::tuple(merged.read(), sums.read(), grad_x.read(), grad_weights.read());
  });
  Buffer<T> merged(out.size), grad_x(dx.size);
  Buffer<A> sums(totals.size), grad_weights(dw.size);
  const TokenIndex owner = {index.data.get(), patches * 2, 2};
  const Tokens<A> weight = {weights.data.get(), patches * 3, 3};
  cpu::merge_tokens<T>(s, x.cpu(), owner, weight, merged.data.get(), sums.data.get(), serial_executor());
  cpu::merge_tokens_backward<T>(s, grad.cpu(), {grad_totals.data.get(), s.owners, 1}, x.cpu(), owner, weight,
                                grad_x.data.get(), grad_weights.data.get(), serial_executor());
  CHECK(same_bits(totals, sums));  // sums of whole numbers
  CHECK(same_bits(dx, grad_x));    // a product each
  check_close(out, merged, tolerance<T>() * 2, 1);
  check_close(dw, grad_weights, tolerance<A>() * 2, 10);
}

TEST(cuda_merge_agrees) {
  for (const int64_t padding : {0, 3})
    for (const MergeSizes& sizes : {MergeSizes{2, 8, 1, 4, 5},
                                    {1, 1, 0, 1, 1},
                                    {3, 9, 2, 7, 16},
                                    {0, 3, 1, 2, 2},
                                    {2, 5, 1, 3, 0},
                                    {2, 3, 3, 2, 7},
                                    {2, 6, 0, 40, 136},
                                    {2, 129, 1, 60, 64},
                                    {1, 400, 2, 3, 264}}) {
#define CALL(T) merge<T>(sizes, padding);
      FOR_EACH_TYPE(CALL)
#undef CALL
    }
}

// Whole numbers, so that no sum is rounded: the same partners, ties included.
template <typename T>
void match(const MatchingSizes& s, int64_t padding) {
  std::mt19937 generator(5);
  const int64_t stride = s.channels + padding;
  Buffer<T> values(s.batch * s.tokens * s.heads * stride);
  for (int64_t i = 0; i < values.size; ++i) values[i] = from_double<T>(generator() % 2 ? 1 : -1);
  const DeviceBuffer<T> device(values);
  const auto view = [&](const T* data) {
    return Keys<T>{data, s.tokens * s.heads * stride, stride, s.heads * stride};
  };
  const auto [kept, owner] = same_every_time([&] {
    DeviceBuffer<int64_t> stays(s.batch * s.out), place(s.batch * s.tokens);
    DeviceBuffer<char> workspace(cuda::bipartite_matching_workspace<T>(s));
    cuda::bipartite_matching<T>(s, view(device.data()), stays.data(), place.data(), workspace.data(),
                                test_stream());
    return std::tuple(stays.read(), place.read());
  });
  Buffer<int64_t> stays(kept.size), place(owner.size);
  cpu::bipartite_matching<T>(s, view(values.data.get()), stays.data.get(), place.data.get(),
                             serial_executor());
  CHECK(same_bits(kept, stays));
  CHECK(same_bits(owner, place));
}

// Of as many channels as a square has, all of which are 1 or -1, lengths and cosines are exact.
TEST(cuda_matching_agrees) {
  for (const int64_t padding : {0, 1})
    for (const MatchingSizes& sizes : {MatchingSizes{2, 1, 9, 4, 6},
                                       {1, 1, 2, 1, 1},
                                       {3, 1, 7, 16, 4},
                                       {0, 2, 6, 4, 4},
                                       {2, 1, 66, 64, 40},
                                       {1, 1, 130, 64, 65},
                                       {2, 1, 77, 256, 50},
                                       {1, 1, 700, 16, 400}}) {
#define CALL(T) match<T>(sizes, padding);
      FOR_EACH_TYPE(CALL)
#undef CALL
    }
}

// Several heads, whose means are rounded: random keys have no ties.
TEST(cuda_matching_agrees_with_heads) {
  const MatchingSizes s = {2, 3, 41, 24, 25};
  const auto values = random_values<float>(s.batch * s.heads * s.tokens * s.channels, 6);
  const DeviceBuffer<float> device(values);
  const int64_t head = s.tokens * s.channels;
  DeviceBuffer<int64_t> stays(s.batch * s.out), place(s.batch * s.tokens);
  DeviceBuffer<char> workspace(cuda::bipartite_matching_workspace<float>(s));
  cuda::bipartite_matching<float>(s, {device.data(), s.heads * head, head, s.channels}, stays.data(),
                                  place.data(), workspace.data(), test_stream());
  Buffer<int64_t> kept(s.batch * s.out), owner(s.batch * s.tokens);
  cpu::bipartite_matching<float>(s, {values.data.get(), s.heads * head, head, s.channels}, kept.data.get(),
                                 owner.data.get(), serial_executor());
  CHECK(same_bits(stays.read(), kept));
  CHECK(same_bits(place.read(), owner));
}

}  // namespace
}  // namespace evit::tests
