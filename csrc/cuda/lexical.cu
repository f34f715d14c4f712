// token_weights: w_t = relu(h_t . weight + bias), a warp per token.
// sparse_scatter: of each sequence's tokens of one id with w > 0, the first of the largest w is kept.
//
// sparse_scatter takes a block per sequence. It hashes the ids into a table with open addressing whose
// places hold the best token so far, as one 64-bit number that atomicMax compares: weight first, then
// the earlier position. A second pass keeps each token that is the best of its place. Up to kSharedTokens
// tokens the table is in shared memory, above that in a scratch buffer, that is in L2.
// Limits: with fewer sequences than the GPU has SMs the others are idle.
#include "cuda/kernels.h"
#include "embedfuse/cuda.cuh"

namespace embedfuse::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kSharedTokens = 2048;
constexpr int kSharedPlaces = 3072;
constexpr int kRowThreads = 256;

using Best = unsigned long long;

// Ordered as the weights; 0 for a weight that gives no entry, NaN largest.
__device__ inline uint32_t order_key(float weight) {
  if (weight <= 0.f) return 0;
  return weight != weight ? 0x7fc00000u : __float_as_uint(weight);
}

__device__ inline int first_place(int id, int places) {
  return int(__umulhi(uint32_t(id) * 2654435769u, uint32_t(places)));
}

struct Table {
  int* ids;  // -1: free
  Best* best;
  int places;
};

// One sequence of n tokens, by all threads of the block. No id is -1, and there are more places than tokens.
__device__ inline void keep_best(const float* weights, const int64_t* input_ids, int n, bool* kept,
                                 Table table) {
  for (int i = threadIdx.x; i < table.places; i += blockDim.x) {
    table.ids[i] = -1;
    table.best[i] = 0;
  }
  __syncthreads();
  for (int t = threadIdx.x; t < n; t += blockDim.x) {
    const uint32_t key = order_key(weights[t]);
    if (key == 0) continue;
    const int id = int(input_ids[t]);
    int place = first_place(id, table.places);
    for (;;) {
      const int found = atomicCAS(&table.ids[place], -1, id);
      if (found == -1 || found == id) break;
      if (++place == table.places) place = 0;
    }
    atomicMax(&table.best[place], Best(key) << 32 | uint32_t(~t));
  }
  __syncthreads();
  for (int t = threadIdx.x; t < n; t += blockDim.x) {
    const uint32_t key = order_key(weights[t]);
    if (key != 0) {
      const int id = int(input_ids[t]);
      int place = first_place(id, table.places);
      while (table.ids[place] != id) {
        if (++place == table.places) place = 0;
      }
      kept[t] = table.best[place] == (Best(key) << 32 | uint32_t(~t));
    } else {
      kept[t] = false;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    sparse_scatter_kernel(const SparseScatterArgs a, bool* kept, void* scratch) {
  __shared__ Best best[kSharedPlaces];
  __shared__ int ids[kSharedPlaces];
  const int64_t start = a.cu_seqlens[blockIdx.x];
  const int n = a.cu_seqlens[blockIdx.x + 1] - int(start);
  const float* weights = a.token_weights + start;
  const int64_t* input_ids = a.input_ids + start;
  if (n <= kSharedTokens) {
    const int places = 2 * n < kSharedPlaces ? 2 * n : kSharedPlaces;
    keep_best(weights, input_ids, n, kept + start, {ids, best, places});
  } else {
    Best* all_best = static_cast<Best*>(scratch);
    int* all_ids = reinterpret_cast<int*>(all_best + 2 * a.tokens);
    keep_best(weights, input_ids, n, kept + start,
              {all_ids + 2 * start, all_best + 2 * start, 2 * n});
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) token_weights_kernel(const TokenWeightsArgs a) {
  const int64_t t = blockIdx.x * int64_t(kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (t >= a.tokens) return;
  const T* x = static_cast<const T*>(a.hidden_states) + t * a.row_stride;
  const T* weight = static_cast<const T*>(a.weight);
  float sum = 0.f;
#pragma unroll 4
  for (int64_t k = threadIdx.x % kWarp * N; k < a.hidden; k += kWarp * N) {
    const Pack<T, N> px = load_pack<T, N>(x + k), pw = load_pack<T, N>(weight + k);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += widen(px.x[i]) * widen(pw.x[i]);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % kWarp != 0) return;
  if (a.bias) sum += widen(*static_cast<const T*>(a.bias));
  // Written so that NaN stays NaN.
  a.weights[t] = sum <= 0.f ? 0.f : sum;
}

template <class T>
cudaError_t launch(const TokenWeightsArgs& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  constexpr int rows = kRowThreads / kWarp;
  const bool aligned = (uintptr_t(a.hidden_states) | uintptr_t(a.weight)) % 16 == 0 &&
                       (a.hidden | a.row_stride) % N == 0;
  auto* kernel = aligned ? token_weights_kernel<T, N> : token_weights_kernel<T, 1>;
  kernel<<<unsigned((a.tokens + rows - 1) / rows), kRowThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t token_weights(const TokenWeightsArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  if (a.dtype == kFloat32) return launch<float>(a, stream);
  if (a.dtype == kFloat16) return launch<__half>(a, stream);
  return launch<__nv_bfloat16>(a, stream);
}

cudaError_t sparse_scatter(const SparseScatterArgs& a, bool* kept, void* scratch,
                           cudaStream_t stream) {
  if (a.batch == 0) return cudaSuccess;
  sparse_scatter_kernel<<<unsigned(a.batch), kThreads, 0, stream>>>(a, kept, scratch);
  return cudaGetLastError();
}

}  // namespace embedfuse::cuda
