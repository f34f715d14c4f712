// Launchers of the CUDA kernels: pointers into the GPU's memory, one launch each on the given stream.
#pragma once
#include <cuda_runtime_api.h>

#include "embedfuse/args.h"

namespace embedfuse::cuda {

cudaError_t pool_normalize(const PoolNormalizeArgs&, cudaStream_t);

}  // namespace embedfuse::cuda
