// The forward pass of reorganize_tokens and add_reorganize_norm.
//
// Up to kSelectInPlace patches, one launch does everything: every block selects for itself, which costs less
// than a launch, then moves its slice of the columns, in one pass over the rows in their order. In a large
// batch the slice is all of 384 columns in 16 bits, and the selection is made once. Longer sequences take
// three launches: the selection, with a block for each sequence (or several: select_chunks.cuh); the rows, in
// chunks, with partial sums; the sum of those.
#pragma once

#include <algorithm>

#include "../reorganize_tokens.h"
#include "rows.cuh"
#include "select_chunks.cuh"

namespace evit::cuda {

constexpr int kSelectInPlace = 1024;
constexpr int kSelectThreads = 1024;

// What the kernels pass on through device memory where the selection has a launch of its own.
template <typename A>
struct ReorganizeWorkspace {
  int* place;   // [B, N - P]: where a patch goes among the kept ones, or -1
  A* weights;   // [B, N - P]: its score
  A* partials;  // [B, chunks, C]: sums over the rows of a chunk

  static bool needed(const ReorganizeSizes& sizes, bool same_type) {
    return sizes.patches() > kSelectInPlace || !same_type;
  }
  static int64_t chunks(const ReorganizeSizes& sizes) { return (sizes.tokens + kChunkRows - 1) / kChunkRows; }
  static int64_t bytes(const ReorganizeSizes& sizes) {
    const int64_t patches = sizes.batch * sizes.patches();
    return SharedParts::bytes<int>(patches) + SharedParts::bytes<A>(patches) +
           (sizes.fuse ? SharedParts::bytes<A>(sizes.batch * chunks(sizes) * sizes.channels) : 0);
  }
  static ReorganizeWorkspace in(void* memory, const ReorganizeSizes& sizes) {
    const int64_t patches = sizes.batch * sizes.patches();
    auto* next = static_cast<unsigned char*>(memory);
    ReorganizeWorkspace workspace;
    workspace.place = reinterpret_cast<int*>(next);
    next += SharedParts::bytes<int>(patches);
    workspace.weights = reinterpret_cast<A*>(next);
    next += SharedParts::bytes<A>(patches);
    workspace.partials = reinterpret_cast<A*>(next);
    return workspace;
  }
};

// Everything a kernel needs to know, as one argument.
template <typename T>
struct Reorganize {
  using A = accumulate_t<T>;
  ReorganizeSizes sizes;
  Tokens<T> x;
  Tokens<T> branch;  // added to x where kAdd
  Tokens<A> scores;  // read where the selection is made in place
  T* tokens;
  int64_t* kept;
  Slices slices;
  int chunks;  // 1 where the selection is made in place
  ReorganizeWorkspace<A> workspace;
};

template <typename S, typename A>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_kernel(ReorganizeSizes sizes, Tokens<S> scores, int64_t* kept, int* place, A* weights) {
  const int64_t b = blockIdx.x;
  const int patches = static_cast<int>(sizes.patches()), keep = static_cast<int>(sizes.keep);
  const S* row = scores.row(b, 0);
  SharedParts parts;
  SelectScratch& scratch = *parts.take<SelectScratch>(1);
  const auto key_at = [&](int i) { return order_key(row[i * scores.stride_n]); };
  const auto threshold = select_threshold<decltype(order_key(S{}))>(scratch, patches, keep, key_at);
  place_selected(scratch, patches, threshold, key_at, [&](int i, bool selected, int position) {
    if (selected) kept[b * keep + position] = i;
    place[b * patches + i] = selected ? position : -1;
    weights[b * patches + i] = static_cast<A>(row[i * scores.stride_n]);
  });
}

// kOwn: how many row lanes a thread serves (rows.cuh). The rows that it has in flight are of its lanes, or of
// its only one.
template <typename T, bool kAligned, bool kAdd, bool kSelect, int kOwn>
__global__ void __launch_bounds__(kOwn == 1 ? kRowLanes * 16 : kRowLanes / kOwn * kWideVectors,
                                  kAligned && sizeof(T) < 8 && !(kAdd && (kOwn > 1 || !kSelect)) ? 2 : 1)
    reorganize_kernel(Reorganize<T> job) {
  using A = accumulate_t<T>;
  using Key = decltype(order_key(A{}));
  constexpr int W = kWidth<T>;
  const ReorganizeSizes& sizes = job.sizes;
  const int slice = static_cast<int>(blockIdx.x % job.slices.count);
  const int chunk = static_cast<int>(blockIdx.x / job.slices.count % job.chunks);
  const int64_t b = blockIdx.x / job.slices.count / job.chunks;
  const int num_tokens = static_cast<int>(sizes.tokens), prefix = static_cast<int>(sizes.prefix);
  const int patches = num_tokens - prefix, keep = static_cast<int>(sizes.keep);

  const unsigned thread = threadIdx.x, vectors = static_cast<unsigned>(job.slices.vectors);
  const int64_t column = (static_cast<int64_t>(slice) * vectors + thread % vectors) * W;
  const int64_t channels = sizes.channels, left = channels - column;
  const int first = chunk * kChunkRows, last = kSelect ? num_tokens : min(first + kChunkRows, num_tokens);
  int row = first + static_cast<int>(thread / vectors) * kOwn;
  if (left <= 0) row = last;

  // The rows row, row + apart ... that this thread has in flight.
  constexpr int unroll = kAdd && kOwn == 1 ? kUnroll / 2 : kUnroll;
  constexpr int apart = kOwn == 1 ? kRowLanes : 1, all = kOwn == 1 ? unroll * kRowLanes : kRowLanes;
  static_assert(kOwn == 1 || kOwn == unroll);
  Vector<T> value[unroll] = {}, added[unroll] = {};
  const auto load_rows = [&] {
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int n = row + u * apart;
      if (n < last) value[u] = load<kAligned>(job.x.row(b, n) + column, left);
      if (kAdd && n < last) added[u] = load<kAligned>(job.branch.row(b, n) + column, left);
    }
  };
  load_rows();  // under way while the selection is made

