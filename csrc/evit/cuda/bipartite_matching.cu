#include "../bipartite_matching.h"

#include "select.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "bipartite_matching";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = kWarp;               // tokens of A that a block matches, and of B that it looks at
constexpr int kWarpRows = kTile / kWarps;  // tokens of A that a warp matches

// What the kernels hand on, in the workspace.
template <typename A>
struct Matched {
  using Key = decltype(order_key(A{}));
  A* means;       // [B, N, D]: the mean key of each token, of length 1
  Key* cosines;   // [B, N / 2 rounded up]: of each of A with its partner, as a key of the order
  int* partners;  // the same shape: the number of that among B

  static int64_t bytes(const MatchingSizes& sizes) {
    const int64_t of_a = buffer_size(sizes.batch, sizes.in_a());
    return SharedParts::bytes<A>(buffer_size(sizes.batch, sizes.tokens, sizes.channels)) +
           SharedParts::bytes<Key>(of_a) + SharedParts::bytes<int>(of_a);
  }
  static Matched in(void* workspace, const MatchingSizes& sizes) {
    char* memory = static_cast<char*>(workspace);
    char* after = memory + SharedParts::bytes<A>(sizes.batch * sizes.tokens * sizes.channels);
    char* last = after + SharedParts::bytes<Key>(sizes.batch * sizes.in_a());
    return {reinterpret_cast<A*>(memory), reinterpret_cast<Key*>(after), reinterpret_cast<int*>(last)};
  }
};

// A warp averages the keys of a token.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    mean_key_kernel(MatchingSizes sizes, Keys<T> keys, accumulate_t<T>* means) {
  using A = accumulate_t<T>;
  const int64_t token = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (token >= sizes.batch * sizes.tokens) return;  // the same for the whole warp
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int channels = static_cast<int>(sizes.channels), heads = static_cast<int>(sizes.heads);
  const T* first = keys.row(token / sizes.tokens, 0, token % sizes.tokens);
  A* mean = means + token * channels;
  A square = 0;
  for (int c = lane; c < channels; c += kWarp) {
    A sum = 0;
    for (int h = 0; h < heads; ++h) sum += widen(first[h * keys.stride_h + c]);
    sum /= static_cast<A>(heads);
    mean[c] = sum;
    square = multiply_add(sum, sum, square);
  }
  const A length = sqrt(warp_sum(square));
  const A factor = A{1} / (length < A{1e-12} ? A{1e-12} : length);  // NaN stays
  for (int c = lane; c < channels; c += kWarp) mean[c] *= factor;
}

// A block finds the partners of kTile tokens of A: a lane looks at one token of B in each tile of these.
template <typename A>
__global__ void __launch_bounds__(kThreads, 2)
    partner_kernel(MatchingSizes sizes, Matched<A> matched, int chunks) {
  using Key = typename Matched<A>::Key;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t b = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x % chunks) * kTile,
            channels = static_cast<int>(sizes.channels);
  const int in_a = static_cast<int>(sizes.in_a()), in_b = static_cast<int>(sizes.in_b());
  const A* means = matched.means + b * sizes.tokens * channels;
  SharedParts parts;
  A* of_a = parts.take<A>(kTile * kTile);
  A* of_b = parts.take<A>(kTile * (kTile + 1));  // one more, so that lanes read different banks
  Key best[kWarpRows] = {};                      // below the key of every number
  int partner[kWarpRows] = {};
  for (int start = 0; start < in_b; start += kTile) {
    A cosine[kWarpRows] = {};
    for (int from = 0; from < channels; from += kTile) {
      for (int row = warp; row < kTile; row += kWarps) {
        const int c = from + lane;
        const bool there = c < channels;
        of_a[row * kTile + lane] =
            there && first + row < in_a ? means[int64_t{2} * (first + row) * channels + c] : A{0};
        of_b[row * (kTile + 1) + lane] =
            there && start + row < in_b ? means[(int64_t{2} * (start + row) + 1) * channels + c] : A{0};
      }
      __syncthreads();
      for (int c = 0; c < kTile; ++c) {
        const A value = of_b[lane * (kTile + 1) + c];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r)
          cosine[r] = multiply_add(of_a[(warp * kWarpRows + r) * kTile + c], value, cosine[r]);
      }
      __syncthreads();
    }
    if (start + lane >= in_b) continue;  // after the last barrier: it is the last tile
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r)
      if (const Key key = order_key(cosine[r]); key > best[r]) {
        best[r] = key;
        partner[r] = start + lane;
      }
  }
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Key key = __shfl_xor_sync(kFullWarp, best[r], distance);
      const int other = __shfl_xor_sync(kFullWarp, partner[r], distance);
      if (key > best[r] || (key == best[r] && other < partner[r])) {
        best[r] = key;
        partner[r] = other;
      }
    }
    const int row = first + warp * kWarpRows + r;
    if (lane != 0 || row >= in_a) continue;
    matched.cosines[b * in_a + row] = best[r];
    matched.partners[b * in_a + row] = partner[r];
  }
}

