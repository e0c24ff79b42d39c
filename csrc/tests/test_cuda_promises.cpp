// What the CUDA kernels promise beyond their results, and only the host that stands in for a device can show:
// the same sums on every device, refusals, launches on the right device.
#include <functional>

#include "../evit/fuse_tokens.h"
#include "../evit/gather_tokens.h"
#include "../evit/reorganize_tokens.h"
#include "../evit/scatter_tokens.h"
#include "device.h"

namespace evit::tests {
namespace {

// A result does not depend on the device, nor on what else is in the batch.
TEST(cuda_sums_are_the_same_on_every_device_and_in_every_batch) {
  const int64_t patches = 70, channels = 200;
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
  const Buffer<float> small = run(3, 1), large = run(3, 1000), one = run(1, 1000);
  CHECK(same_bits(small, large));
  CHECK(std::memcmp(small.data.get(), one.data.get(), static_cast<size_t>(one.size) * sizeof(float)) == 0);
  cuda_on_host::device() = {};
}

TEST(cuda_index_out_of_range_stops_the_kernel) {
  const GatherSizes sizes = {1, 4, 2, 8};
  const auto x = random_values<float>(32, 1);
  for (const int64_t wrong : {int64_t{4}, int64_t{-1}, int64_t{1} << 40}) {
    const int64_t index[] = {3, wrong};
    const TokenIndex view = {index, 2, 1};
    float out[64], grad_weights[4];
    const Tokens<float> tokens = {x.data.get(), 32, 8};
    for (const auto& launch : std::vector<std::function<void()>>{
             [&] { cuda::gather_tokens<float>(sizes, tokens, view, out, test_stream()); },
             [&] { cuda::scatter_tokens<float>(sizes, tokens, view, out, test_stream()); },
             [&] { cuda::fuse_tokens<float>(sizes, tokens, tokens, view, out, test_stream()); },
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
  CHECK(throws<std::length_error>(
      [&] { cuda::gather_tokens<float>({1, 1, large, 1}, tokens, index, nullptr, stream); }));
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
