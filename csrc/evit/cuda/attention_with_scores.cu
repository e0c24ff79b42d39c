#include "../attention_with_scores.h"

#include <algorithm>
#include <cmath>

#include "mean_attention.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "attention_with_scores";
constexpr int kQueries = 16;  // of a warp
constexpr int kMaxWarps = 8;

// e^(dot * scale) = 2^(dot * factor). With a bias of the keys, what is called a dot product here becomes the
// exponent, and the factor 1, as soon as it is computed. A negative scale changes the sign of the queries, so
// that factor is not negative and the largest dot product has the largest probability.
template <typename T>
struct Job {
  Tokens<T> qkv;
  Tokens<float> key_bias;  // if there is one
  T* out;
  float* dots;              // [B, H, N], of the class token alone
  SoftmaxRow<float>* rows;  // [B, H, scored]
  int scored;               // queries whose scores are wanted: the class token alone, or all
  int heads, tokens;
  int blocks;  // that share the queries of a head
  float factor;
  bool negative;
};

// How the keys and values of a head, D channels each, pass through shared memory: in tiles of kKeys rows, in
// which the threads find 16 bytes of channels without conflicts between banks, one row after the other as
// well as eight rows at once: the rows exchange their 16 bytes.
template <typename T, int D>
struct Tiles {
  static constexpr int kKeys = D > 64 ? 32 : 64;
  static constexpr int kChunks = D / kWidth<T>;
  static constexpr int kElements = kKeys * D;
  static constexpr int kBytes = kElements * sizeof(T);

  static __device__ unsigned place(unsigned row, unsigned chunk) {
    constexpr unsigned exchanged = kChunks < 8 ? kChunks : 8;  // 8 are all banks
    return row * D + (chunk ^ (row / (8 / exchanged) & (exchanged - 1))) * kWidth<T>;
  }

  // Rows `first` to `first + rows` of the keys and of the values, `width` after them; zeros beyond the last
  // token: a probability of 0 times whatever lay in memory could be NaN.
  static __device__ void copy(const Job<T>& job, const T* keys, int64_t width, int first, int rows, T* tile) {
    // Not unrolled: a copy takes nothing but an address, and those of several would take registers.
    const unsigned thread = computed_here(threadIdx.x), chunk = thread % kChunks;
    const T* column = keys + chunk * kWidth<T>;
#pragma unroll 1
    for (int row = static_cast<int>(thread / kChunks); row < rows;
         row += static_cast<int>(blockDim.x / kChunks)) {
      const int n = first + row;
      const bool there = n < job.tokens;
      const T* from = column + (there ? n : 0) * job.qkv.stride_n;
      T* to = tile + place(static_cast<unsigned>(row), chunk);
      copy_vector_to_shared(to, from, there);
      copy_vector_to_shared(to + kElements, from + width, there);
    }
  }
};

// The attention of 16 queries, as the registers of a warp hold it. Of all of these a lane has two rows: row
// lane / 4 of the matrices, and the eighth after it.
template <typename T, int D>
struct Rows {
  using Tile = Tiles<T, D>;
  static constexpr int kKeys = 32;  // at once: more would take more registers than there are
  static constexpr int kSteps = kKeys / 16;
  static constexpr int kStepBytes = 16 * D * sizeof(T);

  uint32_t q[D / 16][4];
  float out[D / 8][4];
  float largest[2];  // dot product so far
  float sum[2];      // of exponentials, over this lane's keys

