// restore_tokens: every patch at its place again, the inverse of reorganize_tokens on the grid.
//
// tokens [B, P + K (+ 1 if fused), C] with a dense last dimension: prefix tokens, kept tokens and perhaps a
// fused one; kept [B, K], dense: numbers of the kept tokens among the N - P patches, strictly ascending and
// in [0, N - P) (the caller has checked). out [B, N, C], dense, every element written: the prefix tokens,
// then every patch, tokens[b, P + i] at kept[b, i] and at the other places the row that `fill` has there, or
// zeros where it has no data. The fused token fills them where `fill` views it with a stride of 0 between
// rows.
//
// 0 <= K <= N - P; any size may be 0. Nothing but copies. Linear in tokens and in fill: the gradient of the
// tokens is restore_tokens_backward, that of fill is restore_tokens of zeros, filled with the gradient of
// out.
#pragma once

#include "executor.h"
#include "stream.h"
#include "types.h"

namespace evit {

struct RestoreSizes {
  int64_t batch;     // B
  int64_t tokens;    // N, of the result: with every patch
  int64_t prefix;    // P
  int64_t keep;      // K
  int64_t channels;  // C
  bool fused;        // a fused token stands behind the kept ones

  EVIT_HOST_DEVICE int64_t patches() const { return tokens - prefix; }
  EVIT_HOST_DEVICE int64_t in_tokens() const { return prefix + keep + (fused ? 1 : 0); }
};

namespace cpu {

template <typename T>
void restore_tokens(const RestoreSizes& sizes, const Tokens<T>& tokens, const int64_t* kept,
                    const Tokens<T>& fill, T* out, const Executor& executor);

// grad_tokens [B, P + K (+ 1), C], dense, every element written, from grad [B, N, C] with a dense last
// dimension: the rows of the prefix and of the kept tokens and, behind them, where the fused token has filled
// the other places (`fill_fused`, K < N - P), the sum of the rows there, in ascending order in the
// accumulation type, rounded once, and else zeros. Deterministic. Linear: its gradient is restore_tokens.
template <typename T>
void restore_tokens_backward(const RestoreSizes& sizes, bool fill_fused, const Tokens<T>& grad,
                             const int64_t* kept, T* grad_tokens, const Executor& executor);

}  // namespace cpu

namespace cuda {

// As the CPU's, but the kernels themselves check kept, which stays on the device: where it is not ascending
// or out of range they stop with a device-side assertion, and nothing is read or written out of bounds. One
// launch.
template <typename T>
void restore_tokens(const RestoreSizes& sizes, const Tokens<T>& tokens, const int64_t* kept,
                    const Tokens<T>& fill, T* out, const Stream& stream);

// The bytes of device memory that restore_tokens_backward<T> needs as `workspace`, aligned to 16: none up to
// 1024 tokens.
template <typename T>
int64_t restore_tokens_backward_workspace(const RestoreSizes& sizes, bool fill_fused);

// As the CPU's; the order in which the rows are summed is that of cuda/rows.cuh. One launch where there is
// nothing to sum and up to 1024 tokens, else two.
template <typename T>
void restore_tokens_backward(const RestoreSizes& sizes, bool fill_fused, const Tokens<T>& grad,
                             const int64_t* kept, T* grad_tokens, void* workspace, const Stream& stream);

}  // namespace cuda
}  // namespace evit