  SharedParts parts;
  A* scratch = parts.take<A>((kOwn == 1 ? static_cast<int>(blockDim.x) / kWarp : kRowLanes / kOwn) *
                             Columns<W>(vectors).count());
  const int* place = job.workspace.place + b * patches;
  const A* weights = job.workspace.weights + b * patches;
  if constexpr (kSelect) {
    SelectScratch& select = *parts.take<SelectScratch>(1);
    int* own_place = parts.take<int>(patches);
    A* own_weights = parts.take<A>(patches);
    for (int i = static_cast<int>(thread); i < patches; i += static_cast<int>(blockDim.x))
      own_weights[i] = *job.scores.row(b, i);
    const auto key_at = [&](int i) { return order_key(own_weights[i]); };
    // Its first barrier is that of the weights, too.
    const auto threshold = select_threshold<Key>(select, patches, keep, key_at);
    place_selected(select, patches, threshold, key_at, [&](int i, bool selected, int position) {
      own_place[i] = selected ? position : -1;
      if (selected && slice == 0) job.kept[b * keep + position] = i;
    });
    place = own_place;
    weights = own_weights;
  }

  A sum[kOwn][W] = {};
  T* out = job.tokens + b * sizes.out_tokens() * channels + column;
  while (row < last) {
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int n = row + u * apart;
      if (n >= last) continue;
      A element[W];
      if constexpr (kAdd) {
        A other[W];
        widen_vector(value[u], element);
        widen_vector(added[u], other);
#pragma unroll
        for (int w = 0; w < W; ++w) element[w] += other[w];
        value[u] = narrow_vector<T>(element);
      }
      const int to = n < prefix ? n - prefix : place[n - prefix];
      if (n < prefix || to >= 0) {
        store<kAligned>(out + (prefix + to) * channels, value[u], left);
      } else if (sizes.fuse) {
        const A weight = weights[n - prefix];
        widen_vector(value[u], element);
#pragma unroll
        for (int w = 0; w < W; ++w) sum[u % kOwn][w] = multiply_add(weight, element[w], sum[u % kOwn][w]);
      }
    }
    row += all;
    load_rows();
  }
  if (!sizes.fuse) return;
  const auto write = [&](int offset, A total) {
    const int64_t c = static_cast<int64_t>(slice) * vectors * W + offset;
    if (c >= channels) return;
    if constexpr (kSelect)
      job.tokens[((b + 1) * sizes.out_tokens() - 1) * channels + c] = narrow<T>(total);
    else
      job.workspace.partials[(b * job.chunks + chunk) * channels + c] = total;
  };
  if constexpr (kOwn == 1)
    sum_row_lanes<W>(sum[0], job.slices.vectors, scratch, write);
  else
    sum_own_row_lanes<W>(sum, job.slices.vectors, scratch, write);
}

