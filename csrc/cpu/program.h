// A forward as a list of kernel calls, recorded once and run as one: between two kernels there is no Python, and no
// memory is allocated.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "embedfuse/args.h"

namespace embedfuse {

// Columns of a buffer, from `first` on.
struct Columns {
  int buffer;
  int64_t first;
};

// A matrix with one row per token, or one per sequence. External ones are the caller's memory.
struct Buffer {
  int64_t columns;
  bool per_sequence, external;
  int over;  // the buffer whose memory it may use, or -1
};

// An embedding table: (rows, hidden).
struct Table {
  const void* rows;
  int64_t size;
};

// What one run works on.
struct Batch {
  int64_t tokens, sequences;
  const int32_t* cu_seqlens;  // (sequences + 1)
  const int32_t*
      picked;  // (sequences): the token of each sequence in buffers with a row per sequence
  // (tokens) each, for `embed`; null: type 0, and positions counted by the program.
  const int64_t *ids, *type_ids, *position_ids;
};

// Safe to run from several threads: each run takes an arena of its own, and gives it back for the next.
class Program {
 public:
  // few_rows: up to how many rows `linear` computes dot products.
  Program(int dtype, int64_t few_rows);

  int buffer(int64_t columns, bool per_sequence, bool external, int over);

  // sums + places are the embeddings. Without position ids a token's position is its place in its sequence; if
  // padding_idx >= 0, it is padding_idx plus the number of other ids up to its own, and that of padding_idx is itself.
  void embed(Table words, Table types, Table positions, int64_t padding_idx, Columns sums,
             Columns places);
  void linear(Columns x, std::vector<LinearPart> parts, int64_t depth, bool gelu, Columns out);
  void add_layer_norm(Columns x, Columns residual, const void* weight, const void* bias, float eps,
                      Columns out);
  // residual, summed: buffer -1 for none. heads: a row has so many of `hidden` columns, each normalised alone.
  void add_rms_norm(Columns x, Columns residual, const void* weight, int64_t heads, int64_t hidden,
                    float eps, Columns normed, Columns summed);
  void rope(Columns x, Columns cos, Columns sin, int64_t heads, int64_t head_dim);
  void silu_mul(Columns gate, Columns up, int64_t columns, Columns out);
  // Query rows: all tokens, or the picked ones, by the buffer of `query`.
  void attention(Columns query, Columns key, Columns value, VarlenAttentionArgs shape, Columns out);
  // The picked rows of x.
  void pick(Columns x, int64_t columns, Columns out);

  // external: the addresses of the external buffers, in their order.
  void run(const std::vector<uintptr_t>& external, const Batch& batch);

 private:
  struct Arena {
    std::unique_ptr<char[]> memory;
    int64_t bytes = 0;
    std::vector<char*> begin;        // of each buffer
    std::vector<int32_t> cu_picked;  // 0, 1, 2, ...
    std::vector<int64_t> position_ids;
  };
  struct Run {
    const Program& program;
    Arena& arena;
    const Batch& batch;

    int64_t rows(Columns x) const;
    int64_t stride(Columns x) const { return program.buffers_[x.buffer].columns; }
    char* at(Columns x) const;
    HeadsArg heads(Columns x, int64_t head_dim) const { return {at(x), stride(x), head_dim}; }
  };

  void place(Arena& arena, const std::vector<uintptr_t>& external, const Batch& batch) const;

  const int dtype_;
  const int64_t few_rows_;
  bool embeds_ = false;
  std::vector<Buffer> buffers_;
  std::vector<std::function<void(const Run&)>> calls_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> idle_;
};

// ops.linear: as dot products for few rows, else in tiles, whose scratch memory each thread keeps.
void run_linear(const LinearArgs& args, bool few_rows);

}  // namespace embedfuse
