// Python module embedfuse._cpu: takes addresses and writes results there. Checks all that could corrupt memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "cpu/cu_seqlens.h"
#include "cpu/dispatch.h"
#include "cpu/lexical.h"
#include "cpu/pool_normalize_common.h"
#include "embedfuse/parallel.h"
#include "bindings/watch.h"

namespace py = pybind11;
using namespace embedfuse;

namespace {

void check_cu_seqlens(const std::string& name, const int32_t* cu_seqlens, int64_t batch,
                      int64_t tokens) {
  if (!valid_cu_seqlens(cu_seqlens, batch, tokens)) {
    throw py::value_error(name +
                          ": must start at 0, never fall, and end at the number of tokens, " +
                          std::to_string(tokens) + "; starts at " + std::to_string(cu_seqlens[0]) +
                          ", ends at " + std::to_string(cu_seqlens[batch]));
  }
}

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

// parts: for each weight its address, the address of its bias or 0, and its number of columns.
void linear(uintptr_t x, const std::vector<int64_t>& parts, int dtype, int64_t rows, int64_t depth,
            int64_t x_stride, uintptr_t out, bool few_rows) {
  std::vector<LinearPart> weights;
  int64_t columns = 0;
  for (size_t i = 0; i + 2 < parts.size(); i += 3) {
    weights.push_back({(const void*)parts[i], (const void*)parts[i + 1], parts[i + 2], columns});
    columns += parts[i + 2];
  }
  const LinearArgs args{(const void*)x, weights.data(), int64_t(weights.size()),
                        dtype,          rows,           columns,
                        depth,          x_stride,       (void*)out};
  if (few_rows) return cpu_kernels().linear_few_rows(args);
  // Reused by later calls (a few MB): new pages in every call would cost as much as the arithmetic.
  static thread_local std::vector<float> scratch;
  scratch.resize(std::max<size_t>(scratch.size(), cpu_kernels().linear_scratch(args)));
  cpu_kernels().linear(args, scratch.data());
}

void token_weights(uintptr_t hidden_states, uintptr_t weight, uintptr_t bias, int dtype,
                   int64_t tokens, int64_t hidden, int64_t row_stride, uintptr_t weights) {
  cpu_kernels().token_weights({(const void*)hidden_states, (const void*)weight, (const void*)bias,
                               dtype, tokens, hidden, row_stride, (float*)weights});
}

void sparse_scatter(uintptr_t token_weights, uintptr_t input_ids, uintptr_t cu_seqlens,
                    int64_t tokens, int64_t batch, uintptr_t index, uintptr_t counts,
                    uintptr_t order) {
  const SparseScatterArgs args{(const float*)token_weights, (const int64_t*)input_ids,
                               (const int32_t*)cu_seqlens, tokens, batch};
  check_cu_seqlens("cu_seqlens", args.cu_seqlens, batch, tokens);
  if (!cpu::sparse_scatter(args, (int64_t*)index, (int64_t*)counts, (int64_t*)order)) {
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
    if (args.index[k] < 0 || args.index[k] >= rows_of_x) {
      throw py::value_error("index: " + std::to_string(args.index[k]) + "; accepted are 0 to " +
                            std::to_string(rows_of_x - 1));
    }
  }
  cpu_kernels().segment_sum(args);
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

void set_thread_pool(uintptr_t parallel_for, uintptr_t num_threads) {
  thread_pool = {(ParallelFor)parallel_for, (int32_t (*)(uint32_t*))num_threads};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  // No kernel touches a Python object, so the GIL is released around them; csr_dicts makes them.
  m.def("pool_normalize", &pool_normalize, py::call_guard<py::gil_scoped_release>());
  m.def("linear", &linear, py::call_guard<py::gil_scoped_release>());
  m.def("token_weights", &token_weights, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_scatter", &sparse_scatter, py::call_guard<py::gil_scoped_release>());
  m.def("lexical_scores", &lexical_scores, py::call_guard<py::gil_scoped_release>());
  m.def("csr_dicts", &csr_dicts);
  m.def("varlen_attention", &varlen_attention, py::call_guard<py::gil_scoped_release>());
  m.def("add_layer_norm", &add_layer_norm, py::call_guard<py::gil_scoped_release>());
  m.def("maxsim", &maxsim, py::call_guard<py::gil_scoped_release>());
  m.def("segment_sum", &segment_sum, py::call_guard<py::gil_scoped_release>());
  m.def("add_rms_norm", &add_rms_norm, py::call_guard<py::gil_scoped_release>());
  m.def("rope", &rope, py::call_guard<py::gil_scoped_release>());
  m.def("silu_mul", &silu_mul, py::call_guard<py::gil_scoped_release>());
  m.def("info_nce_update", &info_nce_update, py::call_guard<py::gil_scoped_release>());
  m.def("info_nce_gradient", &info_nce_gradient, py::call_guard<py::gil_scoped_release>());
  m.def("unchanged", &unchanged);
  m.def("set_thread_pool", &set_thread_pool);
  m.def("supported_isas", &supported_isas);
  m.def("select_isa", &select_isa);
  m.def("selected_isa", &selected_isa);
}
