// bipartite_matching: which tokens are merged into which, by ToMe's rule (Bolya et al., ICLR 2023, section
// 3).
//
// keys [B, H, N, D] with a dense last dimension and any other strides. The tokens with even numbers are A,
// those with odd ones B. Each of A has as its partner the token of B whose key, averaged over heads, has the
// largest cosine with its own; the N - M of A with the largest ones become part of their partners. kept
// [B, M], dense: the others, ascending; owner [B, N], dense: the number of each token among those.
//
// M in [N - floor(N / 2), N); B may be 0, H and D at least 1, N at least 2. Cosines are computed in the
// accumulation type; a key's length counts as at least 1e-12, so that one of zeros has the cosine 0. Ties go
// to the lower number, NaN counts as the largest, -0 and +0 are equal. Deterministic. Not differentiable.
#pragma once

#include "executor.h"
#include "stream.h"
#include "types.h"

namespace evit {

struct MatchingSizes {
  int64_t batch;     // B
  int64_t heads;     // H
  int64_t tokens;    // N
  int64_t channels;  // D
  int64_t out;       // M

  EVIT_HOST_DEVICE int64_t in_a() const { return (tokens + 1) / 2; }
  EVIT_HOST_DEVICE int64_t in_b() const { return tokens / 2; }
  EVIT_HOST_DEVICE int64_t merged() const { return tokens - out; }
};

template <typename T>
struct Keys {
  const T* data;
  int64_t stride_b, stride_h, stride_n;

  EVIT_HOST_DEVICE const T* row(int64_t b, int64_t h, int64_t n) const {
    return data + b * stride_b + h * stride_h + n * stride_n;
  }
};

namespace cpu {

template <typename T>
void bipartite_matching(const MatchingSizes& sizes, const Keys<T>& keys, int64_t* kept, int64_t* owner,
                        const Executor& executor);

}  // namespace cpu

namespace cuda {

// The bytes of device memory that bipartite_matching<T> needs as `workspace`, aligned to 16.
template <typename T>
int64_t bipartite_matching_workspace(const MatchingSizes& sizes);

// Like the CPU version, but sums over heads and channels have another order. Three launches.
template <typename T>
void bipartite_matching(const MatchingSizes& sizes, const Keys<T>& keys, int64_t* kept, int64_t* owner,
                        void* workspace, const Stream& stream);

}  // namespace cuda
}  // namespace evit
