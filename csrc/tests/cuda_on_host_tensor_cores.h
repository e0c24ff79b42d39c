// The instructions of a warp that move and multiply small matrices, with the layout of their operands as PTX
// defines it. Included by cuda_on_host.h.
#pragma once

#ifndef CUDA_ON_HOST_CALL_SITE
#error "include cuda_on_host.h instead"
#endif

namespace cuda_on_host {

namespace internal {

// What a lane brings to a product of matrices; the others find it on this lane's stack while it waits.
struct MatrixProduct {
  const uint32_t* a;
  uint32_t b[2];
  float c[4], d[4];
};

// How a device rounds within a product is not documented. Seen on several is that low bits are dropped.
inline float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  const bool beyond = fabs(static_cast<double>(nearest)) > fabs(value) && isfinite(nearest);
  return beyond ? nextafterf(nearest, 0) : nearest;
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
      double sum = own.c[i];
      for (int k = 0; k < 16; ++k) sum += double{of_a[i / 2][k]} * double{of_b[i % 2][k]};
      own.d[i] = internal::toward_zero(sum);
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
