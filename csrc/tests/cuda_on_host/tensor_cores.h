// The instructions of a warp that move and multiply small matrices, with the layout of their operands as PTX
// defines it. Included by host.h.
#pragma once

#ifndef CUDA_ON_HOST_CALL_SITE
#error "include host.h instead"
#endif

namespace cuda_on_host {

namespace internal {

// What a lane brings to a product of matrices; the others find it on this lane's stack while it waits.
struct MatrixProduct {
  const uint32_t* a;
  uint32_t b[2];
  float c[4], d[4];
};

inline float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  const bool beyond = fabs(static_cast<double>(nearest)) > fabs(value) && isfinite(nearest);
  return beyond ? nextafterf(nearest, 0) : nearest;
}

// 2^exponent, of a normal number.
inline double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// What a device adds at once: c and the products of kTogether elements of a row and a column. How it rounds
// is not documented. Models that agree with devices to the bit (Khattak and Mikaitis, "Accurate Models of
// NVIDIA Tensor Cores", arXiv 2512.07004) say: of every term, the bits are dropped that lie more than 24 + i
// places below the leading one of the largest, then those of the sum that float32 has no place for. Compute
// capability 8.x adds 8 products at once and has i = 0; 9.0 and 10.0 add 16 and have i = 1. Here it is the
// former, which loses more.
inline constexpr int kTogether = 8;

inline float multiply_add_together(float c, const float* a, const float* b) {
  double terms[kTogether + 1] = {c};
  double largest = fabs(terms[0]), sum = c;
  for (int k = 0; k < kTogether; ++k) {
    terms[k + 1] = double{a[k]} * double{b[k]};
    largest = fmax(largest, fabs(terms[k + 1]));
    sum += terms[k + 1];
  }
  if (!isfinite(sum) || largest == 0) return static_cast<float>(sum);
  const int exponent = static_cast<int>(std::bit_cast<uint64_t>(largest) >> 52) - 1023;
  const double unit = power_of_two(exponent - 24), of_unit = power_of_two(24 - exponent);
  int64_t units = 0;
  for (const double term : terms) units += static_cast<int64_t>(term * of_unit);  // toward zero
  return toward_zero(static_cast<double>(units) * unit);
}

}  // namespace internal

// mma.sync.aligned.m16n8k16.row.col with float32 sums: c = a b + c.
template <float (*kWiden)(uint16_t)>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_ON_HOST_CALL_SITE) {
  using internal::MatrixProduct;
  const internal::Combine multiply = [](const internal::Lanes& lanes, int lane) {
    const auto at = [&](int other) { return reinterpret_cast<MatrixProduct*>(lanes.value[other]); };
    // Element k of a row of A, or of a column of B, is in a register of lane 4 * (row or column) + k % 8 / 2.
    const auto half = [](uint32_t pair, int k) {
      return kWiden(static_cast<uint16_t>(k % 2 == 0 ? pair : pair >> 16));
    };
    float of_a[2][16], of_b[2][16];  // rows and columns that this lane's results need
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 16; ++k) {
        of_a[i][k] = half(at(lane / 4 * 4 + k % 8 / 2)->a[i + k / 8 * 2], k);
        of_b[i][k] = half(at((lane % 4 * 2 + i) * 4 + k % 8 / 2)->b[k / 8], k);
      }
    MatrixProduct& own = *at(lane);
    for (int i = 0; i < 4; ++i) {
      own.d[i] = own.c[i];
      for (int k = 0; k < 16; k += internal::kTogether)
        own.d[i] = internal::multiply_add_together(own.d[i], of_a[i / 2] + k, of_b[i % 2] + k);
    }
    return uint64_t{0};
  };
  MatrixProduct own = {a, {b0, b1}, {c[0], c[1], c[2], c[3]}, {}};
  internal::meet_warp("mma_m16n8k16", 0xffffffff, reinterpret_cast<uint64_t>(&own), internal::here.lane,
                      multiply, at);
  for (int i = 0; i < 4; ++i) c[i] = own.d[i];
}

// ldmatrix.sync.aligned.m8n8.x4, with or without .trans.
inline void ldmatrix_x4(uint32_t (&m)[4], const void* row, bool transposed, CUDA_ON_HOST_CALL_SITE) {
  check_aligned(row, 16, at);
  struct Matrices {
    const uint16_t* row;
    bool transposed;
    uint32_t* m;
  };
  const internal::Combine read = [](const internal::Lanes& lanes, int lane) {
    const Matrices& own = *reinterpret_cast<const Matrices*>(lanes.value[lane]);
    const auto element = [&](int matrix, int i, int j) {
      return uint32_t{reinterpret_cast<const Matrices*>(lanes.value[8 * matrix + i])->row[j]};
    };
    const int first = lane / 4, second = lane % 4 * 2;
    for (int i = 0; i < 4; ++i)
      own.m[i] = own.transposed ? element(i, second, first) | element(i, second + 1, first) << 16
                                : element(i, first, second) | element(i, first, second + 1) << 16;
    return uint64_t{0};
  };
  const Matrices own = {static_cast<const uint16_t*>(row), transposed, m};
  internal::meet_warp("ldmatrix_x4", 0xffffffff, reinterpret_cast<uint64_t>(&own), internal::here.lane, read,
                      at);
}

}  // namespace cuda_on_host
