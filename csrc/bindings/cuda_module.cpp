// Python module embedfuse._cuda: takes addresses and a stream. Can be loaded without a driver.
#include <stdexcept>
#include <string>

#include "bindings/python.h"
#include "cuda/kernels.h"

using namespace embedfuse;

namespace {

void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
  }
}

void pool_normalize(uintptr_t hidden_states, int dtype, int64_t row_stride, int64_t batch_stride,
                    uintptr_t cu_seqlens, uintptr_t attention_mask, int mask_bytes, int64_t batch,
                    int64_t length, int64_t hidden, int pooling, bool normalize, uintptr_t out,
                    int out_dtype, uintptr_t norm, uintptr_t stream) {
  const PoolNormalizeArgs args{(const void*)hidden_states,
                               dtype,
                               row_stride,
                               batch_stride,
                               (const int32_t*)cu_seqlens,
                               (const void*)attention_mask,
                               mask_bytes,
                               batch,
                               length,
                               hidden,
                               (Pooling)pooling,
                               normalize,
                               (void*)out,
                               out_dtype,
                               (float*)norm};
  check(cuda::pool_normalize(args, (cudaStream_t)stream), "pool_normalize");
}

void token_weights(uintptr_t hidden_states, uintptr_t weight, uintptr_t bias, int dtype,
                   int64_t tokens, int64_t hidden, int64_t row_stride, uintptr_t weights,
                   uintptr_t stream) {
  const TokenWeightsArgs args{(const void*)hidden_states,
                              (const void*)weight,
                              (const void*)bias,
                              dtype,
                              tokens,
                              hidden,
                              row_stride,
                              (float*)weights};
  check(cuda::token_weights(args, (cudaStream_t)stream), "token_weights");
}

void sparse_scatter(uintptr_t token_weights, uintptr_t input_ids, uintptr_t cu_seqlens,
                    int64_t tokens, int64_t batch, uintptr_t kept, uintptr_t scratch,
                    uintptr_t stream) {
  const SparseScatterArgs args{(const float*)token_weights, (const int64_t*)input_ids,
                               (const int32_t*)cu_seqlens, tokens, batch};
  check(cuda::sparse_scatter(args, (bool*)kept, (void*)scratch, (cudaStream_t)stream),
        "sparse_scatter");
}

}  // namespace

#define METHOD(name) python::method<&name>(#name)

PyMODINIT_FUNC PyInit__cuda() {
  static PyMethodDef methods[] = {
      METHOD(pool_normalize),
      METHOD(token_weights),
      METHOD(sparse_scatter),
      {},
  };
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods};
  return PyModule_Create(&module);
}
