// reorganize_tokens: keep the K best of the N - P patch tokens in their order, fuse the others into one.
//
// x [B, N, C] with a dense last dimension; scores [B, N - P], one for each patch token, float or double, any
// strides. tokens [B, P + K + (1 if fuse), C], dense: prefix tokens, kept tokens in ascending order, then
// sum scores[b, j] * x[b, P + j] over the others, accumulated in ascending order in the accumulation type of
// x. kept [B, K]: numbers of the kept tokens among the patch tokens, ascending.
//
// A linear-time radix selection finds the K best: ties go to the lower number, NaN counts as the largest, -0
// and +0 are equal. 1 <= K <= N - P, and K < N - P with fuse; with K == N - P the tokens are copied. B and C
// may be 0. Every row of x is read once. Deterministic. Differentiable in x and, with fuse, in scores.
#pragma once

#include "executor.h"
#include "stream.h"
#include "types.h"

namespace evit {

struct ReorganizeSizes {
  int64_t batch;     // B
  int64_t tokens;    // N
  int64_t prefix;    // P
  int64_t keep;      // K
  int64_t channels;  // C
  bool fuse;

  EVIT_HOST_DEVICE int64_t patches() const { return tokens - prefix; }
  EVIT_HOST_DEVICE int64_t out_tokens() const { return prefix + keep + (fuse ? 1 : 0); }
};

namespace cpu {

// T: element type of x. S: float or double, the type of the scores.
template <typename T, typename S>
void reorganize_tokens(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<S>& scores, T* tokens,
                       int64_t* kept, const Executor& executor);

// grad_x [B, N, C] and grad_scores [B, skip + N - P], dense, every element written (the first `skip` scores
// of a sequence belong to prefix tokens and get zeros), from grad_tokens [B, P + K + 1, C] with a dense last
// dimension. sizes.fuse must be true: without a fused token the gradient is scatter_tokens. kept is dense and
// ascending.
template <typename T>
void reorganize_tokens_backward(const ReorganizeSizes& sizes, const Tokens<T>& grad_tokens,
                                const Tokens<T>& x, const Tokens<accumulate_t<T>>& scores,
                                const int64_t* kept, T* grad_x, accumulate_t<T>* grad_scores, int64_t skip,
                                const Executor& executor);

}  // namespace cpu

namespace cuda {

// The bytes of device memory that reorganize_tokens<T, S> and add_reorganize_norm<T, S> need as `workspace`,
// aligned to 16: often none.
template <typename T, typename S>
int64_t reorganize_tokens_workspace(const ReorganizeSizes& sizes);

// Like the CPU version; the fused token is summed in the order of cuda/rows.cuh. One launch for up to 1024
// patches whose scores have the accumulation type, else three; seven for up to 4 sequences of 16384 patches and
// more, so that several blocks select.
template <typename T, typename S>
void reorganize_tokens(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<S>& scores, T* tokens,
                       int64_t* kept, void* workspace, const Stream& stream);

// Like the CPU version. One launch. If kept is not ascending the result is meaningless, but nothing is read
// or written out of bounds.
template <typename T>
void reorganize_tokens_backward(const ReorganizeSizes& sizes, const Tokens<T>& grad_tokens,
                                const Tokens<T>& x, const Tokens<accumulate_t<T>>& scores,
                                const int64_t* kept, T* grad_x, accumulate_t<T>* grad_scores, int64_t skip,
                                const Stream& stream);

}  // namespace cuda
}  // namespace evit
