// Attention in bfloat16 for processors with a matrix unit for it (AMX): tdpbf16ps multiplies a tile of 16
// rows of 16 pairs by a tile of 16 rows of 16 columns of pairs, in the layout in which pairs are packed
// anyway. What is not a product runs as for avx512_bf16.
//
// Only the tests have run this, with the instructions of tiles executed in software; its speed on a processor
// that has them was not measured. It is used where it is asked for: see simd_level().
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the standard headers, so that none of their functions uses instructions that a processor may lack.
#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define EVIT_SIMD_NAMESPACE amx_bf16
#define EVIT_SIMD_BYTES 64
#include "vectors.inc"

// These use vectors.inc and must come after it.
#include "attention_kernels.inc"
#include "pairs.inc"

namespace evit::cpu::amx_bf16 {
namespace {

// Rows of a tile, elements in a row of the left side, and columns of the right side and of sums.
constexpr int64_t kTile = 16;

// Two tiles of rows by two of columns: four of sums, two of each side.
struct TilePairs : Pairs {
  using Arithmetic = TilePairs;
  static constexpr int64_t queries = 2 * kTile;
  static constexpr int64_t unit = kTile;

  // Pairs of neighbours in a column, those of a column one after the other: the left side of products.
  static const Element* columns(const float* values, int64_t stride, int64_t count, int64_t padded_count,
                                Element* packed) {
    for (int64_t n = 0; n < padded_count; n += kTile) {
      UintV block[kTile];
      for (int64_t i = 0; i < kTile; ++i)
        block[i] =
            2 * i < count ? pairs_of_rows(values + 2 * i * stride + n, stride, 2 * i + 1 < count) : UintV{};
      transpose(block);
      __builtin_memcpy(packed + n * kTile, block, sizeof block);
    }
    return packed;
  }
};

// The instructions, as the compilers' own functions for them do not say that they touch memory (GCC), or need
// constants where a template's parameter will not do.
template <int tile>
EVIT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile) : "memory");
}
// `stride` in elements of four bytes, as everywhere here.
template <int tile>
EVIT_INLINE void tile_load(const void* base, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(4 * stride), "i"(tile) : "memory");
}
template <int tile>
EVIT_INLINE void tile_store(void* base, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(4 * stride), "i"(tile) : "memory");
}
// sums += left right
template <int sums, int left, int right>
EVIT_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right) : "memory");
}

// All eight tiles are whole ones: what is smaller is padded in memory.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// Tiles 0 to 3 are sums: [row][column]; 4 and 5 are of the left side, 6 and 7 of the right.
template <int rows, int columns>
void tile_products(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth,
                   bool accumulate, float* out, int64_t out_stride) {
  float *below = out + kTile * out_stride, *right = out + kTile, *both = below + kTile;
  if (accumulate) {
    tile_load<0>(out, out_stride);
    if constexpr (columns > 1) tile_load<1>(right, out_stride);
    if constexpr (rows > 1) tile_load<2>(below, out_stride);
    if constexpr (rows > 1 && columns > 1) tile_load<3>(both, out_stride);
  } else {
    tile_zero<0>();
    if constexpr (columns > 1) tile_zero<1>();
    if constexpr (rows > 1) tile_zero<2>();
    if constexpr (rows > 1 && columns > 1) tile_zero<3>();
  }
  for (int64_t d = 0; d < depth; d += kTile) {
    tile_load<4>(a + d, a_stride);
    tile_load<6>(b + d * b_stride, b_stride);
    tile_multiply_add<0, 4, 6>();
    if constexpr (columns > 1) {
      tile_load<7>(b + d * b_stride + kTile, b_stride);
      tile_multiply_add<1, 4, 7>();
    }
    if constexpr (rows > 1) {
      tile_load<5>(a + kTile * a_stride + d, a_stride);
      tile_multiply_add<2, 5, 6>();
    }
    if constexpr (rows > 1 && columns > 1) tile_multiply_add<3, 5, 7>();
  }
  tile_store<0>(out, out_stride);
  if constexpr (columns > 1) tile_store<1>(right, out_stride);
  if constexpr (rows > 1) tile_store<2>(below, out_stride);
  if constexpr (rows > 1 && columns > 1) tile_store<3>(both, out_stride);
}

// Rows and columns of a block, both up to whole tiles: memory has room for them.
void block_products(int64_t rows_left, int64_t vectors, const uint32_t* a, int64_t a_stride,
                    const uint32_t* b, int64_t depth, bool accumulate, float* out, int64_t out_stride) {
  const int64_t b_stride = vectors * kTile;
  for (int64_t j = 0; j < vectors; j += 2) {
    const auto products = rows_left > kTile ? j + 1 < vectors ? tile_products<2, 2> : tile_products<2, 1>
                          : j + 1 < vectors ? tile_products<1, 2>
                                            : tile_products<1, 1>;
    products(a, a_stride, b + j * kTile, b_stride, depth, accumulate, out + j * kTile, out_stride);
  }
}

template <>
struct Blocks<TilePairs> {
  static constexpr int64_t rows = 2 * kTile;

  EVIT_INLINE void multiply(int64_t rows_left, int64_t vectors_left, const uint32_t* a, int64_t a_stride,
                            const uint32_t* b, int64_t depth, float factor, float* out, int64_t out_stride) {
    const int64_t vectors = std::min<int64_t>(vectors_left, kTileVectors);
    block_products(rows_left, vectors, a, a_stride, b, depth, false, out, out_stride);
    if (factor == 1) return;
    for (int64_t i = 0; i < std::min(rows_left, rows); ++i)
      for (int64_t j = 0; j < vectors * kTile; j += kTile) {
        float* at = out + i * out_stride + j;
        Convert<float>::store(at, Convert<float>::load(at) * factor);
      }
  }
  EVIT_INLINE void accumulate(int64_t rows_left, int64_t vectors_left, const uint32_t* columns, int64_t,
                              int64_t n, const uint32_t* b, int64_t depth, float* out, int64_t out_stride) {
    const int64_t vectors = std::min<int64_t>(vectors_left, kTileVectors);
    block_products(rows_left, vectors, columns + n * kTile, kTile, b, depth, true, out, out_stride);
  }
};

// Tiles are a thread's. Those that other code had configured would be lost: none is taken to leave them so
// between calls, as this does not either.
template <>
struct MatrixUnit<TilePairs> {
  MatrixUnit() {
    static constexpr TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~MatrixUnit() { asm volatile("tilerelease" ::: "memory"); }
  MatrixUnit(const MatrixUnit&) = delete;
};

}  // namespace

const AttentionKernels<BFloat16>& attention_table() { return attention_kernels_of<TilePairs>; }

}  // namespace evit::cpu::amx_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
