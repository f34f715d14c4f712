// The binding of cpu/program.h.
#include "bindings/cpu_module.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "cpu/program.h"

namespace py = pybind11;

namespace embedfuse {

namespace {

using Place = std::pair<int, int64_t>;  // buffer, first column

Columns columns(const Place& x) { return {x.first, x.second}; }

// Tables: address, rows.
using TablePlace = std::pair<uintptr_t, int64_t>;

Table table(const TablePlace& x) { return {(const void*)x.first, x.second}; }

void embed(Program& program, const TablePlace& words, const TablePlace& types,
           const TablePlace& positions, int64_t padding_idx, const Place& sums,
           const Place& places) {
  program.embed(table(words), table(types), table(positions), padding_idx, columns(sums),
                columns(places));
}

void linear(Program& program, const Place& x, const std::vector<int64_t>& parts, int64_t depth,
            bool gelu, const Place& out) {
  program.linear(columns(x), linear_parts(parts), depth, gelu, columns(out));
}

void add_layer_norm(Program& program, const Place& x, const Place& residual, uintptr_t weight,
                    uintptr_t bias, float eps, const Place& out) {
  program.add_layer_norm(columns(x), columns(residual), (const void*)weight, (const void*)bias, eps,
                         columns(out));
}

void add_rms_norm(Program& program, const Place& x, const Place& residual, uintptr_t weight,
                  int64_t heads, int64_t hidden, float eps, const Place& normed,
                  const Place& summed) {
  program.add_rms_norm(columns(x), columns(residual), (const void*)weight, heads, hidden, eps,
                       columns(normed), columns(summed));
}

void rope(Program& program, const Place& x, const Place& cos, const Place& sin, int64_t heads,
          int64_t head_dim) {
  program.rope(columns(x), columns(cos), columns(sin), heads, head_dim);
}

void silu_mul(Program& program, const Place& gate, const Place& up, int64_t width,
              const Place& out) {
  program.silu_mul(columns(gate), columns(up), width, columns(out));
}

void attention(Program& program, const Place& query, const Place& key, const Place& value,
               int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, bool causal,
               int64_t window, const Place& out) {
  VarlenAttentionArgs shape{};
  shape.heads = heads;
  shape.kv_heads = kv_heads;
  shape.head_dim = head_dim;
  shape.scale = scale;
  shape.causal = causal;
  shape.window = window;
  program.attention(columns(query), columns(key), columns(value), shape, columns(out));
}

void pick(Program& program, const Place& x, int64_t width, const Place& out) {
  program.pick(columns(x), width, columns(out));
}

// Addresses are 0 for what the program does not read.
void run(Program& program, const std::vector<uintptr_t>& external, int64_t tokens,
         int64_t sequences, uintptr_t cu_seqlens, uintptr_t picked, uintptr_t ids,
         uintptr_t type_ids, uintptr_t position_ids) {
  const Batch batch{tokens,
                    sequences,
                    (const int32_t*)cu_seqlens,
                    (const int32_t*)picked,
                    (const int64_t*)ids,
                    (const int64_t*)type_ids,
                    (const int64_t*)position_ids};
  check_cu_seqlens("cu_seqlens", batch.cu_seqlens, sequences, tokens);
  for (int64_t i = 0; picked && i < sequences; ++i) {
    if (batch.picked[i] < 0 || batch.picked[i] >= tokens) {
      throw py::value_error("picked: " + std::to_string(batch.picked[i]) + "; accepted are 0 to " +
                            std::to_string(tokens - 1));
    }
  }
  program.run(external, batch);
}

}  // namespace

std::vector<LinearPart> linear_parts(const std::vector<int64_t>& parts) {
  std::vector<LinearPart> weights;
  int64_t first = 0;
  for (size_t i = 0; i + 2 < parts.size(); i += 3) {
    weights.push_back({(const void*)parts[i], (const void*)parts[i + 1], parts[i + 2], first});
    first += parts[i + 2];
  }
  return weights;
}

void add_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<int, int64_t>())
      .def("buffer", &Program::buffer)
      .def("embed", &embed)
      .def("linear", &linear)
      .def("add_layer_norm", &add_layer_norm)
      .def("add_rms_norm", &add_rms_norm)
      .def("rope", &rope)
      .def("silu_mul", &silu_mul)
      .def("attention", &attention)
      .def("pick", &pick)
      .def("run", &run, py::call_guard<py::gil_scoped_release>());
}

}  // namespace embedfuse
