// Device side: element types, vector loads that widen to fp32, sums and ranks over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "embedfuse/dtype.h"

namespace embedfuse {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// N adjacent elements, loaded by one instruction of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T x[N];
};

template <class T, int N>
__device__ inline Pack<T, N> load_pack(const T* p) {
  static_assert(sizeof(Pack<T, N>) <= 16, "wider than one load");
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N>
__device__ inline void store_pack(const float (&x)[N], void* row, int64_t column, int dtype) {
  if (dtype == kFloat32) {
    float* out = static_cast<float*>(row) + column;
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = x[i];
  } else if (dtype == kFloat16) {
    Pack<__half, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.x[i] = __float2half_rn(x[i]);
    *reinterpret_cast<Pack<__half, N>*>(static_cast<__half*>(row) + column) = pack;
  } else {
    Pack<__nv_bfloat16, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.x[i] = __float2bfloat16_rn(x[i]);
    *reinterpret_cast<Pack<__nv_bfloat16, N>*>(static_cast<__nv_bfloat16*>(row) + column) = pack;
  }
}

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Min {
  __device__ int operator()(int a, int b) const { return min(a, b); }
};

struct Max {
  __device__ int operator()(int a, int b) const { return max(a, b); }
};

// The reduction of x over the block, in every thread. shared: kMaxWarps values, free for reuse only
// after the next __syncthreads(). blockDim.x is a multiple of kWarp.
template <class T, class Op>
__device__ inline T block_reduce(T x, T identity, Op op, T* shared) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(~0u, x, step));
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = lane < blockDim.x / kWarp ? shared[lane] : identity;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

struct Rank {
  int before, total;
};

// How many earlier threads of the block, and how many of all, have the flag. shared: kMaxWarps values.
__device__ inline Rank block_rank(bool flag, int* shared) {
  const unsigned votes = __ballot_sync(~0u, flag);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  Rank rank{__popc(votes & ((1u << lane) - 1)), 0};
  for (int w = 0; w < blockDim.x / kWarp; ++w) {
    if (w < warp) rank.before += shared[w];
    rank.total += shared[w];
  }
  __syncthreads();  // shared is free for reuse
  return rank;
}

}  // namespace embedfuse
