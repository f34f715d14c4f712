// Launchers of the CUDA kernels: pointers into the GPU's memory, one launch each on the given stream.
#pragma once
#include <cuda_runtime_api.h>

#include "embedfuse/args.h"

namespace embedfuse::cuda {

cudaError_t pool_normalize(const PoolNormalizeArgs&, cudaStream_t);
cudaError_t token_weights(const TokenWeightsArgs&, cudaStream_t);
// kept (tokens): whether the token has the largest weight of its id. scratch: 24 bytes per token.
cudaError_t sparse_scatter(const SparseScatterArgs&, bool* kept, void* scratch, cudaStream_t);

}  // namespace embedfuse::cuda