  // Queries from `first` on; beyond the last token, that one.
  __device__ void begin(const Job<T>& job, const T* queries, int first, int lane) {
    const T* row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = min(first + lane / 4 + 8 * r, job.tokens - 1);
      row[r] = queries + m * job.qkv.stride_n + lane % 4 * 2;
      largest[r] = -INFINITY;
      sum[r] = 0;
    }
    const uint32_t signs = job.negative ? 0x80008000u : 0;
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) q[c][i] = load_pair(row[i % 2] + 16 * c + i / 2 * 8) ^ signs;
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[c][i] = 0;
  }

  // Takes in kKeys keys of a tile, and the values that belong to them. kLast: there are only `left`. kClass:
  // the warp's first row is the class token's. Its dot products with these keys are written to `dots`, two of
  // every eight by each of the four lanes that have the row. kBias: `bias` has one for the first of these
  // keys, and `stride` after it for the next.
  template <bool kLast, bool kClass, bool kBias>
  __device__ void attend(SharedAddress keys, int left, float factor, const float* bias, int64_t stride,
                         float* dots, unsigned lane) {
    // Chunk 2 c + i of a row lies where chunk i does, but for the bits of 2 c: `place` exchanges bits, too.
    const auto chunks = [](unsigned place, int c) {
      constexpr unsigned two = 2 * sizeof(Vector<T>);
      return place ^ static_cast<unsigned>(c) * two;
    };
    lane = computed_here(lane);
    constexpr unsigned bytes = sizeof(T);
    const unsigned k_lane = Tile::place(lane / 16 * 8 + lane % 8, lane / 8 % 2) * bytes;
    const unsigned v_lane = Tile::place(lane % 16, lane / 16) * bytes;
    float s[2 * kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[2 * step][i] = s[2 * step + 1][i] = 0;
      if (kLast && 16 * step >= left) continue;
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t k[4];  // of eight keys, channels 16 c and 16 c + 8 onwards; of the next eight
        warp_load_matrices<false>(k, keys + step * kStepBytes + chunks(k_lane, c));
        warp_multiply_add<T>(s[2 * step], q[c], k[0], k[1]);
        warp_multiply_add<T>(s[2 * step + 1], q[c], k[2], k[3]);
      }
    }
    // This lane's keys are two of every eight.
    const int last = left - static_cast<int>(lane % 4 * 2);
    const auto there = [&](int j, int i) { return !kLast || 8 * j + i < last; };
    if constexpr (kBias) {
      bias += static_cast<int>(lane % 4 * 2) * stride;
#pragma unroll
      for (int j = 0; j < 2 * kSteps; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float b = there(j, i) ? multiply(bias[(8 * j + i) * stride], static_cast<float>(kLog2E)) : 0;
          s[j][i] = multiply_add(s[j][i], factor, b);
          s[j][2 + i] = multiply_add(s[j][2 + i], factor, b);
        }
      factor = 1;
    }
    if (kClass && lane < 4)
#pragma unroll
      for (int j = 0; j < 2 * kSteps; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (there(j, i)) dots[8 * j + 2 * lane + i] = s[j][i];
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = largest[r];
#pragma unroll
      for (int j = 0; j < 2 * kSteps; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (there(j, i)) largest[r] = max(largest[r], s[j][2 * r + i]);
      for (int distance = 1; distance < 4; distance *= 2)
        largest[r] = max(largest[r], __shfl_xor_sync(kFullWarp, largest[r], distance));
      shift[r] = shift_of(largest[r], factor);
      // Nothing but zeros and NaN has been summed up to now where no dot product was above -Inf.
      const float scaling = before == -INFINITY ? 0 : fast_exp2(shift_of(before, factor) - shift[r]);
      sum[r] = multiply(sum[r], scaling);
#pragma unroll
      for (int c = 0; c < D / 8; ++c) out[c][2 * r] *= scaling, out[c][2 * r + 1] *= scaling;
    }
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float p = fast_exp2(multiply_add(s[j][i], factor, -shift[i / 2]));
        s[j][i] = there(j, i % 2) ? p : 0;
        sum[i / 2] = add(sum[i / 2], s[j][i]);
      }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (kLast && 16 * step >= left) continue;
      // As results, a lane holds just those probabilities that it has to bring as factors.
      const uint32_t p[4] = {narrow_pair<T>(s[2 * step][0], s[2 * step][1]),
                             narrow_pair<T>(s[2 * step][2], s[2 * step][3]),
                             narrow_pair<T>(s[2 * step + 1][0], s[2 * step + 1][1]),
                             narrow_pair<T>(s[2 * step + 1][2], s[2 * step + 1][3])};
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t v[4];  // of channels 16 c onwards, eight keys and the next eight; of channels 16 c + 8
        warp_load_matrices<true>(v, keys + Tile::kBytes + step * kStepBytes + chunks(v_lane, c));
        warp_multiply_add<T>(out[2 * c], p, v[0], v[1]);
        warp_multiply_add<T>(out[2 * c + 1], p, v[2], v[3]);
      }
    }
  }

  // The sums of all lanes of a row, and their inverse.
  __device__ void finish(float (&inverse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      for (int distance = 1; distance < 4; distance *= 2)
        sum[r] += __shfl_xor_sync(kFullWarp, sum[r], distance);
      inverse[r] = 1 / sum[r];
    }
  }

  // What is subtracted from exponents. Where all dot products are -Inf every exponential is 0, and the
  // inverse of their sum makes NaN of it. Rounded for itself: fused with the subtraction of another shift,
  // the same shift would not cancel, and every 32 keys would multiply the sums by that error once more.
  static __device__ float shift_of(float largest, float factor) {
    return largest == -INFINITY ? 0 : multiply(largest, factor);
  }
};

