// Python module embedfuse._cpu: addresses in, nothing out. Checks what would corrupt memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/pool_normalize_common.h"
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
  if (args.cu_seqlens && !valid_cu_seqlens(args.cu_seqlens, batch, length)) {
    throw py::value_error(
        "cu_seqlens: must start at 0, never fall, and end at the number of tokens");
  }
  cpu_kernels().pool_normalize(args, (float*)scratch);
}

void skinny_linear(uintptr_t x, uintptr_t weight, uintptr_t bias, int dtype, int64_t rows,
                   int64_t columns, int64_t depth, int64_t x_stride, uintptr_t out) {
  cpu_kernels().skinny_linear({(const void*)x, (const void*)weight, (const void*)bias, dtype, rows,
                               columns, depth, x_stride, (void*)out});
}

void set_thread_pool(uintptr_t parallel_for, uintptr_t num_threads) {
  thread_pool = {(ParallelFor)parallel_for, (int32_t (*)(uint32_t*))num_threads};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  // The kernels raise no Python error once they run, so the GIL is released around them.
  m.def("pool_normalize", &pool_normalize, py::call_guard<py::gil_scoped_release>());
  m.def("skinny_linear", &skinny_linear, py::call_guard<py::gil_scoped_release>());
  m.def("set_thread_pool", &set_thread_pool);
  m.def("supported_isas", &supported_isas);
  m.def("select_isa", &select_isa);
  m.def("selected_isa", &selected_isa);
}
