// Launchers of the CUDA kernels: pointers into the GPU's memory, launched on the given stream.
#pragma once
#include <cuda_runtime_api.h>

#include "embedfuse/args.h"

namespace embedfuse::cuda {

cudaError_t pool_normalize(const PoolNormalizeArgs&, cudaStream_t);
cudaError_t token_weights(const TokenWeightsArgs&, cudaStream_t);
// index, indptr, order: as cpu/lexical.h has them. scratch: 28 bytes per token and 4 per sequence. Two launches.
cudaError_t sparse_scatter(const SparseScatterArgs&, int64_t* index, int64_t* indptr,
                           int64_t* order, void* scratch, cudaStream_t);
// out (batch, vocabulary): zero, in the dtype of the weights. An id outside [0, vocabulary) ends the context.
cudaError_t sparse_dense(const SparseScatterArgs&, int64_t vocabulary, void* out, cudaStream_t);

}  // namespace embedfuse::cuda
