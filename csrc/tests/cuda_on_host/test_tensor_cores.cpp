// What stands in for tensor cores and asynchronous copies on the host, against plain loops over whole
// matrices.
#include <algorithm>
#include <array>

#include "../../evit/cuda/tensor_cores.cuh"
#include "../check.h"
#include "../data.h"

namespace evit::tests {
namespace {

using cuda::warp_load_matrices;
using cuda::warp_multiply_add;

void run(int threads, size_t shared_bytes, const std::function<void()>& body) {
  cuda_on_host::launch(nullptr, 1, threads, shared_bytes, body);
  CHECK(cudaGetLastError() == cudaSuccess);
}

template <typename T>
uint32_t pair(T low, T high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// C + A B, a warp after the other, each with a C of its own, by the layout that PTX documents for each
// operand.
template <typename T>
void products_agree() {
  const auto a = random_values<T>(16 * 16, 1), b = random_values<T>(16 * 8, 2);
  const auto c = random_values<float>(2 * 16 * 8, 3);
  cuda_on_host::for_each_order([&] {
    Buffer<float> result(2 * 16 * 8);
    run(64, 0, [&] {
      const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
      const int matrix = static_cast<int>(threadIdx.x) / 32 * 16 * 8;
      uint32_t of_a[4];
      float of_c[4];
      for (int i = 0; i < 4; ++i) {
        const int m = row + 8 * (i % 2), k = column + 8 * (i / 2);
        of_a[i] = pair(a[m * 16 + k], a[m * 16 + k + 1]);
        of_c[i] = c[matrix + (row + 8 * (i / 2)) * 8 + column + i % 2];
      }
      const auto of_b = [&](int k) { return pair(b[k * 8 + row], b[(k + 1) * 8 + row]); };
      warp_multiply_add<T>(of_c, of_a, of_b(column), of_b(column + 8));
      for (int i = 0; i < 4; ++i) result[matrix + (row + 8 * (i / 2)) * 8 + column + i % 2] = of_c[i];
    });
    for (int i = 0; i < 2 * 16 * 8; ++i) {
      double sum = c[i], terms = std::abs(sum);
      for (int k = 0; k < 16; ++k) {
        const double product = to_double(a[i / 8 % 16 * 16 + k]) * to_double(b[k * 8 + i % 8]);
        sum += product;
        terms += std::abs(product);
      }
      // Of each of the 18 terms that are added a part is dropped, and twice of a sum.
      CHECK(std::abs(result[i] - sum) <= terms * (18 * 0x1p-24 + 2 * 0x1p-23));
    }
  });
}

TEST(cuda_products_of_matrices_agree) {
  products_agree<Half>();
  products_agree<BFloat16>();
}

// Once more, from the tables in which CUTLASS (SM80_16x8x16_F32BF16BF16F32_TN) states what a lane holds:
// place v of lane t is element number t % 4 * s[0] + t / 4 * s[1] + v % 2 * s[2] + v / 2 % 2 * s[3] + v / 4 *
// s[4] of A (M x K), of B (N x K) and of C (M x N), counted column by column. So what stands in for the
// instruction, the kernels and the test above do not share one reading of PTX's pictures.
TEST(cuda_products_of_matrices_have_cutlass_layouts) {
  const auto number = [](const std::array<int, 5>& s, int t, int v) {
    return t % 4 * s[0] + t / 4 * s[1] + v % 2 * s[2] + v / 2 % 2 * s[3] + v / 4 * s[4];
  };
  const std::array<int, 5> of_a = {32, 1, 16, 8, 128}, of_b = {16, 1, 8, 64, 0}, of_c = {32, 1, 16, 8, 0};
  int a[256], b[128], c[128];  // small integers: sums are exact
  for (int i = 0; i < 256; ++i) a[i] = i * i % 23 - 11;
  for (int i = 0; i < 128; ++i) b[i] = i * i % 19 - 9, c[i] = i * i % 17 - 8;
  Buffer<float> result(128);
  run(32, 0, [&] {
    const int t = threadIdx.x;
    const auto pair_of = [&](const int* matrix, const std::array<int, 5>& s, int v) {
      return pair(from_double<BFloat16>(matrix[number(s, t, v)]),
                  from_double<BFloat16>(matrix[number(s, t, v + 1)]));
    };
    uint32_t lane_a[4];
    float lane_c[4];
    for (int i = 0; i < 4; ++i) {
      lane_a[i] = pair_of(a, of_a, 2 * i);
      lane_c[i] = static_cast<float>(c[number(of_c, t, i)]);
    }
    warp_multiply_add<BFloat16>(lane_c, lane_a, pair_of(b, of_b, 0), pair_of(b, of_b, 2));
    for (int i = 0; i < 4; ++i) result[number(of_c, t, i)] = lane_c[i];
  });
  for (int i = 0; i < 128; ++i) {
    int sum = c[i];
    for (int k = 0; k < 16; ++k) sum += a[i % 16 + 16 * k] * b[i / 16 + 8 * k];
    CHECK(result[i] == static_cast<float>(sum));
  }
}

// Bits that lie too far below the largest term's are dropped, of every term for itself.
TEST(cuda_products_of_matrices_drop_low_bits) {
  // c, the first and the ninth product, all others, the result.
  for (const auto& [start, first, ninth, others, expected] :
       {std::tuple(1.0, 0.0, 0.0, 0x1p-25, 1.0),  // though they are 0x1p-21 together
        {1.0, 0.0, 0.0, 0x1p-24, 1 + 0x1p-20},
        {1.0, 0.0, 0.0, -0x1p-24, 1 - 0x1p-20},
        {0.0, 0.0, 0.0, 0x1p-25, 0x1p-21},
        {0.0, 1.0, -1.0, 0x1p-25, 0.0},
        {0.0, 1.0, -1.0, 0x1p-24, 0x1.ap-21},  // of the first sum, the last of 25 bits is dropped
        {0x1p100, 0.0, 0.0, 0x1p75, 0x1p100},
        {0x1p-100, 0.0, 0.0, 0x1p-124, 0x1p-100 + 0x1p-120}}) {
    float c[4] = {};
    run(32, 0, [&, start = start, first = first, ninth = ninth, others = others] {
      const auto factor = [](double value) { return from_double<BFloat16>(value); };
      const bool leads = threadIdx.x % 4 == 0;
      const uint32_t rest = pair(factor(others), factor(others));
      uint32_t a[4] = {rest, rest, rest, rest};
      if (leads && first != 0) a[0] = a[1] = pair(factor(first), factor(others));
      if (leads && ninth != 0) a[2] = a[3] = pair(factor(ninth), factor(others));
      float of_c[4];
      std::fill(of_c, of_c + 4, static_cast<float>(start));
      const uint32_t ones = pair(factor(1), factor(1));
      warp_multiply_add<BFloat16>(of_c, a, ones, ones);
      if (threadIdx.x == 13) std::copy(of_c, of_c + 4, c);
    });
    for (const float value : c) CHECK(value == static_cast<float>(expected));
  }
}

// What a product makes of values that are not numbers, or too large.
TEST(cuda_products_of_matrices_follow_ieee) {
  const float inf = INFINITY;
  for (const auto& [x, y, start, expected] : {std::tuple(inf, 1.0f, 0.0f, inf),
                                              {inf, 0.0f, 0.0f, NAN},
                                              {inf, 1.0f, -inf, NAN},
                                              {NAN, 0.0f, 1.0f, NAN},
                                              {1e30f, 1e30f, 0.0f, inf},
                                              {-1e30f, 1e30f, 0.0f, -inf},
                                              {0.0f, 1.0f, 7.0f, 7.0f}}) {
    float c[4] = {};
    run(32, 0, [&, x = x, y = y, start = start] {
      uint32_t a[4] = {};
      float of_c[4] = {start, start, start, start};
      // A[row][0] and B[0][row], the others are 0.
      const bool first = threadIdx.x % 4 == 0;
      if (first) a[0] = a[1] = cuda::narrow<BFloat16>(x).bits;
      warp_multiply_add<BFloat16>(of_c, a, first ? cuda::narrow<BFloat16>(y).bits : 0u, 0);
      if (threadIdx.x == 21) std::copy(of_c, of_c + 4, c);
    });
    for (const float value : c)
      CHECK(std::isinf(expected) || std::isnan(expected) ? near(value, expected, 0) : value == expected);
  }
}

TEST(cuda_matrices_are_loaded) {
  cuda_on_host::for_each_order([] {
    int wrong = 0;
    run(64, 2 * 32 * 8 * sizeof(uint16_t), [&] {
      auto* shared = static_cast<uint16_t*>(cuda::shared_memory());
      for (int i = threadIdx.x; i < 2 * 32 * 8; i += 64) shared[i] = static_cast<uint16_t>(i);
      __syncthreads();
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, column = lane % 4 * 2;
      // The rows of the four matrices lie in memory in the reverse order.
      const auto place = [&](int matrix, int i, int j) {
        return static_cast<uint32_t>(warp * 256 + (31 - 8 * matrix - i) * 8 + j);
      };
      const auto address = cuda::shared_address(shared + place(lane / 8, lane % 8, 0));
      uint32_t plain[4], transposed[4];
      warp_load_matrices<false>(plain, address);
      warp_load_matrices<true>(transposed, address);
      for (int i = 0; i < 4; ++i) {
        wrong += plain[i] != (place(i, row, column) | place(i, row, column + 1) << 16);
        wrong += transposed[i] != (place(i, column, row) | place(i, column + 1, row) << 16);
      }
    });
    CHECK(wrong == 0);
  });
}

// Through loads, the whole of a product of 16 x 32 by 32 x 16: as kernels do it.
TEST(cuda_matrices_are_loaded_as_they_are_multiplied) {
  const auto a = random_values<Half>(16 * 32, 4), b = random_values<Half>(32 * 16, 5);
  Buffer<float> by_rows(16 * 16), by_columns(16 * 16);
  run(32, (3 * 16 * 32) * sizeof(Half), [&] {
    Half* of_a = static_cast<Half*>(cuda::shared_memory());
    Half *of_b = of_a + 512, *turned = of_b + 512;
    for (int i = threadIdx.x; i < 512; i += 32) {
      of_a[i] = a[i];
      of_b[i] = b[i];
      turned[i % 16 * 32 + i / 16] = b[i];
    }
    __syncwarp();
    const int lane = threadIdx.x;
    float c[2][4] = {}, d[2][4] = {};
    for (int k = 0; k < 32; k += 16) {
      uint32_t p[4], rows[4], columns[4];
      warp_load_matrices<false>(p, cuda::shared_address(of_a + lane % 16 * 32 + k + lane / 16 * 8));
      warp_load_matrices<true>(rows, cuda::shared_address(of_b + (k + lane % 16) * 16 + lane / 16 * 8));
      warp_load_matrices<false>(
          columns, cuda::shared_address(turned + (lane / 16 * 8 + lane % 8) * 32 + k + lane / 8 % 2 * 8));
      for (int i = 0; i < 2; ++i) {
        warp_multiply_add<Half>(c[i], p, rows[2 * i], rows[2 * i + 1]);
        warp_multiply_add<Half>(d[i], p, columns[2 * i], columns[2 * i + 1]);
      }
    }
    for (int i = 0; i < 8; ++i) {
      const int at = (lane / 4 + i % 4 / 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
      by_rows[at] = c[i / 4][i % 4];
      by_columns[at] = d[i / 4][i % 4];
    }
  });
  for (int i = 0; i < 256; ++i) {
    double sum = 0;
    for (int k = 0; k < 32; ++k) sum += to_double(a[i / 16 * 32 + k]) * to_double(b[k * 16 + i % 16]);
    CHECK_NEAR(by_rows[i], sum, 1e-5);
    CHECK(by_rows[i] == by_columns[i]);
  }
}

TEST(cuda_copies_arrive_when_they_are_waited_for) {
  const auto from = random_values<float>(64 * 4, 6);
  cuda_on_host::for_each_order([&](cuda_on_host::Order order) {
    int wrong = 0, early = 0;
    run(64, 2 * 64 * 16, [&] {
      auto* shared = static_cast<float*>(cuda::shared_memory());
      const int t = threadIdx.x;
      cuda::copy_vector_to_shared(shared + 4 * t, &from[4 * t]);
      cuda::copy_vector_to_shared(shared + 256 + 4 * t, &from[0], false);
      early += shared[4 * t] == from[4 * t];
      cuda::copies_arrived();
      __syncthreads();
      const int other = 63 - t;
      for (int i = 0; i < 4; ++i)
        wrong += shared[4 * other + i] != from[4 * other + i] || shared[256 + 4 * other + i] != 0;
    });
    CHECK(wrong == 0);
    if (order.kind == cuda_on_host::Order::kShuffled)
      CHECK(early > 0 && early < 64);
    else
      CHECK(early == 0);
  });
}

bool says(const std::string& error, const char* what) { return error.find(what) != std::string::npos; }

TEST(cuda_mistakes_with_matrices_and_copies_are_errors) {
  const auto error = [](int threads, const std::function<void(float*)>& kernel) {
    return cuda_on_host::expect_error([&] {
      cuda_on_host::launch(nullptr, 1, threads, 1024,
                           [&] { kernel(static_cast<float*>(cuda::shared_memory())); });
    });
  };
  alignas(16) static const float source[8] = {};
  CHECK(says(error(32, [](float* shared) { cuda::copy_vector_to_shared(shared, source); }),
             "returned while its copies were under way"));
  CHECK(
      says(error(32, [](float* shared) { cuda::copy_vector_to_shared(shared, source + 1); }), "misaligned"));
  CHECK(
      says(error(32, [](float* shared) { cuda::copy_vector_to_shared(shared + 1, source); }), "misaligned"));
  CHECK(says(error(32,
                   [](float* shared) {
                     uint32_t m[4];
                     warp_load_matrices<false>(m, cuda::shared_address(shared + threadIdx.x));
                   }),
             "misaligned"));
  CHECK(says(error(32,
                   [](float*) {
                     float c[4] = {};
                     const uint32_t a[4] = {};
                     if (threadIdx.x != 7) warp_multiply_add<Half>(c, a, 0, 0);
                   }),
             "divergence"));
  CHECK(says(error(16,
                   [](float*) {
                     float c[4] = {};
                     const uint32_t a[4] = {};
                     warp_multiply_add<Half>(c, a, 0, 0);
                   }),
             "lanes that the block lacks"));
}

TEST(cuda_pairs_are_narrowed) {
  for (const auto& [low, high] : {std::pair(1.0f, -2.5f), {0.1f, 3e38f}, {1e-7f, 65519.0f}}) {
    CHECK(cuda::narrow_pair<Half>(low, high) == pair(nearest<Half>(low), nearest<Half>(high)));
    CHECK(cuda::narrow_pair<BFloat16>(low, high) == pair(nearest<BFloat16>(low), nearest<BFloat16>(high)));
  }
}

}  // namespace
}  // namespace evit::tests
