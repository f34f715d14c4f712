#include "cpu/lexical.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "embedfuse/parallel.h"

namespace embedfuse::cpu {
namespace {

struct Token {
  uint32_t id;
  int32_t position;
};

// Stable sort by id: one pass per byte, as many as the largest id has.
void sort_by_id(std::vector<Token>& tokens, std::vector<Token>& scratch) {
  uint32_t counts[4][256] = {}, bits = 0;
  for (const Token& token : tokens) {
    bits |= token.id;
    for (int byte = 0; byte < 4; ++byte) ++counts[byte][token.id >> 8 * byte & 255];
  }
  scratch.resize(tokens.size());
  for (int byte = 0; byte < 4 && bits >> 8 * byte; ++byte) {
    uint32_t next = 0, place[256];
    for (int digit = 0; digit < 256; ++digit) {
      place[digit] = next;
      next += counts[byte][digit];
    }
    for (const Token& token : tokens) scratch[place[token.id >> 8 * byte & 255]++] = token;
    tokens.swap(scratch);
  }
}

bool larger(float a, float b) { return a > b || (a != a && b == b); }

// The weight, 0 for an id that gives no entry.
float weight_of(const SparseScatterArgs& a, int64_t t) {
  const int64_t* end = a.excluded + a.n_excluded;
  if (std::find(a.excluded, end, a.input_ids[t]) != end) return 0;
  return static_cast<const float*>(a.token_weights)[t];
}

struct ScatterJob {
  const SparseScatterArgs& a;
  int64_t *index, *counts, *order;
  std::atomic<bool> valid{true};
};

void scatter_sequences(int64_t begin, int64_t end, void* context) {
  ScatterJob& job = *static_cast<ScatterJob*>(context);
  const SparseScatterArgs& a = job.a;
  const float* weights = static_cast<const float*>(a.token_weights);
  std::vector<Token> tokens, scratch;
  std::vector<int64_t> entry_at;  // of each token that is its id's first; -1 elsewhere
  for (int64_t b = begin; b < end; ++b) {
    tokens.clear();
    for (int32_t t = a.cu_seqlens[b]; t < a.cu_seqlens[b + 1]; ++t) {
      if (weight_of(a, t) <= 0.f) continue;
      if (a.input_ids[t] < 0 || a.input_ids[t] > INT32_MAX) job.valid = false;
      tokens.push_back({uint32_t(a.input_ids[t]), t});
    }
    sort_by_id(tokens, scratch);
    const int32_t first = a.cu_seqlens[b];
    entry_at.assign(a.cu_seqlens[b + 1] - first, -1);
    int64_t *out = job.index + first, *order = job.order + first;
    for (size_t i = 0; i < tokens.size();) {
      const uint32_t id = tokens[i].id;
      int32_t best = tokens[i].position;
      entry_at[best - first] = out - (job.index + first);
      for (++i; i < tokens.size() && tokens[i].id == id; ++i) {
        const int32_t t = tokens[i].position;
        if (larger(weights[t], weights[best])) best = t;
      }
      *out++ = best;
    }
    job.counts[b] = out - (job.index + first);
    for (const int64_t entry : entry_at) {
      if (entry >= 0) *order++ = entry;
    }
  }
}

struct ScoresJob {
  const LexicalScoresArgs& a;
  int64_t vocabulary;  // above every id of the queries
};

// Queries [first_query, last_query) against documents [first, last). A query's weights are written into a dense
// array by id, in which the ids of the documents are looked up.
void score_block(const ScoresJob& job, int64_t first_query, int64_t last_query, int64_t first,
                 int64_t last) {
  const CsrArgs &queries = job.a.queries, &documents = job.a.documents;
  std::vector<float> dense(job.vocabulary);
  for (int64_t q = first_query; q < last_query; ++q) {
    const int64_t begin = queries.indptr[q], end = queries.indptr[q + 1];
    for (int64_t i = begin; i < end; ++i) dense[queries.token_ids[i]] = queries.weights[i];
    for (int64_t d = first; d < last; ++d) {
      double score = 0;
      for (int64_t i = documents.indptr[d]; i < documents.indptr[d + 1]; ++i) {
        if (documents.token_ids[i] >= job.vocabulary) break;  // ids rise
        const float weight = dense[documents.token_ids[i]];
        // An id that is not shared is left out, not multiplied: 0 * NaN would be NaN.
        if (weight != 0.f) score += double(weight) * documents.weights[i];
      }
      job.a.scores[q * documents.rows + d] = float(score);
    }
    for (int64_t i = begin; i < end; ++i) dense[queries.token_ids[i]] = 0.f;
  }
}

void score_queries(int64_t begin, int64_t end, void* context) {
  const ScoresJob& job = *static_cast<ScoresJob*>(context);
  score_block(job, begin, end, 0, job.a.documents.rows);
}

void score_documents(int64_t begin, int64_t end, void* context) {
  const ScoresJob& job = *static_cast<ScoresJob*>(context);
  score_block(job, 0, job.a.queries.rows, begin, end);
}

void score_aligned(int64_t begin, int64_t end, void* context) {
  const LexicalScoresArgs& a = *static_cast<const LexicalScoresArgs*>(context);
  for (int64_t row = begin; row < end; ++row) {
    int64_t i = a.queries.indptr[row], j = a.documents.indptr[row];
    double score = 0;
    while (i < a.queries.indptr[row + 1] && j < a.documents.indptr[row + 1]) {
      const int64_t q = a.queries.token_ids[i], d = a.documents.token_ids[j];
      if (q == d) score += double(a.queries.weights[i]) * a.documents.weights[j];
      i += q <= d;
      j += d <= q;
    }
    a.scores[row] = float(score);
  }
}

// 16 for each entry, which is looked up.
int64_t grain(int64_t rows, int64_t entries) { return grain_of(16 * (entries / (rows + 1))); }

}  // namespace

bool sparse_scatter(const SparseScatterArgs& a, int64_t* index, int64_t* indptr, int64_t* order) {
  int64_t* counts = indptr + 1;
  ScatterJob job{a, index, counts, order};
  parallel_for(0, a.batch, grain(a.batch, a.tokens), scatter_sequences, &job);
  indptr[0] = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t from = a.cu_seqlens[b], to = indptr[b], count = counts[b];
    std::copy(index + from, index + from + count, index + to);
    std::copy(order + from, order + from + count, order + to);
    indptr[b + 1] = to + count;
  }
  std::fill(index + indptr[a.batch], index + a.tokens, -1);
  std::fill(order + indptr[a.batch], order + a.tokens, -1);
  return job.valid;
}

