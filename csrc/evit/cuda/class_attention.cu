#include "class_attention.cuh"

#include <algorithm>

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "class_attention";

// Threads of a block, at most and in a large batch. In 16 bits a thread has twice as much in flight.
constexpr int kMaxThreads = 512;
template <typename T>
constexpr int usual_threads = sizeof(T) == 2 ? 256 : 512;

// Where each head has a block of its own: the exponentials of its logits, and the inverse of their sum.
template <typename A>
struct SplitHeads {
  A* exponentials;  // [B, H, N], or null
  A* inverse;       // [B, H]
};

// Forward, a block for `span` tokens of a sequence, all heads: logits, softmax and mean in shared memory.
// With a log-sum-exp tokens are independent and span is small; else it is all of them. Or a block for one
// head, which leaves the mean to another launch.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 1)
    class_attention_kernel(Attention<T> job, accumulate_t<T>* scores, int span, int spans,
                           SplitHeads<accumulate_t<T>> split) {
  using A = accumulate_t<T>;
  const bool is_split = split.exponentials != nullptr;
  const int all_heads = static_cast<int>(job.sizes.heads), heads = is_split ? 1 : all_heads;
  const int first_head = is_split ? static_cast<int>(blockIdx.x) % all_heads : 0;
  const int64_t b = is_split ? blockIdx.x / all_heads : blockIdx.x / spans;
  const int num_tokens = static_cast<int>(job.sizes.tokens);
  const int first = is_split ? 0 : static_cast<int>(blockIdx.x % spans) * span;
  const int last = min(first + span, num_tokens);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  SharedParts parts;
  A* logits = parts.take<A>(static_cast<int64_t>(heads) * span);
  A* inverse = parts.take<A>(heads);

  const int keys = keys_per_warp<T>(job.lanes), tasks_per_head = (last - first + keys - 1) / keys;
  for (int task = warp; task < heads * tasks_per_head; task += warps) {
    const int h = task / tasks_per_head;
    warp_logits<kAligned, false>(job, b, first_head + h, first + task % tasks_per_head * keys, last,
                                 [&](int n, A logit) { logits[h * span + n - first] = logit; });
  }
  __syncthreads();
  for (int h = warp; h < heads; h += warps) {
    A* row = logits + h * span;
    const int count = last - first;
    const ClassAttentionInput<T>& input = job.input;
    const A shift = input.logsumexp != nullptr ? input.log_of_sum(b, h) : warp_largest(row, count);
    A sum = 0;
    for (int n = lane; n < count; n += kWarp) sum = add(sum, row[n] = exp(row[n] - shift));
    sum = warp_sum(sum);
    if (lane == 0) inverse[h] = input.logsumexp != nullptr ? A{1} : A{1} / sum;
  }
  __syncthreads();
  if (is_split) {
    A* exponentials = split.exponentials + static_cast<int64_t>(blockIdx.x) * num_tokens;
    for (int n = static_cast<int>(threadIdx.x); n < num_tokens; n += static_cast<int>(blockDim.x))
      exponentials[n] = logits[n];
    if (threadIdx.x == 0) split.inverse[blockIdx.x] = inverse[0];
    return;
  }
  for (int n = first + static_cast<int>(threadIdx.x); n < last; n += static_cast<int>(blockDim.x)) {
    A sum = 0;
    for (int h = 0; h < heads; ++h) sum = multiply_add(logits[h * span + n - first], inverse[h], sum);
    scores[b * num_tokens + n] = sum / static_cast<A>(heads);
  }
}

// The mean over the heads where each had a block of its own, in the same order as in one block.
template <typename A>
__global__ void __launch_bounds__(256, 4)
    split_mean_kernel(SplitHeads<A> split, int heads, int num_tokens, int chunks, A* scores) {
  const int64_t b = blockIdx.x / chunks;
  const int n = static_cast<int>(blockIdx.x % chunks * blockDim.x + threadIdx.x);
  if (n >= num_tokens) return;
  A sum = 0;
  for (int64_t head = b * heads; head < (b + 1) * heads; ++head)
    sum = multiply_add(split.exponentials[head * num_tokens + n], split.inverse[head], sum);
  scores[b * num_tokens + n] = sum / static_cast<A>(heads);
}