template <typename T, bool kAligned, bool kAdd>
void launch_reorganize(const char* what, const Reorganize<T>& job, bool select, const Stream& stream) {
  using A = accumulate_t<T>;
  constexpr int64_t selection = SharedParts::bytes<SelectScratch>(1) +
                                SharedParts::bytes<int>(kSelectInPlace) +
                                SharedParts::bytes<A>(kSelectInPlace);
  static_assert(selection + row_sum_bytes<T>({16, 1, 1}) <= kSharedMemory);
  static_assert(selection + row_sum_bytes<T>({kWideVectors, 1, kUnroll}) <= kSharedMemory);
  int64_t shared = row_sum_bytes<T>(job.slices);
  if (select)
    shared += SharedParts::bytes<SelectScratch>(1) + SharedParts::bytes<int>(job.sizes.patches()) +
              SharedParts::bytes<A>(job.sizes.patches());
  launch(what,
         !select               ? reorganize_kernel<T, kAligned, kAdd, false, 1>
         : job.slices.own == 1 ? reorganize_kernel<T, kAligned, kAdd, true, 1>
                               : reorganize_kernel<T, kAligned, kAdd, true, kUnroll>,
         job.sizes.batch * job.chunks * job.slices.count, job.slices.threads(), shared, stream, job);
}

// kAdd: the tokens are x + branch, else branch is not read.
template <typename T, typename S, bool kAdd>
void reorganize(const char* what, const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<T>& branch,
                const Tokens<S>& scores, T* tokens, int64_t* kept, void* memory, const Stream& stream) {
  using A = accumulate_t<T>;
  if (sizes.batch == 0) return;
  check_count(sizes.tokens, "tokens", what);
  const DeviceGuard guard(stream.device, what);
  const bool is_aligned = aligned(x.data, x.stride_b, x.stride_n, sizes.channels) && aligned(tokens) &&
                          (!kAdd || aligned(branch.data, branch.stride_b, branch.stride_n));
  const bool select = !ReorganizeWorkspace<A>::needed(sizes, std::is_same_v<S, A>);
  Reorganize<T> job = {sizes, x, branch, {}, tokens, kept, {}, 1, {}};
  if (select) {
    if constexpr (std::is_same_v<S, A>) job.scores = scores;
  } else {
    job.chunks = static_cast<int>(ReorganizeWorkspace<A>::chunks(sizes));
    job.workspace = ReorganizeWorkspace<A>::in(memory, sizes);
    int* place = job.workspace.place;
    A* weights = job.workspace.weights;
    if (selects_in_chunks<S>(sizes))
      select_in_chunks(what, sizes, scores,
                       {static_cast<unsigned char*>(memory) + ReorganizeWorkspace<A>::bytes(sizes), sizes},
                       kept, place, weights, stream);
    else
      launch(what, select_kernel<S, A>, sizes.batch, kSelectThreads, SharedParts::bytes<SelectScratch>(1),
             stream, sizes, scores, kept, place, weights);
  }
  // Without channels there still are kept tokens to name.
  const int64_t columns = std::max<int64_t>(sizes.channels, 1);
  job.slices = select ? share_out_columns_widely<T>(sizes.batch, columns, stream)
                      : share_out_columns<T>(sizes.batch * job.chunks, columns, stream);
  if (is_aligned)
    launch_reorganize<T, true, kAdd>(what, job, select, stream);
  else
    launch_reorganize<T, false, kAdd>(what, job, select, stream);
  if (select || !sizes.fuse) return;
  sum_partials<T>(what, job.workspace.partials, sizes.batch, job.chunks, sizes.channels,
                  tokens + (sizes.out_tokens() - 1) * sizes.channels, sizes.out_tokens() * sizes.channels,
                  stream);
}

}  // namespace evit::cuda
