// token_weights: w_t = relu(h_t . weight + bias), a warp per token.
// Limits: rows that are not 16-byte aligned load by element.
#include "cuda/kernels.h"
#include "embedfuse/cuda.cuh"

namespace embedfuse::cuda {
namespace {

constexpr int kRowThreads = 256;

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

}  // namespace embedfuse::cuda