// A block selects the tokens of A that go, and counts those that stay.
template <typename A>
__global__ void __launch_bounds__(kThreads, 2)
    owner_kernel(MatchingSizes sizes, Matched<A> matched, int64_t* kept, int64_t* owner) {
  using Key = typename Matched<A>::Key;
  const int64_t b = blockIdx.x;
  const int in_a = static_cast<int>(sizes.in_a()), tokens = static_cast<int>(sizes.tokens);
  const Key* cosines = matched.cosines + b * in_a;
  int64_t* stays = kept + b * sizes.out;
  int64_t* place = owner + b * tokens;
  SharedParts parts;
  SelectScratch& scratch = *parts.take<SelectScratch>(1);
  const auto key_at = [&](int i) { return cosines[i]; };
  const auto threshold = select_threshold<Key>(scratch, in_a, static_cast<int>(sizes.merged()), key_at);
  place_selected(scratch, in_a, threshold, key_at, [&](int i, bool goes, int gone) {
    const int n = 2 * i;
    place[n] = goes ? -1 : n - gone;
    if (!goes) stays[n - gone] = n;
    if (n + 1 >= tokens) return;
    const int next = n + 1 - gone - (goes ? 1 : 0);
    place[n + 1] = next;
    stays[next] = n + 1;
  });
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < in_a; i += kThreads)
    if (place[2 * i] < 0) place[2 * i] = place[2 * matched.partners[b * in_a + i] + 1];
}

}  // namespace

template <typename T>
int64_t bipartite_matching_workspace(const MatchingSizes& sizes) {
  return Matched<accumulate_t<T>>::bytes(sizes);
}

template <typename T>
void bipartite_matching(const MatchingSizes& sizes, const Keys<T>& keys, int64_t* kept, int64_t* owner,
                        void* workspace, const Stream& stream) {
  using A = accumulate_t<T>;
  const DeviceGuard guard(stream.device, kOperator);
  check_count(sizes.tokens, "tokens", kOperator);
  check_count(sizes.heads, "heads", kOperator);
  check_count(sizes.channels, "channels", kOperator);
  if (sizes.batch == 0) return;
  const auto matched = Matched<A>::in(workspace, sizes);
  const int chunks = static_cast<int>((sizes.in_a() + kTile - 1) / kTile);
  launch(kOperator, mean_key_kernel<T>, (sizes.batch * sizes.tokens + kWarps - 1) / kWarps, kThreads, 0,
         stream, sizes, keys, matched.means);
  launch(kOperator, partner_kernel<A>, sizes.batch * chunks, kThreads,
         SharedParts::bytes<A>(kTile * kTile) + SharedParts::bytes<A>(kTile * (kTile + 1)), stream, sizes,
         matched, chunks);
  launch(kOperator, owner_kernel<A>, sizes.batch, kThreads, SharedParts::bytes<SelectScratch>(1), stream,
         sizes, matched, kept, owner);
}

#define EVIT_INSTANTIATE(T)                                                                            \
  template int64_t bipartite_matching_workspace<T>(const MatchingSizes&);                              \
  template void bipartite_matching<T>(const MatchingSizes&, const Keys<T>&, int64_t*, int64_t*, void*, \
                                      const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
