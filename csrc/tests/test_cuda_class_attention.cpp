// The CUDA kernels of class_attention against those of the CPU.
#include <algorithm>

#include "../evit/class_attention.h"
#include "device.h"

namespace evit::tests {
namespace {

// As in a packed qkv projection [B, N, 3, H, D]: q is its first row, k its second slice; `padding` elements
// lie between tokens.
template <typename T>
ClassAttentionInput<T> packed(const ClassAttentionSizes& sizes, int64_t padding, const T* qkv) {
  const int64_t row = 3 * sizes.heads * sizes.channels + padding, batch = sizes.tokens * row;
  return {qkv, batch, sizes.channels, qkv + sizes.heads * sizes.channels, batch, sizes.channels, row};
}

// log(sum exp(logits)) of every head, strided as in a tensor [B, H, 3].
template <typename T>
Buffer<accumulate_t<T>> log_of_sums(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input) {
  Buffer<accumulate_t<T>> result(sizes.batch * sizes.heads * 3);
  for (int64_t i = 0; i < sizes.batch * sizes.heads; ++i) {
    const T* q = input.query(i / sizes.heads, i % sizes.heads);
    const T* keys = input.keys(i / sizes.heads, i % sizes.heads);
    double sum = 0;
    for (int64_t n = 0; n < sizes.tokens; ++n) {
      double dot = 0;
      for (int64_t c = 0; c < sizes.channels; ++c)
        dot += to_double(q[c]) * to_double(keys[n * input.k_stride_n + c]);
      sum += std::exp(dot * sizes.scale);
    }
    for (int64_t j = 0; j < 3; ++j)
      result[3 * i + j] = static_cast<accumulate_t<T>>(j == 1 ? std::log(sum) : NAN);
  }
  return result;
}

// Random values; or small integers but for the first channel of q and k, which makes the logits of a head all
// so large, or with odd heads so small, that float does not hold their exponentials.
template <typename T>
Buffer<T> make_qkv(const ClassAttentionSizes& sizes, int64_t padding, bool extreme) {
  const int64_t heads = sizes.heads, row = 3 * heads * sizes.channels + padding;
  auto qkv = random_values<T>(sizes.batch * sizes.tokens * row, 11);
  if (!extreme) return qkv;
  for (int64_t i = 0; i < qkv.size; ++i) {
    const int64_t c = i % row, h = c / sizes.channels % heads, which = c / sizes.channels / heads;
    if (c % sizes.channels != 0)
      qkv[i] = from_double<T>(std::round(to_double(qkv[i])));
    else
      qkv[i] = from_double<T>(which == 1 && h % 2 != 0 ? -11 : 11);
  }
  return qkv;
}

template <typename T>
void agrees(const ClassAttentionSizes& sizes, int64_t padding, bool extreme = false) {
  using A = accumulate_t<T>;
  const auto qkv = make_qkv<T>(sizes, padding, extreme);
  const auto grad = random_values<A>(sizes.batch * sizes.tokens * 2, 12);  // every second element
  const ClassAttentionInput<T> on_cpu = packed(sizes, padding, static_cast<const T*>(qkv.data.get()));
  const auto logsumexp = log_of_sums(sizes, on_cpu);
  const DeviceBuffer<T> device_qkv(qkv);
  const DeviceBuffer<A> device_grad(grad), device_logsumexp(logsumexp);
  const int64_t queries = sizes.batch * sizes.heads * sizes.channels;

  const auto [scores, from_logsumexp, grad_q, grad_k] = same_every_time([&] {
    ClassAttentionInput<T> input = packed(sizes, padding, static_cast<const T*>(device_qkv.data()));
    DeviceBuffer<A> out(sizes.batch * sizes.tokens), out_again(sizes.batch * sizes.tokens);
    DeviceBuffer<T> dq(queries), dk(queries * sizes.tokens);
    DeviceBuffer<char> workspace(cuda::class_attention_workspace<T>(sizes, false));
    DeviceBuffer<A> backward_workspace(cuda::class_attention_backward_workspace<T>(sizes) /
                                       static_cast<int64_t>(sizeof(A)));
    cuda::class_attention<T>(sizes, input, out.data(), workspace.data(), test_stream());
    cuda::class_attention_backward<T>(sizes, input, device_grad.data(), sizes.tokens * 2, 2, dq.data(),
                                      dk.data(), backward_workspace.data(), test_stream());
    // On the host one block runs after the other: that each has a part of its own is seen by all being used.
    const Buffer<A> used = backward_workspace.read();
    CHECK(std::none_of(&used[0], &used[0] + used.size, [](A logit) { return std::isnan(logit); }));
    input.logsumexp = device_logsumexp.data() + 1;
    input.logsumexp_stride_b = 3 * sizes.heads;
    input.logsumexp_stride_h = 3;
    CHECK(cuda::class_attention_workspace<T>(sizes, true) == 0);
    cuda::class_attention<T>(sizes, input, out_again.data(), nullptr, test_stream());
    return std::tuple(out.read(), out_again.read(), dq.read(), dk.read());
  });

  Buffer<A> expected(scores.size);
  Buffer<T> dq(grad_q.size), dk(grad_k.size);
  cpu::class_attention<T>(sizes, on_cpu, expected.data.get(), serial_executor());
  cpu::class_attention_backward<T>(sizes, on_cpu, grad.data.get(), sizes.tokens * 2, 2, dq.data.get(),
                                   dk.data.get(), serial_executor());
  check_close(scores, expected, tolerance<A>() * 2);
  check_close(from_logsumexp, expected, tolerance<A>() * 4);
  // The gradients of all logits of a head sum up to nothing.
  check_close(grad_q, dq, tolerance<T>() * 2, extreme ? 1 : 0);
  check_close(grad_k, dk, tolerance<T>() * 2);
}

template <typename T>
void agrees_on_all_sizes() {
  for (const int64_t padding : {int64_t{0}, int64_t{1}})
    for (const ClassAttentionSizes& sizes : {ClassAttentionSizes{0, 2, 5, 4, 1.0},
                                             {1, 1, 1, 1, 1.0},
                                             {2, 3, 17, 5, 0.37},
                                             {1, 2, 197, 64, 0.125},
                                             {2, 7, 33, 16, 0.2},
                                             {1, 1, 70, 300, 0.05}})
      agrees<T>(sizes, padding);
}

TEST(cuda_class_attention_agrees) {
  agrees_on_all_sizes<float>();
  agrees_on_all_sizes<double>();
  agrees_on_all_sizes<Half>();
  agrees_on_all_sizes<BFloat16>();
}

// Neither logits nor gradients of a head fit into shared memory.
TEST(cuda_class_attention_agrees_on_long_sequences) {
  agrees<float>({1, 1, 12288, 4, 0.5}, 0);
  agrees<double>({2, 2, 6200, 2, 0.5}, 1);
  for (const int64_t padding : {0, 1}) {
    agrees<Half>({1, 13, 950, 8, 0.3}, padding);
    agrees<BFloat16>({1, 12, 1100, 8, 0.3}, padding);
    agrees<double>({1, 2, 3100, 2, 0.3}, padding);
  }
}

// So many bytes of keys that a small batch has a block for each head; and just too few.
TEST(cuda_class_attention_agrees_where_heads_have_blocks) {
  for (const int64_t padding : {0, 1}) {
    agrees<BFloat16>({1, 4, 512, 128, 0.1}, padding);
    agrees<float>({2, 3, 171, 256, 0.1}, padding);
  }
  agrees<double>({1, 2, 512, 64, 0.1}, 0);
  agrees<Half>({1, 4, 511, 128, 0.1}, 0);
  agrees<BFloat16>({1, 3, 683, 128, 1.0}, 0, true);
  CHECK(cuda::class_attention_workspace<BFloat16>({8, 4, 512, 128, 0.1}, false) > 0);
  for (const ClassAttentionSizes& sizes :
       {ClassAttentionSizes{9, 4, 512, 128, 0.1}, {8, 4, 511, 128, 0.1}, {8, 1, 2048, 128, 0.1}})
    CHECK(cuda::class_attention_workspace<BFloat16>(sizes, false) == 0);
}

// In 16 bits, the keys of a head beside its logits do not fit into shared memory.
TEST(cuda_class_attention_gradients_agree_on_long_sequences) {
  for (const int64_t padding : {0, 1}) {
    agrees<Half>({1, 1, 400, 64, 0.2}, padding);
    agrees<BFloat16>({1, 2, 390, 64, 0.2}, padding);
  }
}

// Channels of a head that are whole steps of the tensor cores, and some that are not.
TEST(cuda_class_attention_agrees_on_every_width) {
  for (const int64_t channels : {8, 24, 31, 32, 40, 63, 65, 72, 96, 128, 136})
    for (const int64_t tokens : {31, 32, 33}) {
      agrees<Half>({1, 2, tokens, channels, 0.2}, 0);
      agrees<BFloat16>({2, 1, tokens, channels, 0.2}, 1);
    }
}

// Sizes at which something only just does not fit into shared memory.
TEST(cuda_class_attention_agrees_where_shared_memory_ends) {
  agrees<float>({1, 1, 2457, 4, 0.5}, 0);  // the keys of a head beside its logits and partial sums
  agrees<float>({1, 400, 70, 1, 0.5}, 0);  // the logits of many heads
  const float logsumexp = 0;
  const ClassAttentionInput<float> input = {nullptr, 0, 0, nullptr, 0, 0, 0, &logsumexp};
  CHECK(throws<std::length_error>(
      [&] { cuda::class_attention<float>({1, 6145, 1, 1, 1}, input, nullptr, nullptr, test_stream()); }));
}

TEST(cuda_class_attention_agrees_on_extreme_logits) {
  agrees<float>({2, 2, 40, 8, 1.0}, 0, true);
  agrees<BFloat16>({1, 2, 70, 16, 1.0}, 1, true);
  agrees<float>({1, 2, 6200, 4, 1.0}, 0, true);
}

template <typename T>
void lies_anywhere() {
  using A = accumulate_t<T>;
  const ClassAttentionSizes sizes = {2, 3, 19, 16, 0.2};
  const auto q = random_values<T>(2 * 3 * 16, 1), k = random_values<T>(2 * 3 * 19 * 16, 2);
  const DeviceBuffer<A> grad(random_values<A>(2 * 19, 3)), scores(2 * 19);
  same_wherever_tensors_lie(3, [&](const std::vector<Place>& at) {
    const Placed<T> queries(q, 3, 16, at[0]), keys(k, 19, 16, at[1]);
    const DeviceBuffer<T> dq(q.size, at[2].offset), dk(k.size, at[2].offset);
    const ClassAttentionInput<T> input = {queries.view.data, queries.view.stride_b,  queries.view.stride_n,
                                          keys.view.data,    3 * keys.view.stride_b, keys.view.stride_b,
                                          keys.view.stride_n};
    cuda::class_attention<T>(sizes, input, scores.data(), nullptr, test_stream());
    cuda::class_attention_backward<T>(sizes, input, grad.data(), 19, 1, dq.data(), dk.data(), nullptr,
                                      test_stream());
    return std::tuple(scores.read(), dq.read(), dk.read());
  });
}

TEST(cuda_class_attention_tensors_may_lie_anywhere) {
  lies_anywhere<float>();
  lies_anywhere<double>();
  lies_anywhere<Half>();
  lies_anywhere<BFloat16>();
}

TEST(cuda_class_attention_gives_nan_where_the_cpu_does) {
  for (const double value : {double{NAN}, double{INFINITY}, -double{INFINITY}}) {
    const ClassAttentionSizes sizes = {2, 2, 40, 8, 1.0};
    auto qkv = random_values<float>(2 * 40 * 48, 3);
    for (int64_t n = 0; n < 40; ++n)
      if (std::isinf(value) && value < 0) qkv[n * 48 + 16] = static_cast<float>(value);  // all of a head's
    qkv[0] = 1;
    qkv[7 * 48 + 16] = static_cast<float>(value);  // of one sequence and head
    const DeviceBuffer<float> device_qkv(qkv), out(80);
    cuda::class_attention<float>(sizes, packed<float>(sizes, 0, device_qkv.data()), out.data(), nullptr,
                                 test_stream());
    const Buffer<float> scores = out.read();
    Buffer<float> expected(80);
    cpu::class_attention<float>(sizes, packed<float>(sizes, 0, qkv.data.get()), expected.data.get(),
                                serial_executor());
    CHECK(std::isnan(expected[0]) && !std::isnan(expected[40]));
    check_close(scores, expected, tolerance<float>() * 2);
  }
}

}  // namespace
}  // namespace evit::tests