// A block for up to 16 * kMaxWarps queries of a head, 16 to a warp. It goes over all keys and values, a tile
// at a time, while the next one is on its way.
template <typename T, int D, bool kBias>
__global__ void __launch_bounds__(kMaxWarps* kWarp, D > 64 ? 1 : 2) attention_with_scores_kernel(Job<T> job) {
  using Tile = Tiles<T, D>;
  const int head = static_cast<int>(blockIdx.x) / job.blocks, b = head / job.heads, h = head % job.heads;
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  const int warps = static_cast<int>(blockDim.x / kWarp);
  const int first = (static_cast<int>(blockIdx.x) % job.blocks * warps + warp) * kQueries;
  const bool takes_part = first < job.tokens;  // or there are no queries left for this warp
  const int64_t width = static_cast<int64_t>(job.heads) * D;
  const T* queries = job.qkv.row(b, 0) + h * D;
  const T* keys = queries + width;
  T* shared = static_cast<T*>(shared_memory());
  const auto tile = [&](int t) { return shared + t % 2 * 2 * Tile::kElements; };
  // As many rows of a tile as are multiplied.
  const auto rows_of = [&](int t) { return min(Tile::kKeys, (job.tokens - t * Tile::kKeys + 15) / 16 * 16); };

  Tile::copy(job, keys, width, 0, rows_of(0), tile(0));
  Rows<T, D> rows;
  rows.begin(job, queries, first, lane);
  // has_class_row: the warp has the class token's query, in the first row of its first four lanes.
  const auto attend_tile = [&](auto has_class_row, int t) {
    constexpr bool kClass = decltype(has_class_row)::value;
    constexpr int some = Rows<T, D>::kKeys, kRowBytes = D * sizeof(T);
    const SharedAddress keys_at = shared_address(tile(t));
#pragma unroll 1
    for (int key = 0; key < Tile::kKeys; key += some) {
      const int n = t * Tile::kKeys + key, left = job.tokens - n;
      float* dots = job.dots + (int64_t{head} * job.tokens + n);
      const float* bias = kBias ? job.key_bias.row(b, n) : nullptr;
      const int64_t stride = kBias ? job.key_bias.stride_n : 0;
      const SharedAddress at = keys_at + key * kRowBytes;
      if (left >= some)
        rows.template attend<false, kClass, kBias>(at, left, job.factor, bias, stride, dots, lane);
      else if (left > 0)
        rows.template attend<true, kClass, kBias>(at, left, job.factor, bias, stride, dots, lane);
    }
  };
  const int tiles = (job.tokens + Tile::kKeys - 1) / Tile::kKeys;
  for (int t = 0; t < tiles; ++t) {
    copies_arrived();
    __syncthreads();  // this tile is there, and nobody needs the one before
    if (t + 1 < tiles) Tile::copy(job, keys, width, (t + 1) * Tile::kKeys, rows_of(t + 1), tile(t + 1));
    if (!takes_part) continue;
    if (first == 0 && job.scored == 1)  // for the whole warp
      attend_tile(std::true_type{}, t);
    else
      attend_tile(std::false_type{}, t);
  }
  float inverse[2];
  rows.finish(inverse);
  if (job.scored > 1) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = first + lane / 4 + 8 * r;
      if (lane % 4 == 0 && m < job.tokens)
        job.rows[int64_t{head} * job.tokens + m] = {rows.shift_of(rows.largest[r], kBias ? 1 : job.factor),
                                                    inverse[r]};
    }
  } else if (first == 0 && lane == 0)
    job.rows[head] = {rows.shift_of(rows.largest[0], kBias ? 1 : job.factor), inverse[0]};

  // Through shared memory, so that 16 bytes can be written at a time.
  __syncthreads();  // nobody needs the last tile
  T* own = shared + warp * kQueries * D;
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = rows.out[c][2 * r] * inverse[r], high = rows.out[c][2 * r + 1] * inverse[r];
      store_shared_pair(own + Tile::place(lane / 4 + 8 * r, c) + lane % 4 * 2, narrow_pair<T>(low, high));
    }
  __syncwarp();
  T* out = job.out + (int64_t{b} * job.tokens + first) * width + h * D;
#pragma unroll
  for (int i = lane; i < kQueries * Tile::kChunks; i += kWarp) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (first + row < job.tokens)
      store<true>(out + row * width + chunk * kWidth<T>, load_shared(own + Tile::place(row, chunk)),
                  kWidth<T>);
  }
}

// The mean of the class token's probabilities over the heads, a thread for each token.
__global__ void __launch_bounds__(256)
    class_scores_kernel(const float* dots, const SoftmaxRow<float>* class_rows, int heads, int tokens,
                        int chunks, float factor, float* scores) {
  const int64_t b = blockIdx.x / chunks;
  const int n = static_cast<int>(blockIdx.x % chunks * blockDim.x + threadIdx.x);
  if (n >= tokens) return;
  float sum = 0;
  for (int64_t head = b * heads; head < (b + 1) * heads; ++head) {
    const SoftmaxRow<float> row = class_rows[head];
    const float p = fast_exp2(multiply_add(dots[head * tokens + n], factor, -row.shift));
    sum = multiply_add(p, row.inverse, sum);
  }
  scores[b * tokens + n] = sum / static_cast<float>(heads);
}

