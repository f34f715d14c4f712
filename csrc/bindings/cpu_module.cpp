// Python module embedfuse._cpu, and what a model's forward calls of it.
#include "bindings/cpu_module.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bindings/layouts.h"
#include "bindings/watch.h"
#include "cpu/dispatch.h"
#include "cpu/program.h"
#include "embedfuse/parallel.h"

namespace py = pybind11;
using namespace embedfuse;

namespace {

void pool_normalize(uintptr_t hidden_states, int dtype, int64_t row_stride, int64_t batch_stride,
                    uintptr_t cu_seqlens, uintptr_t attention_mask, int mask_bytes, int64_t batch,
                    int64_t length, int64_t hidden, int pooling, bool normalize, uintptr_t out,
                    int out_dtype, uintptr_t norm, uintptr_t scratch) {
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
  if (args.cu_seqlens) check_cu_seqlens("cu_seqlens", args.cu_seqlens, batch, length);
  cpu_kernels().pool_normalize(args, (float*)scratch);
}

void linear(uintptr_t x, const std::vector<int64_t>& parts, int dtype, int64_t rows, int64_t depth,
            int64_t x_stride, bool gelu, uintptr_t out, bool few_rows) {
  const std::vector<LinearPart> weights = linear_parts(parts);
  const int64_t columns = weights.back().first + weights.back().columns;
  run_linear({(const void*)x, weights.data(), int64_t(weights.size()), dtype, rows, columns, depth,
              x_stride, gelu, (void*)out},
             few_rows);
}

// Address, stride of tokens, stride of heads.
using Heads = std::tuple<uintptr_t, int64_t, int64_t>;

HeadsArg heads_arg(const Heads& x) {
  return {(const void*)std::get<0>(x), std::get<1>(x), std::get<2>(x)};
}

void varlen_attention(const Heads& query, const Heads& key, const Heads& value, int dtype,
                      uintptr_t cu_seqlens_q, int64_t tokens_q, uintptr_t cu_seqlens_k,
                      int64_t tokens_k, int64_t batch, int64_t heads, int64_t kv_heads,
                      int64_t head_dim, float scale, bool causal, int64_t window, uintptr_t out) {
  const VarlenAttentionArgs args{heads_arg(query),
                                 heads_arg(key),
                                 heads_arg(value),
                                 dtype,
                                 (const int32_t*)cu_seqlens_q,
                                 (const int32_t*)cu_seqlens_k,
                                 batch,
                                 heads,
                                 kv_heads,
                                 head_dim,
                                 scale,
                                 causal,
                                 window,
                                 (void*)out};
  check_cu_seqlens("cu_seqlens_q", args.cu_seqlens_q, batch, tokens_q);
  check_cu_seqlens("cu_seqlens_k", args.cu_seqlens_k, batch, tokens_k);
  cpu_kernels().varlen_attention(args);
}

void add_layer_norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, int dtype,
                    int64_t rows, int64_t hidden, int64_t x_stride, int64_t residual_stride,
                    float eps, uintptr_t out) {
  cpu_kernels().add_layer_norm({(const void*)x, (const void*)residual, (const void*)weight,
                                (const void*)bias, dtype, rows, hidden, x_stride, residual_stride,
                                eps, (void*)out});
}

void add_rms_norm(const Heads& x, const Heads& residual, uintptr_t weight, int dtype,
                  int64_t tokens, int64_t heads, int64_t hidden, float eps, uintptr_t normed,
                  uintptr_t summed) {
  cpu_kernels().add_rms_norm({heads_arg(x), heads_arg(residual), (const void*)weight, dtype, tokens,
                              heads, hidden, eps, (void*)normed, (void*)summed});
}

void rope(const Heads& x, uintptr_t cos, uintptr_t sin, int dtype, int64_t tokens, int64_t heads,
          int64_t head_dim, int64_t cos_stride, int64_t sin_stride) {
  cpu_kernels().rope({heads_arg(x), (const void*)cos, (const void*)sin, dtype, tokens, heads,
                      head_dim, cos_stride, sin_stride});
}

void silu_mul(uintptr_t gate, uintptr_t up, int dtype, int64_t rows, int64_t columns,
              int64_t gate_stride, int64_t up_stride, uintptr_t out) {
  cpu_kernels().silu_mul({(const void*)gate, (const void*)up, dtype, rows, columns, gate_stride,
                          up_stride, (void*)out});
}

void set_thread_pool(uintptr_t parallel_for, uintptr_t num_threads) {
  thread_pool = {(ParallelFor)parallel_for, (int32_t (*)(uint32_t*))num_threads};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  // No kernel touches a Python object, so the GIL is released around them.
  m.def("pool_normalize", &pool_normalize, py::call_guard<py::gil_scoped_release>());
  m.def("linear", &linear, py::call_guard<py::gil_scoped_release>());
  m.def("varlen_attention", &varlen_attention, py::call_guard<py::gil_scoped_release>());
  m.def("add_layer_norm", &add_layer_norm, py::call_guard<py::gil_scoped_release>());
  m.def("add_rms_norm", &add_rms_norm, py::call_guard<py::gil_scoped_release>());
  m.def("rope", &rope, py::call_guard<py::gil_scoped_release>());
  m.def("silu_mul", &silu_mul, py::call_guard<py::gil_scoped_release>());
  add_program(m);
  add_scores(m);
  m.def("unchanged", &unchanged);
  m.def("layouts", &layouts);
  m.def("set_thread_pool", &set_thread_pool);
  m.def("supported_isas", &supported_isas);
  m.def("select_isa", &select_isa);
  m.def("selected_isa", &selected_isa);
}
