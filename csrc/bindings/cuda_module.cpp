// Python module embedfuse._cuda: takes addresses and a stream. Can be loaded without a driver.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings/sparse_scatter_args.h"
#include "cuda/kernels.h"

namespace py = pybind11;
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

void sparse_scatter(uintptr_t token_weights, int dtype, uintptr_t input_ids, uintptr_t cu_seqlens,
                    int64_t tokens, int64_t batch, const std::vector<int64_t>& excluded,
                    uintptr_t index, uintptr_t indptr, uintptr_t order, uintptr_t scratch,
                    uintptr_t stream) {
  const SparseScatterArgs args =
      sparse_scatter_args(token_weights, dtype, input_ids, cu_seqlens, tokens, batch, excluded);
  check(cuda::sparse_scatter(args, (int64_t*)index, (int64_t*)indptr, (int64_t*)order,
                             (void*)scratch, (cudaStream_t)stream),
        "sparse_scatter");
}

void sparse_dense(uintptr_t token_weights, int dtype, uintptr_t input_ids, uintptr_t cu_seqlens,
                  int64_t tokens, int64_t batch, const std::vector<int64_t>& excluded,
                  int64_t vocabulary, uintptr_t out, uintptr_t stream) {
  const SparseScatterArgs args =
      sparse_scatter_args(token_weights, dtype, input_ids, cu_seqlens, tokens, batch, excluded);
  check(cuda::sparse_dense(args, vocabulary, (void*)out, (cudaStream_t)stream), "sparse_dense");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("pool_normalize", &pool_normalize, py::call_guard<py::gil_scoped_release>());
  m.def("token_weights", &token_weights, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_scatter", &sparse_scatter, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_dense", &sparse_dense, py::call_guard<py::gil_scoped_release>());
}