template <typename T, int D>
void run(const AttentionWithScoresSizes& sizes, Job<T> job, const Stream& stream) {
  using Tile = Tiles<T, D>;
  constexpr int64_t shared_bytes = 2 * 2 * Tile::kElements * sizeof(T);
  static_assert(shared_bytes <= kSharedMemory && kMaxWarps * kQueries * D * sizeof(T) <= shared_bytes);
  const int64_t heads = sizes.batch * sizes.heads;
  const Shares shares = share_out_warps((sizes.tokens + kQueries - 1) / kQueries, kMaxWarps, heads, stream);
  job.blocks = shares.blocks;
  launch(kOperator,
         job.key_bias.data != nullptr ? attention_with_scores_kernel<T, D, true>
                                      : attention_with_scores_kernel<T, D, false>,
         heads * job.blocks, shares.warps * kWarp, shared_bytes, stream, job);
}

}  // namespace

template <typename T>
bool attention_with_scores_available(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv) {
  return (sizes.channels == 32 || sizes.channels == 64 || sizes.channels == 128) &&
         aligned(qkv.data, qkv.stride_b, qkv.stride_n);
}

int64_t attention_with_scores_workspace(const AttentionWithScoresSizes& sizes) {
  const int64_t heads = sizes.batch * sizes.heads, scored = sizes.mean ? sizes.tokens : 1;
  return heads * scored * static_cast<int64_t>(sizeof(SoftmaxRow<float>)) +
         heads * sizes.tokens * static_cast<int64_t>(sizeof(float));
}

template <typename T>
void attention_with_scores(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv,
                           const Tokens<float>& key_bias, T* out, float* scores, void* workspace,
                           const Stream& stream) {
  if (!attention_with_scores_available(sizes, qkv))
    throw std::invalid_argument(std::string(kOperator) + ": " + std::to_string(sizes.channels) +
                                " channels a head, or rows that are not aligned, are not supported");
  const DeviceGuard guard(stream.device, kOperator);
  check_count(sizes.tokens, "tokens", kOperator);
  check_count(sizes.heads, "heads", kOperator);
  check_count(sizes.heads * sizes.channels, "channels", kOperator);
  if (sizes.batch == 0 || sizes.tokens == 0) return;
  const int heads = static_cast<int>(sizes.heads), tokens = static_cast<int>(sizes.tokens);
  const float factor = static_cast<float>(std::abs(sizes.scale) * kLog2E);
  const int scored = sizes.mean ? tokens : 1;
  auto* rows = static_cast<SoftmaxRow<float>*>(workspace);
  auto* of_keys = reinterpret_cast<float*>(rows + sizes.batch * sizes.heads * scored);  // [B, H, N]
  const Job<T> job = {qkv, key_bias, out, of_keys, rows, scored, heads, tokens, 0, factor, sizes.scale < 0};
  if (sizes.channels == 32)
    run<T, 32>(sizes, job, stream);
  else if (sizes.channels == 64)
    run<T, 64>(sizes, job, stream);
  else
    run<T, 128>(sizes, job, stream);
  if (sizes.mean) {
    const int64_t channels = sizes.channels;
    const MeanAttentionInput<T> input = {
        qkv.data,     qkv.stride_b, channels,    qkv.stride_n, qkv.data + sizes.heads * channels,
        qkv.stride_b, channels,     qkv.stride_n};
    mean_from_rows<T>({sizes.batch, sizes.heads, sizes.tokens, sizes.tokens, channels, sizes.scale}, input,
                      key_bias, rows, of_keys, scores, stream);
    return;
  }
  constexpr int threads = 256;
  const int chunks = (tokens + threads - 1) / threads;
  launch(kOperator, class_scores_kernel, sizes.batch * chunks, threads, 0, stream,
         static_cast<const float*>(of_keys), static_cast<const SoftmaxRow<float>*>(rows), heads, tokens,
         chunks, key_bias.data != nullptr ? 1 : factor, scores);
}

#define EVIT_INSTANTIATE(T)                                                                            \
  template bool attention_with_scores_available<T>(const AttentionWithScoresSizes&, const Tokens<T>&); \
  template void attention_with_scores<T>(const AttentionWithScoresSizes&, const Tokens<T>&,            \
                                         const Tokens<float>&, T*, float*, void*, const Stream&);
EVIT_INSTANTIATE(Half)
EVIT_INSTANTIATE(BFloat16)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
