// Sparse vectors, scores and losses of the module embedfuse._cpu.
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bindings/cpu_module.h"
#include "bindings/sparse_scatter_args.h"
#include "cpu/dispatch.h"
#include "cpu/lexical.h"

namespace py = pybind11;
using namespace embedfuse;

namespace {

void token_weights(uintptr_t hidden_states, uintptr_t weight, uintptr_t bias, int dtype,
                   int64_t tokens, int64_t hidden, int64_t row_stride, uintptr_t weights) {
  cpu_kernels().token_weights({(const void*)hidden_states, (const void*)weight, (const void*)bias,
                               dtype, tokens, hidden, row_stride, (float*)weights});
}

void sparse_scatter(uintptr_t token_weights, uintptr_t input_ids, uintptr_t cu_seqlens,
                    int64_t tokens, int64_t batch, const std::vector<int64_t>& excluded,
                    uintptr_t index, uintptr_t indptr, uintptr_t order) {
  const SparseScatterArgs args =
      sparse_scatter_args(token_weights, kFloat32, input_ids, cu_seqlens, tokens, batch, excluded);
  check_cu_seqlens("cu_seqlens", args.cu_seqlens, batch, tokens);
  if (!cpu::sparse_scatter(args, (int64_t*)index, (int64_t*)indptr, (int64_t*)order)) {
    throw py::value_error("input_ids: an id is out of range; accepted are 0 to 2^31 - 1");
  }
}

CsrArgs csr(const char* name, uintptr_t weights, uintptr_t token_ids, uintptr_t indptr,
            int64_t rows, int64_t entries) {
  const CsrArgs args{(const float*)weights, (const int64_t*)token_ids, (const int64_t*)indptr,
                     rows};
  if (!cpu::valid_csr(args, entries)) {
    throw py::value_error(std::string(name) +
                          ": indptr must rise from 0 to the number of entries, token ids "
                          "within each row, from 0 to at most 2^31 - 1");
  }
  return args;
}

void lexical_scores(uintptr_t query_weights, uintptr_t query_ids, uintptr_t query_indptr,
                    int64_t queries, int64_t query_entries, uintptr_t document_weights,
                    uintptr_t document_ids, uintptr_t document_indptr, int64_t documents,
                    int64_t document_entries, bool aligned, uintptr_t scores) {
  cpu::lexical_scores(
      {csr("queries", query_weights, query_ids, query_indptr, queries, query_entries),
       csr("documents", document_weights, document_ids, document_indptr, documents,
           document_entries),
       aligned, (float*)scores});
}

// One dict {keys[id]: weight} per row, with its entries inserted in the order of `places`. Keys are prefetched, first
// the pointer and then the object, because those of a large vocabulary do not fit into the caches.
py::list csr_dicts(const py::list& keys, uintptr_t indptr, int64_t rows, uintptr_t token_ids,
                   uintptr_t weights, uintptr_t places, int64_t entries) {
  csr("indptr, token_ids", 0, token_ids, indptr, rows, entries);
  const int64_t *bounds = (const int64_t*)indptr, *ids = (const int64_t*)token_ids;
  PyObject** key = PySequence_Fast_ITEMS(keys.ptr());
  py::list dicts(rows);
  for (int64_t row = 0; row < rows; ++row) {
    py::dict dict;
    const int64_t first = bounds[row], last = bounds[row + 1];
    for (int64_t n = first; n < last; ++n) {
      const int64_t i = ((const int64_t*)places)[n];
      if (i < first || i >= last) {
        throw py::value_error("order: accepted are the numbers of each row's entries");
      }
      if (n + 32 < entries) __builtin_prefetch(key + ids[n + 32]);
      if (n + 16 < entries) __builtin_prefetch(key[ids[n + 16]], 1);
      const py::float_ weight(((const double*)weights)[i]);
      const int error = PyDict_SetItem(dict.ptr(), key[ids[i]], weight.ptr());
      if (error) throw py::error_already_set();
    }
    dicts[row] = std::move(dict);
  }
  return dicts;
}

// Matrices (address of their int64 pairs of address and rows), their number, stride of a row, bytes of an element,
// spans (address), their number.
using Rows = std::tuple<uintptr_t, int64_t, int64_t, int64_t, uintptr_t, int64_t>;

// Rows are numbered through all matrices. Appends the address of each text to `texts`.
RowsArg rows_arg(const std::string& name, const Rows& x, std::vector<const void*>* texts) {
  const auto& [matrices, matrix_count, stride, bytes, spans_at, count] = x;
  const int64_t* spans = (const int64_t*)spans_at;
  std::vector<int64_t> starts{0};  // of each matrix, and the end
  for (int64_t m = 0; m < matrix_count; ++m) {
    starts.push_back(starts.back() + ((const int64_t*)matrices)[2 * m + 1]);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = spans[2 * i], end = spans[2 * i + 1];
    if (begin < 0 || begin > end || end > starts.back()) {
      throw py::value_error(name + "_spans: a span lies outside of the rows");
    }
    const void* text = nullptr;
    if (begin < end) {
      const int64_t m = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
      if (end > starts[m + 1]) {
        throw py::value_error(name + "_spans: a text lies in more than one matrix");
      }
      text = (const char*)((const int64_t*)matrices)[2 * m] + (begin - starts[m]) * stride * bytes;
    }
    texts->push_back(text);
  }
  return {texts->data(), spans, stride, count};
}

void maxsim(const Rows& query, const Rows& document, int dtype, uintptr_t scale, int64_t depth,
            uintptr_t zero, uintptr_t pairs, int64_t pair_count, bool normalize, uintptr_t scores,
            uintptr_t argmax, int64_t width) {
  std::vector<const void*> query_texts, document_texts;
  const MaxSimArgs args{rows_arg("query", query, &query_texts),
                        rows_arg("document", document, &document_texts),
                        dtype,
                        (const float*)scale,
                        depth,
                        (const bool*)zero,
                        (const int64_t*)pairs,
                        pair_count,
                        normalize,
                        (float*)scores,
                        (int32_t*)argmax,
                        width};
  for (int64_t p = 0; pairs && p < 2 * pair_count; ++p) {
    const int64_t count = p % 2 ? args.document.count : args.query.count;
    if (args.pairs[p] < 0 || args.pairs[p] >= count) {
      throw py::value_error("pairs: " + std::to_string(args.pairs[p]) + "; accepted are 0 to " +
                            std::to_string(count - 1));
    }
  }
  for (int64_t i = 0; width && i < args.query.count; ++i) {
    const int64_t rows = args.query.spans[2 * i + 1] - args.query.spans[2 * i];
    if (rows > width) {
      throw py::value_error("width: " + std::to_string(width) + "; a query has " +
                            std::to_string(rows) + " rows");
    }
  }
  // Reused by later calls, as in linear.
  static thread_local std::vector<float> scratch;
  scratch.resize(std::max<size_t>(scratch.size(), cpu_kernels().maxsim_scratch(args)));
  cpu_kernels().maxsim(args, scratch.data());
}

void segment_sum(uintptr_t x, int dtype, int64_t stride, int64_t rows_of_x, int64_t depth,
                 uintptr_t weights, uintptr_t index, int64_t entries, uintptr_t indptr,
                 int64_t rows, uintptr_t out) {
  const SegmentSumArgs args{(const void*)x,
                            dtype,
                            stride,
                            depth,
                            (const float*)weights,
                            (const int64_t*)index,
                            (const int64_t*)indptr,
                            rows,
                            (float*)out};
  for (int64_t r = 0; r < rows; ++r) {
    if (args.indptr[0] < 0 || args.indptr[r] > args.indptr[r + 1] || args.indptr[rows] > entries) {
      throw py::value_error("indptr: must never fall and lie within the entries");
    }
  }
  for (int64_t k = args.indptr[0]; k < args.indptr[rows]; ++k) {
    if (args.index[k] >= rows_of_x) {
      throw py::value_error("index: " + std::to_string(args.index[k]) + "; accepted are up to " +
                            std::to_string(rows_of_x - 1));
    }
  }
  cpu_kernels().segment_sum(args);
}

// Scores, rows, columns and first column; target, limit, keys of rows and columns, guide and its limit; factors
// of rows and columns; scale, bias, sigmoid.
using Tile = std::tuple<uintptr_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t,
                        uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, float, float, bool>;

InfoNceTile tile_arg(const Tile& x) {
  const auto& [scores, rows, columns, first, target, limit, x_keys, y_keys, guide, guide_limit,
               x_factor, y_factor, scale, bias, sigmoid] = x;
  if (columns > kInfoNceColumns) {
    throw py::value_error("scores: " + std::to_string(columns) + " columns; accepted are up to " +
                          std::to_string(kInfoNceColumns));
  }
  return {(float*)scores,
          rows,
          columns,
          first,
          (const int64_t*)target,
          (const float*)limit,
          (const int64_t*)x_keys,
          (const int64_t*)y_keys,
          (const float*)guide,
          (const float*)guide_limit,
          (const float*)x_factor,
          (const float*)y_factor,
          scale,
          bias,
          sigmoid};
}

void info_nce_update(const Tile& tile, uintptr_t maximum, uintptr_t sum, uintptr_t total,
                     uintptr_t count, uintptr_t factor) {
  cpu_kernels().info_nce_update(tile_arg(tile), {(float*)maximum, (float*)sum, (float*)total,
                                                 (int64_t*)count, (float*)factor});
}

void info_nce_gradient(const Tile& tile, uintptr_t statistic, uintptr_t g_statistic,
                       uintptr_t g_total, uintptr_t g_target, uintptr_t sum) {
  cpu_kernels().info_nce_gradient(
      tile_arg(tile), {(const float*)statistic, (const float*)g_statistic, (const float*)g_total,
                       (const float*)g_target, (float*)sum});
}

}  // namespace

void embedfuse::add_scores(py::module_& m) {
  // The GIL is released as in cpu_module.cpp, but not for csr_dicts, which makes Python objects.
  m.def("token_weights", &token_weights, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_scatter", &sparse_scatter, py::call_guard<py::gil_scoped_release>());
  m.def("lexical_scores", &lexical_scores, py::call_guard<py::gil_scoped_release>());
  m.def("csr_dicts", &csr_dicts);
  m.def("maxsim", &maxsim, py::call_guard<py::gil_scoped_release>());
  m.def("segment_sum", &segment_sum, py::call_guard<py::gil_scoped_release>());
  m.def("info_nce_update", &info_nce_update, py::call_guard<py::gil_scoped_release>());
  m.def("info_nce_gradient", &info_nce_gradient, py::call_guard<py::gil_scoped_release>());
}