bool valid_csr(const CsrArgs& csr, int64_t entries) {
  if (csr.indptr[0] != 0 || csr.indptr[csr.rows] != entries) return false;
  if (!std::is_sorted(csr.indptr, csr.indptr + csr.rows + 1)) return false;
  for (int64_t row = 0; row < csr.rows; ++row) {
    int64_t last = -1;
    for (int64_t i = csr.indptr[row]; i < csr.indptr[row + 1]; ++i) {
      if (csr.token_ids[i] <= last || csr.token_ids[i] > INT32_MAX) return false;
      last = csr.token_ids[i];
    }
  }
  return true;
}

void lexical_scores(const LexicalScoresArgs& a) {
  const int64_t queries = a.queries.rows, documents = a.documents.rows;
  const int64_t query_entries = a.queries.indptr[queries];
  const int64_t document_entries = a.documents.indptr[documents];
  if (a.aligned) {
    const int64_t entries = query_entries + document_entries;
    return parallel_for(0, queries, grain(queries, entries), score_aligned, (void*)&a);
  }
  int64_t vocabulary = 0;
  for (int64_t i = 0; i < query_entries; ++i) {
    vocabulary = std::max(vocabulary, a.queries.token_ids[i] + 1);
  }
  ScoresJob job{a, vocabulary};
  if (queries >= num_threads()) {
    return parallel_for(0, queries, grain(queries, queries * document_entries), score_queries,
                        &job);
  }
  const int64_t entries = document_entries * queries;
  parallel_for(0, documents, grain(documents, entries), score_documents, &job);
}

}  // namespace embedfuse::cpu