// Where the logits of a sequence do not fit into shared memory, they go through device memory [B, H, N], and
// the softmax takes two more launches.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(256, 2)
    logits_kernel(Attention<T> job, accumulate_t<T>* logits, int chunks) {
  const int64_t head = blockIdx.x / chunks;  // of all sequences
  const int num_tokens = static_cast<int>(job.sizes.tokens), keys = keys_per_warp<T>(job.lanes);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int first =
      (static_cast<int>(blockIdx.x % chunks) * warps + static_cast<int>(threadIdx.x) / kWarp) * keys;
  if (first >= num_tokens) return;  // a whole warp
  accumulate_t<T>* row = logits + head * num_tokens;
  const unsigned heads = static_cast<unsigned>(job.sizes.heads), b = blockIdx.x / chunks / heads;
  warp_logits<kAligned, false>(job, b, head % heads, first, num_tokens,
                               [&](int n, accumulate_t<T> logit) { row[n] = logit; });
}

template <typename A>
struct HeadStatistics {
  A shift;    // largest logit
  A inverse;  // of the sum of exponentials
};

// A block for each head.
template <typename A>
__global__ void __launch_bounds__(512, 2)
    statistics_kernel(const A* logits, int num_tokens, HeadStatistics<A>* statistics) {
  const A* row = logits + static_cast<int64_t>(blockIdx.x) * num_tokens;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  SharedParts parts;
  A* of_warps = parts.take<A>(kWarp);
  const auto over_warps = [&](A own, const auto& combine) {
    __syncthreads();  // the last result has been read
    if (lane == 0) of_warps[warp] = own;
    __syncthreads();
    A result = of_warps[0];
    for (int w = 1; w < warps; ++w) result = combine(result, of_warps[w]);
    return result;
  };
  A largest = static_cast<A>(-INFINITY);
  for (int n = thread; n < num_tokens; n += threads) largest = max(largest, row[n]);
  largest = over_warps(warp_max(largest), [](A a, A b) { return max(a, b); });
  A sum = 0;
  for (int n = thread; n < num_tokens; n += threads) sum = add(sum, exp(row[n] - largest));
  sum = over_warps(warp_sum(sum), [](A a, A b) { return a + b; });
  if (thread == 0) statistics[blockIdx.x] = {largest, A{1} / sum};
}

template <typename A>
__global__ void __launch_bounds__(256, 4) mean_kernel(const A* logits, const HeadStatistics<A>* statistics,
                                                      int heads, int num_tokens, int chunks, A* scores) {
  const int64_t b = blockIdx.x / chunks;
  const int n = static_cast<int>(blockIdx.x % chunks * blockDim.x + threadIdx.x);
  if (n >= num_tokens) return;
  A sum = 0;
  for (int h = 0; h < heads; ++h) {
    const HeadStatistics<A> head = statistics[b * heads + h];
    const A e = exp(logits[(b * heads + h) * num_tokens + n] - head.shift);
    sum = multiply_add(e, head.inverse, sum);
  }
  scores[b * num_tokens + n] = sum / static_cast<A>(heads);
}

template <typename A>
int64_t forward_shared_bytes(const ClassAttentionSizes& sizes, int64_t span) {
  return SharedParts::bytes<A>(sizes.heads * span) + SharedParts::bytes<A>(sizes.heads);
}

// Whether one block holds the logits of a whole sequence.
template <typename A>
bool fits(const ClassAttentionSizes& sizes) {
  return sizes.tokens <= kSharedMemory / static_cast<int64_t>(sizeof(A)) &&
         forward_shared_bytes<A>(sizes, sizes.tokens) <= kSharedMemory;
}

// A small batch of long sequences gets a block for each head, as one multiprocessor reads some 100 GB/s: so
// many bytes of keys in a sequence take it longer than they take many, and the second launch on top. An
// estimate, not measured. It depends on sizes alone, as the workspace does.
constexpr int64_t kSplitBatch = 8, kSplitBytes = 512 * 1024;
template <typename T>
bool splits_heads(const ClassAttentionSizes& sizes) {
  return sizes.batch <= kSplitBatch && sizes.heads > 1 && fits<accumulate_t<T>>(sizes) &&
         sizes.tokens * sizes.heads * sizes.channels * static_cast<int64_t>(sizeof(T)) >= kSplitBytes;
}

// Tokens that a block takes where a log-sum-exp is given.
template <typename A>
int64_t span_of(const ClassAttentionSizes& sizes) {
  int64_t span = std::min<int64_t>(sizes.tokens, 64);
  while (span > 1 && forward_shared_bytes<A>(sizes, span) > kSharedMemory) span /= 2;
  return span;
}

