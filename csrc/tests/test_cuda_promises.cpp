// What the CUDA kernels promise beyond their results, and only the host that stands in for a device can show:
// the same sums on every device, refusals, launches on the right device.
#include <functional>
#include <limits>

#include "../evit/attention_with_scores.h"
#include "../evit/class_attention.h"
#include "../evit/fuse_tokens.h"
#include "../evit/gather_tokens.h"
#include "../evit/mean_attention.h"
#include "../evit/merge_tokens.h"
#include "../evit/reorganize_tokens.h"
#include "../evit/restore_tokens.h"
#include "../evit/scatter_tokens.h"
#include "device.h"

namespace evit::tests {
namespace {

// A result does not depend on the device, nor on what else is in the batch.
TEST(cuda_sums_are_the_same_on_every_device_and_in_every_batch) {
  const int64_t patches = 70, channels = 384;
  const ReorganizeSizes sizes = {3, patches + 1, 1, 20, channels, true};
  const auto x = random_values<float>(3 * (patches + 1) * channels, 1),
             scores = random_values<float>(3 * patches, 3);
  const auto run = [&](int64_t batch, int multiprocessors) {
    cuda_on_host::device().multiprocessors = multiprocessors;
    ReorganizeSizes part = sizes;
    part.batch = batch;
    DeviceBuffer<float> out(batch * part.out_tokens() * channels);
    DeviceBuffer<int64_t> kept(batch * part.keep);
    cuda::reorganize_tokens<float, float>(part, {x.data.get(), (patches + 1) * channels, channels},
                                          {scores.data.get(), patches, 1}, out.data(), kept.data(), nullptr,
                                          test_stream());
    return out.read();
  };
  // Slices of 48, 16 and 8 vectors.
  const Buffer<float> small = run(3, 1), medium = run(3, 8), large = run(3, 1000), one = run(1, 1000);
  CHECK(same_bits(small, medium));
  CHECK(same_bits(small, large));
  CHECK(std::memcmp(small.data.get(), one.data.get(), static_cast<size_t>(one.size) * sizeof(float)) == 0);
  cuda_on_host::device() = {};
}

// In a small batch of long sequences every head has a block.
template <typename T>
void class_attention_is_the_same(int64_t heads, int64_t tokens, int64_t channels) {
  const int64_t width = heads * channels, row = 2 * width;
  const auto qk = random_values<T>(9 * tokens * row, 1);
  const auto run = [&](int64_t batch, int multiprocessors) {
    cuda_on_host::device().multiprocessors = multiprocessors;
    const ClassAttentionSizes sizes = {batch, heads, tokens, channels, 0.1};
    const T* q = qk.data.get();
    const DeviceBuffer<float> scores(batch * tokens);
    const int64_t bytes = cuda::class_attention_workspace<T>(sizes, false);
    CHECK((bytes > 0) == (batch < 9));
    const DeviceBuffer<char> workspace(bytes);
    cuda::class_attention<T>(sizes, {q, tokens * row, channels, q + width, tokens * row, channels, row},
                             scores.data(), workspace.data(), test_stream());
    return scores.read();
  };
  const Buffer<float> all = run(9, 100), some = run(9, 1), one = run(1, 100);
  CHECK(same_bits(all, some));
  CHECK(std::memcmp(all.data.get(), one.data.get(), static_cast<size_t>(tokens) * sizeof(float)) == 0);
  cuda_on_host::device() = {};
}

TEST(cuda_class_attention_is_the_same_in_every_batch) {
  class_attention_is_the_same<BFloat16>(4, 512, 128);
  class_attention_is_the_same<float>(3, 171, 256);
}

// From 32 to 128 rows a block, of queries and of keys.
template <typename T>
void mean_attention_is_the_same() {
  using A = accumulate_t<T>;
  const int64_t heads = 2, tokens = 150, channels = 40, width = heads * channels, row = 2 * width;
  const auto qk = random_values<T>(3 * tokens * row, 1);
  const auto grads = random_values<A>(3 * tokens, 2);
  const auto run = [&](int64_t batch, int multiprocessors) {
    cuda_on_host::device().multiprocessors = multiprocessors;
    const MeanAttentionSizes sizes = {batch, heads, tokens, tokens, channels, 0.2};
    const T* q = qk.data.get();
    const MeanAttentionInput<T> input = {q,         tokens * row, channels, row,
                                         q + width, tokens * row, channels, row};
    const DeviceBuffer<A> scores(batch * tokens);
    const DeviceBuffer<T> grad_q(batch * tokens * width), grad_k(batch * tokens * width);
    const DeviceBuffer<char> workspace(cuda::mean_attention_workspace<T>(sizes)),
        backward_workspace(cuda::mean_attention_backward_workspace<T>(sizes));
    cuda::mean_attention<T>(sizes, input, scores.data(), workspace.data(), test_stream());
    cuda::mean_attention_backward<T>(sizes, input, {grads.data.get(), tokens, 1}, grad_q.data(),
                                     grad_k.data(), backward_workspace.data(), test_stream());
    return std::tuple(scores.read(), grad_q.read(), grad_k.read());
  };
  const auto few = run(3, 1), many = run(3, 1000), one = run(1, 1);
  CHECK(all_same_bits(few, many));
  const auto begins_with = [](const auto& all, const auto& some) {
    return std::memcmp(all.data.get(), some.data.get(), static_cast<size_t>(some.size) * sizeof(some[0])) ==
           0;
  };
  CHECK(begins_with(std::get<0>(few), std::get<0>(one)) && begins_with(std::get<1>(few), std::get<1>(one)) &&
        begins_with(std::get<2>(few), std::get<2>(one)));
  cuda_on_host::device() = {};
}

TEST(cuda_mean_attention_is_the_same_on_every_device_and_in_every_batch) {
  mean_attention_is_the_same<BFloat16>();
  mean_attention_is_the_same<float>();
}

// Partial sums, too.
TEST(cuda_gradients_of_restored_tokens_are_the_same_on_every_device_and_in_every_batch) {
  for (const int64_t num_tokens : {int64_t{71}, int64_t{1100}}) {
    const int64_t channels = 200, keep = 20;
    const auto grad = random_values<float>(3 * num_tokens * channels, 1);
    const auto kept = random_kept(3, keep, num_tokens - 1, 2);
    const auto run = [&](int64_t batch, int multiprocessors) {
      cuda_on_host::device().multiprocessors = multiprocessors;
      const RestoreSizes sizes = {batch, num_tokens, 1, keep, channels, true};
      DeviceBuffer<float> grad_tokens(batch * sizes.in_tokens() * channels);
      DeviceBuffer<char> workspace(cuda::restore_tokens_backward_workspace<float>(sizes, true));
      cuda::restore_tokens_backward<float>(sizes, true, {grad.data.get(), num_tokens * channels, channels},
                                           kept.data.get(), grad_tokens.data(), workspace.data(),
                                           test_stream());
      return grad_tokens.read();
    };
    const Buffer<float> small = run(3, 1), large = run(3, 1000), one = run(1, 1000);
    CHECK(same_bits(small, large));
    CHECK(std::memcmp(small.data.get(), one.data.get(), static_cast<size_t>(one.size) * sizeof(float)) == 0);
    cuda_on_host::device() = {};
  }
}

// The device and the batch decide how many queries a block takes, from 16 to 128 of them. The tests of
// results run with the fewest; here it is shown, under every order of the threads, that it makes no
// difference.
TEST(cuda_attention_is_the_same_on_every_device_and_in_every_batch) {
  for (const auto& [num_tokens, channels] :
       {std::pair<int64_t, int64_t>{197, 64}, {129, 128}, {100, 32}, {17, 64}}) {
    const int64_t heads = 2, width = heads * channels;
    const auto qkv = random_values<BFloat16>(3 * num_tokens * 3 * width, 1);
    const DeviceBuffer<BFloat16> device_qkv(qkv);
    const auto run = [&, num_tokens = num_tokens, channels = channels](int64_t batch, int multiprocessors) {
      cuda_on_host::device().multiprocessors = multiprocessors;
      return same_every_time([&] {
        const AttentionWithScoresSizes sizes = {batch, num_tokens, heads, channels, 0.1};
        const DeviceBuffer<BFloat16> out(batch * num_tokens * width);
        const DeviceBuffer<float> scores(batch * num_tokens);
        const DeviceBuffer<char> workspace(cuda::attention_with_scores_workspace(sizes));
        cuda::attention_with_scores<BFloat16>(sizes, {device_qkv.data(), num_tokens * 3 * width, 3 * width},
                                              {}, out.data(), scores.data(), workspace.data(), test_stream());
        return std::tuple(out.read(), scores.read());
      });
    };
    const auto few = run(3, 1000);
    for (const int multiprocessors : {1, 10, 20, 30}) CHECK(all_same_bits(few, run(3, multiprocessors)));
    const auto one = run(1, 1);
    CHECK(std::memcmp(std::get<0>(few).data.get(), std::get<0>(one).data.get(),
                      static_cast<size_t>(std::get<0>(one).size) * sizeof(BFloat16)) == 0);
    CHECK(std::memcmp(std::get<1>(few).data.get(), std::get<1>(one).data.get(),
                      static_cast<size_t>(std::get<1>(one).size) * sizeof(float)) == 0);
    cuda_on_host::device() = {};
  }
}

// Whatever kept holds: the sanitizer would see an access out of bounds.
TEST(cuda_restore_stops_at_wrong_kept_tokens) {
  const int64_t far = int64_t{1} << 40, most = std::numeric_limits<int64_t>::max();
  for (const int64_t num_tokens : {int64_t{8}, int64_t{2500}}) {
    const int64_t keep = num_tokens == 8 ? 3 : 1500;
    const RestoreSizes sizes = {1, num_tokens, 1, keep, 1, true};
    const DeviceBuffer<float> tokens(random_values<float>(num_tokens, 1)), out(num_tokens),
        grad_tokens(sizes.in_tokens());
    const DeviceBuffer<char> workspace(cuda::restore_tokens_backward_workspace<float>(sizes, true));
    const Tokens<float> view = {tokens.data(), num_tokens, 1};
    for (const int64_t place : {int64_t{0}, keep / 2, keep - 1})
      for (const int64_t wrong : {num_tokens - 1, int64_t{-1}, far, -far, most, -most - 1}) {
        Buffer<int64_t> kept = random_kept(1, keep, num_tokens - 1, 3);
        kept[place] = wrong;
        for (const auto& launch : std::vector<std::function<void()>>{
                 [&] {
                   cuda::restore_tokens<float>(sizes, view, kept.data.get(), view, out.data(), test_stream());
                 },
                 [&] {
                   cuda::restore_tokens_backward<float>(sizes, true, view, kept.data.get(),
                                                        grad_tokens.data(), workspace.data(), test_stream());
                 },
                 [&] {
                   cuda::restore_tokens_backward<float>(sizes, false, view, kept.data.get(),
                                                        grad_tokens.data(), nullptr, test_stream());
                 }}) {
          const std::string message =
              cuda_on_host::expect_error([&] { CHECK(throws<std::runtime_error>(launch)); });
          CHECK(!message.empty());
        }
      }
    Buffer<int64_t> twice = random_kept(1, keep, num_tokens - 1, 3);
    twice[keep - 1] = twice[keep - 2];
    const std::string message = cuda_on_host::expect_error([&] {
      CHECK(throws<std::runtime_error>([&] {
        cuda::restore_tokens<float>(sizes, view, twice.data.get(), view, out.data(), test_stream());
      }));
    });
    CHECK(!message.empty());
  }
}

TEST(cuda_index_out_of_range_stops_the_kernel) {
  const GatherSizes sizes = {1, 4, 2, 8};
  const MergeSizes merging = {1, 4, 2, 4, 8};
  const auto x = random_values<float>(32, 1);
  for (const int64_t wrong : {int64_t{4}, int64_t{-1}, int64_t{1} << 40}) {
    const int64_t index[] = {3, wrong};
    const TokenIndex view = {index, 2, 1};
    float out[64], grad_weights[4], totals[4];
    const Tokens<float> tokens = {x.data.get(), 32, 8};
    for (const auto& launch : std::vector<std::function<void()>>{
             [&] { cuda::gather_tokens<float>(sizes, tokens, view, out, test_stream()); },
             [&] { cuda::scatter_tokens<float>(sizes, tokens, view, out, test_stream()); },
             [&] { cuda::fuse_tokens<float>(sizes, tokens, tokens, view, out, test_stream()); },
             [&] { cuda::merge_tokens<float>(merging, tokens, view, tokens, out, totals, test_stream()); },
             [&] {
               cuda::merge_tokens_backward<float>(merging, tokens, tokens, tokens, view, tokens, out,
                                                  grad_weights, test_stream());
             },
             [&] {
               cuda::fuse_tokens_backward<float>(sizes, x.data.get(), 8, tokens, tokens, view, out,
                                                 grad_weights, test_stream());
             }}) {
      const std::string message =
          cuda_on_host::expect_error([&] { CHECK(throws<std::runtime_error>(launch)); });
      CHECK(!message.empty());
    }
  }
}

TEST(cuda_sizes_beyond_32_bits_are_refused) {
  const int64_t large = int64_t{1} << 31;
  const Tokens<float> tokens = {nullptr, 1, 1};
  const TokenIndex index = {nullptr, 1, 1};
  const Stream stream = test_stream();
  CHECK(throws<std::length_error>([&] {
    cuda::reorganize_tokens<float, float>({1, large, 1, 1, 1, true}, tokens, tokens, nullptr, nullptr,
                                          nullptr, stream);
  }));
  CHECK(throws<std::length_error>([&] {
    cuda::restore_tokens<float>({1, large, 1, 1, 1, true}, tokens, nullptr, tokens, nullptr, stream);
  }));
  CHECK(throws<std::length_error>([&] {
    cuda::restore_tokens_backward<float>({1, large, 1, 1, 1, true}, true, tokens, nullptr, nullptr, nullptr,
                                         stream);
  }));
  CHECK(throws<std::length_error>(
      [&] { cuda::gather_tokens<float>({1, 1, large, 1}, tokens, index, nullptr, stream); }));
  CHECK(throws<std::length_error>([&] {
    cuda::attention_with_scores<Half>({1, large, 1, 64, 1.0}, {nullptr, 8, 8}, {}, nullptr, nullptr, nullptr,
                                      stream);
  }));
  for (const MeanAttentionSizes& sizes :
       {MeanAttentionSizes{1, 1, large, 1, 1, 1.0}, {1, 1, 1, large, 1, 1.0}})
    CHECK(throws<std::length_error>([&] {
      cuda::mean_attention<float>(sizes, {nullptr, 1, 1, 1, nullptr, 1, 1, 1}, nullptr, nullptr, stream);
    }));
  CHECK(throws<std::length_error>([&] {  // blocks
    cuda::attention_with_scores<Half>({large / 8, 100, 8, 64, 1.0}, {nullptr, 8, 8}, {}, nullptr, nullptr,
                                      nullptr, stream);
  }));
  CHECK(throws<std::length_error>(  // sequences
      [&] { cuda::gather_tokens<float>({large, 1, 1, 1}, tokens, index, nullptr, stream); }));
}

TEST(cuda_launches_go_to_the_device_of_the_stream) {
  cuda_on_host::device().count = 2;
  const DeviceBuffer<float> out(1);
  const DeviceBuffer<int64_t> zero(Buffer<int64_t>(1));
  const auto gather = [&](int device) {
    cuda::gather_tokens<float>({0, 1, 1, 1}, {out.data(), 1, 1}, {zero.data(), 1, 1}, out.data(),
                               {device, nullptr});
  };
  gather(1);
  int current = -1;
  require(cudaGetDevice(&current));
  CHECK(current == 0);  // again
  CHECK(throws<std::runtime_error>([&] { gather(2); }));
  CHECK(cudaPeekAtLastError() == cudaSuccess);  // the error has been reported
  cuda_on_host::device() = {};
}

}  // namespace
}  // namespace evit::tests
