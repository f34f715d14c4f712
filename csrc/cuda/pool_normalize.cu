// pooled_b = sum_t w_bt h_bt / sum_t w_bt ;  out_b = pooled_b / max(|pooled_b|, 1e-12)
//
// One block per sequence. It reduces the mask row to its first and last token, then `lanes` threads
// side by side read a row with 16-byte loads while `groups` of them take every groups-th row; shared
// memory adds the groups and holds the pooled row until its norm is known.
// Limits: with fewer sequences than the GPU has SMs the others are idle; hidden is bounded by shared
// memory, about 36,000 on sm_80 and 53,000 on sm_90. Rows that are not 16-byte aligned load by element.
#include "cuda/kernels.h"

#include <cfloat>
#include <climits>

#include "embedfuse/cuda.cuh"

namespace embedfuse::cuda {
namespace {

constexpr int kThreads = 512;
// 8 loads of 16 bytes by each of 512 threads: 64 KB in flight per SM.
constexpr int kRowsInFlight = 8;

struct Tokens {
  int first, last;  // last < first: none
  bool holes;
  float total_weight;
};

__device__ inline bool is_token(const void* mask, int mask_bytes, int t) {
  if (mask_bytes == 1) return static_cast<const uint8_t*>(mask)[t] != 0;
  if (mask_bytes == 4) return static_cast<const int32_t*>(mask)[t] != 0;
  return static_cast<const int64_t*>(mask)[t] != 0;
}

// The rows that are pooled, found by all threads of the block together.
__device__ inline Tokens find_tokens(const void* mask, int mask_bytes, int rows, Pooling pooling) {
  __shared__ int firsts[kMaxWarps], lasts[kMaxWarps], counts[kMaxWarps];
  __shared__ long long sums[kMaxWarps];
  int first = mask ? rows : 0, last = mask ? -1 : rows - 1, count = 0;
  long long sum = 0;
  if (mask) {
    for (int t = threadIdx.x; t < rows; t += blockDim.x) {
      if (!is_token(mask, mask_bytes, t)) continue;
      first = min(first, t);
      last = max(last, t);
      ++count;
      sum += t;
    }
    first = block_reduce(first, INT_MAX, Min{}, firsts);
    last = block_reduce(last, -1, Max{}, lasts);
  }
  if (last < first) return {0, -1, false, 1.f};
  if (pooling == Pooling::kCls) return {first, first, false, 1.f};
  if (pooling == Pooling::kLast) return {last, last, false, 1.f};
  const long long span = last - first + 1;
  if (mask) {
    count = block_reduce(count, 0, Add{}, counts);
    sum = block_reduce(sum, 0ll, Add{}, sums) - count * (first - 1ll);
  } else {
    count = rows;
    sum = span * (span + 1) / 2;
  }
  return {first, last, count < span, float(pooling == Pooling::kMean ? count : sum)};
}

// sum += w_t x_t over every groups-th row from the group's own. x: the thread's columns of row 0.
template <class T, int N>
__device__ inline void add_rows(const PoolNormalizeArgs& a, const T* x, const void* mask,
                                const Tokens& tokens, int group, int groups, float (&sum)[N]) {
  for (int t = tokens.first + group; t <= tokens.last; t += kRowsInFlight * groups) {
    // Holes are read as well and dropped below, so that no load waits for the mask.
    Pack<T, N> pack[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int row = t + r * groups;
      if (row <= tokens.last) pack[r] = load_pack<T, N>(x + row * a.row_stride);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int row = t + r * groups;
      if (row > tokens.last) break;
      if (tokens.holes && !is_token(mask, a.mask_bytes, row)) continue;
      const float w = a.pooling == Pooling::kWeightedMean ? float(row - tokens.first + 1) : 1.f;
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += w * widen(pack[r].x[i]);
    }
  }
}

// Shared memory: the pooled row (hidden), then each group's sums (groups, lanes * N).
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    pool_normalize_kernel(const PoolNormalizeArgs a, int lanes, int groups) {
  extern __shared__ float pooled[];
  __shared__ float squares[kMaxWarps];
  const int64_t b = blockIdx.x;
  const T* x = static_cast<const T*>(a.hidden_states) + b * a.batch_stride;
  const void* mask = nullptr;
  int rows = int(a.length);
  if (a.cu_seqlens) {
    const int start = a.cu_seqlens[b];
    rows = a.cu_seqlens[b + 1] - start;
    x += start * a.row_stride;
  } else if (a.attention_mask) {
    mask = static_cast<const char*>(a.attention_mask) + b * a.length * a.mask_bytes;
  }
  const Tokens tokens = find_tokens(mask, a.mask_bytes, rows, a.pooling);

  float* sums = pooled + a.hidden;
  const int width = lanes * N;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  float square = 0.f;
  for (int64_t tile = 0; tile < a.hidden; tile += width) {
    const int64_t column = tile + lane * N;
    if (group < groups && column < a.hidden) {
      float sum[N] = {};
      add_rows<T, N>(a, x + column, mask, tokens, group, groups, sum);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[group * width + lane * N + i] = sum[i];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < width && tile + c < a.hidden; c += blockDim.x) {
      float p = 0.f;
      for (int g = 0; g < groups; ++g) p += sums[g * width + c];
      p /= tokens.total_weight;
      pooled[tile + c] = p;
      square += p * p;
    }
    __syncthreads();
  }
  float factor = 1.f, norm = sqrtf(block_reduce(square, 0.f, Add{}, squares));
  if (norm > FLT_MAX) {  // squares from 2^128 on overflow fp32
    factor = 0x1p-96f, square = 0.f;
    for (int64_t c = threadIdx.x; c < a.hidden; c += blockDim.x) {
      square += pooled[c] * factor * (pooled[c] * factor);
    }
    __syncthreads();  // all have read `squares`
    norm = sqrtf(block_reduce(square, 0.f, Add{}, squares));
  }
  if (threadIdx.x == 0) a.norm[b] = norm / factor;
  // Written so that a NaN norm stays NaN.
  const float scale = a.normalize ? factor / (norm < 1e-12f ? 1e-12f : norm) : 1.f;
  const int out_bytes = a.out_dtype == kFloat32 ? 4 : 2;
  void* out = static_cast<char*>(a.out) + b * a.hidden * out_bytes;
  for (int64_t c = threadIdx.x * N; c < a.hidden; c += blockDim.x * N) {
    float y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = pooled[c + i] * scale;
    store_pack<N>(y, out, c, a.out_dtype);
  }
}

int divide_up(int64_t a, int64_t b) { return int((a + b - 1) / b); }

template <class T, int N>
cudaError_t launch(const PoolNormalizeArgs& a, cudaStream_t stream) {
  const int packs = divide_up(a.hidden, N);
  const bool one_row = a.pooling == Pooling::kCls || a.pooling == Pooling::kLast;
  int threads = kThreads;
  if (one_row && packs < kThreads) threads = packs <= 128 ? 128 : divide_up(packs, kWarp) * kWarp;
  // Wider rows are cut into equal tiles.
  const int tiles = packs <= threads ? 1 : divide_up(packs, threads);
  const int lanes = packs == 0 ? 1 : divide_up(packs, tiles);
  const int groups = one_row ? 1 : threads / lanes;
  const size_t bytes = (a.hidden + int64_t(groups) * lanes * N) * sizeof(float);
  auto* kernel = pool_normalize_kernel<T, N>;
  // Up to 48 KB, the static part included, need no opt-in.
  if (bytes > 46 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(a.batch), threads, bytes, stream>>>(a, lanes, groups);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const PoolNormalizeArgs& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const bool aligned = (uintptr_t(a.hidden_states) | uintptr_t(a.out)) % 16 == 0 &&
                       (a.hidden | a.row_stride | a.batch_stride) % N == 0;
  return aligned ? launch<T, N>(a, stream) : launch<T, 1>(a, stream);
}

}  // namespace

cudaError_t pool_normalize(const PoolNormalizeArgs& a, cudaStream_t stream) {
  if (a.batch == 0) return cudaSuccess;
  if (a.dtype == kFloat32) return launch<float>(a, stream);
  if (a.dtype == kFloat16) return launch<__half>(a, stream);
  return launch<__nv_bfloat16>(a, stream);
}

}  // namespace embedfuse::cuda