template <typename T, bool kAligned>
void forward(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input, accumulate_t<T>* scores,
             void* workspace, const Stream& stream) {
  using A = accumulate_t<T>;
  const Attention<T> job = {sizes, input, lanes_per_key<T>(sizes.channels), static_cast<A>(sizes.scale)};
  const bool independent = input.logsumexp != nullptr;
  constexpr int threads = 256;  // of the launches that follow another one
  const int tokens = static_cast<int>(sizes.tokens), heads = static_cast<int>(sizes.heads);
  const int parts = (tokens + threads - 1) / threads;
  if (!independent && splits_heads<T>(sizes)) {
    auto* exponentials = static_cast<A*>(workspace);
    const SplitHeads<A> split = {exponentials, exponentials + sizes.batch * sizes.heads * sizes.tokens};
    launch(kOperator, class_attention_kernel<T, kAligned>, sizes.batch * sizes.heads, kMaxThreads,
           SharedParts::bytes<A>(sizes.tokens) + SharedParts::bytes<A>(1), stream, job, scores, tokens, 1,
           split);
    launch(kOperator, split_mean_kernel<A>, sizes.batch * parts, threads, 0, stream, split, heads, tokens,
           parts, scores);
    return;
  }
  if (independent || fits<A>(sizes)) {
    const int64_t span = independent ? span_of<A>(sizes) : sizes.tokens;
    const int64_t spans = (sizes.tokens + span - 1) / span;
    // A batch that leaves multiprocessors idle gets larger blocks, to have more keys in flight.
    const bool small = sizes.batch * spans < multiprocessors(stream);
    const int of_block = independent ? 256 : small ? kMaxThreads : usual_threads<T>;
    launch(kOperator, class_attention_kernel<T, kAligned>, sizes.batch * spans, of_block,
           forward_shared_bytes<A>(sizes, span), stream, job, scores, static_cast<int>(span),
           static_cast<int>(spans), SplitHeads<A>{});
    return;
  }
  auto* statistics = static_cast<HeadStatistics<A>*>(workspace);
  auto* logits = reinterpret_cast<A*>(statistics + sizes.batch * sizes.heads);
  const int keys = threads / kWarp * keys_per_warp<T>(job.lanes), chunks = (tokens + keys - 1) / keys;
  launch(kOperator, logits_kernel<T, kAligned>, sizes.batch * sizes.heads * chunks, threads, 0, stream, job,
         logits, chunks);
  launch(kOperator, statistics_kernel<A>, sizes.batch * sizes.heads, 512, SharedParts::bytes<A>(kWarp),
         stream, static_cast<const A*>(logits), tokens, statistics);
  launch(kOperator, mean_kernel<A>, sizes.batch * parts, threads, 0, stream, static_cast<const A*>(logits),
         static_cast<const HeadStatistics<A>*>(statistics), heads, tokens, parts, scores);
}

}  // namespace

template <typename T>
int64_t class_attention_workspace(const ClassAttentionSizes& sizes, bool logsumexp) {
  using A = accumulate_t<T>;
  const int64_t heads = sizes.batch * sizes.heads;
  if (!logsumexp && splits_heads<T>(sizes))
    return heads * (sizes.tokens + 1) * static_cast<int64_t>(sizeof(A));
  if (logsumexp || fits<A>(sizes)) return 0;
  return heads * static_cast<int64_t>(sizeof(HeadStatistics<A>)) +
         heads * sizes.tokens * static_cast<int64_t>(sizeof(A));
}

template <typename T>
void class_attention(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
                     accumulate_t<T>* scores, void* workspace, const Stream& stream) {
  const DeviceGuard guard(stream.device, kOperator);
  check_sizes(sizes, kOperator);
  if (input.logsumexp != nullptr && forward_shared_bytes<accumulate_t<T>>(sizes, 1) > kSharedMemory)
    throw std::length_error(std::string(kOperator) + ": " + std::to_string(sizes.heads) +
                            " heads are more than is supported with logsumexp");
  if (input_aligned(sizes, input))
    forward<T, true>(sizes, input, scores, workspace, stream);
  else
    forward<T, false>(sizes, input, scores, workspace, stream);
}

#define EVIT_INSTANTIATE(T)                                                                   \
  template int64_t class_attention_workspace<T>(const ClassAttentionSizes&, bool);            \
  template void class_attention<T>(const ClassAttentionSizes&, const ClassAttentionInput<T>&, \
                                   accumulate_t<T>*, void*, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
