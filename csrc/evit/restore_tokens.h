// restore_tokens: every patch back in its place, the inverse of reorganize_tokens on the grid.
//
// tokens [B, P + K (+ 1 if fused), C] with a dense last dimension: prefix tokens, kept tokens and possibly a
// fused one; kept [B, K], dense: numbers of the kept tokens among the N - P patches, strictly ascending and
// in [0, N - P) (checked by the caller). out [B, N, C], dense, every element written: the prefix tokens, then
// every patch: tokens[b, P + i] at kept[b, i], and elsewhere the row of `fill` for that place, or zeros if
// `fill` has no data. To fill with the fused token, `fill` views it with a stride of 0 between rows.
//
// 0 <= K <= N - P; any size may be 0. Only copies. Linear in tokens and in fill: the gradient of tokens is
// restore_tokens_backward, and that of fill is restore_tokens of zeros, filled with the gradient of out.
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
  bool fused;        // whether a fused token follows the kept ones

  EVIT_HOST_DEVICE int64_t patches() const { return tokens - prefix; }
  EVIT_HOST_DEVICE int64_t in_tokens() const { return prefix + keep + (fused ? 1 : 0); }
};

namespace cpu {

template <typename T>
void restore_tokens(const RestoreSizes& sizes, const Tokens<T>& tokens, const int64_t* kept,
                    const Tokens<T>& fill, T* out, const Executor& executor);

// grad_tokens [B, P + K (+ 1), C], dense, every element written, from grad [B, N, C] with a dense last
// dimension: the rows of the prefix and the kept tokens, then that of a fused token. If the fused token has
// filled the other places (`fill_fused`, K < N - P), this is the sum of the rows there, in ascending order in
// the accumulation type, rounded once; otherwise zeros. Deterministic and linear: the gradient is
// restore_tokens.
template <typename T>
void restore_tokens_backward(const RestoreSizes& sizes, bool fill_fused, const Tokens<T>& grad,
                             const int64_t* kept, T* grad_tokens, const Executor& executor);

}  // namespace cpu

namespace cuda {

// Like the CPU version, but the kernels themselves check kept, which stays on the device: if it is out of
// range or not ascending they stop with a device-side assertion, and nothing is read or written out of
// bounds. One launch.
template <typename T>
void restore_tokens(const RestoreSizes& sizes, const Tokens<T>& tokens, const int64_t* kept,
                    const Tokens<T>& fill, T* out, const Stream& stream);

// The bytes of device memory that restore_tokens_backward<T> needs as `workspace`, aligned to 16: none up to
// 1024 tokens.
template <typename T>
int64_t restore_tokens_backward_workspace(const RestoreSizes& sizes, bool fill_fused);

// Like the CPU version; the rows are summed in the order of cuda/rows.cuh. One launch if there is nothing to
// sum and for up to 1024 tokens, else two.
template <typename T>
void restore_tokens_backward(const RestoreSizes& sizes, bool fill_fused, const Tokens<T>& grad,
                             const int64_t* kept, T* grad_tokens, void* workspace, const Stream& stream);

}  // namespace cuda
}  // namespace evit
