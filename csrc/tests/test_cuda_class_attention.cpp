// The CUDA kernels of class_attention against those of the CPU.
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

template <typename T>
void agrees(const ClassAttentionSizes& sizes, int64_t padding) {
  using A = accumulate_t<T>;
  const auto qkv =
      random_values<T>(sizes.batch * sizes.tokens * (3 * sizes.heads * sizes.channels + padding), 11);
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
    DeviceBuffer<char> backward_workspace(cuda::class_attention_backward_workspace<T>(sizes));
    cuda::class_attention<T>(sizes, input, out.data(), workspace.data(), test_stream());
    cuda::class_attention_backward<T>(sizes, input, device_grad.data(), sizes.tokens * 2, 2, dq.data(),
                                      dk.data(), backward_workspace.data(), test_stream());
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
  check_close(grad_q, dq, tolerance<T>() * 2);
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
  agrees<float>({1, 1, 12600, 4, 0.5}, 0);
  agrees<double>({1, 2, 6200, 2, 0.5}, 1);
  agrees<BFloat16>({1, 12, 1100, 8, 0.3}, 0);
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
