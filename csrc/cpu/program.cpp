#include "cpu/program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "embedfuse/dtype.h"

namespace embedfuse {

namespace {

constexpr int64_t kLine = 64;  // bytes of the cache; no two buffers share one

// Larger arenas are not kept: to get their memory anew takes little of a run on so many tokens.
constexpr int64_t kKeptBytes = 64 << 20;

int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t size) {
  for (int64_t i = 0; ids && i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= size) {
      throw std::out_of_range(std::string(name) + ": " + std::to_string(ids[i]) +
                              "; accepted are 0 to " + std::to_string(size - 1));
    }
  }
}

void count_positions(const Batch& batch, int64_t padding_idx, std::vector<int64_t>* positions) {
  positions->resize(batch.tokens);
  for (int64_t s = 0; s < batch.sequences; ++s) {
    int64_t next = padding_idx + 1;
    for (int64_t t = batch.cu_seqlens[s]; t < batch.cu_seqlens[s + 1]; ++t) {
      const bool padding = padding_idx >= 0 && batch.ids[t] == padding_idx;
      (*positions)[t] = padding ? padding_idx : next++;
    }
  }
}

}  // namespace

Program::Program(int dtype, int64_t few_rows) : dtype_(dtype), few_rows_(few_rows) {}

int Program::buffer(int64_t columns, bool per_sequence, bool external, int over) {
  buffers_.push_back({columns, per_sequence, external, over});
  return int(buffers_.size()) - 1;
}

int64_t Program::Run::rows(Columns x) const {
  return program.buffers_[x.buffer].per_sequence ? batch.sequences : batch.tokens;
}

char* Program::Run::at(Columns x) const {
  return x.buffer < 0 ? nullptr : arena.begin[x.buffer] + x.first * element_size(program.dtype_);
}

void Program::embed(Table words, Table types, Table positions, int64_t padding_idx, Columns sums,
                    Columns places) {
  embeds_ = true;
  calls_.push_back([=](const Run& run) {
    const Batch& batch = run.batch;
    const int64_t* position_ids = batch.position_ids;
    if (!position_ids) {
      count_positions(batch, padding_idx, &run.arena.position_ids);
      position_ids = run.arena.position_ids.data();
    }
    check_ids("input_ids", batch.ids, batch.tokens, words.size);
    check_ids("token_type_ids", batch.type_ids, batch.tokens, types.size);
    check_ids("position_ids", position_ids, batch.tokens, positions.size);
    cpu_kernels().embed({words.rows, types.rows, positions.rows, dtype_, batch.tokens,
                         run.stride(sums), batch.ids, batch.type_ids, position_ids, run.at(sums),
                         run.at(places)});
  });
}

void Program::linear(Columns x, std::vector<LinearPart> parts, int64_t depth, bool gelu,
                     Columns out) {
  calls_.push_back([=, parts = std::move(parts)](const Run& run) {
    const int64_t rows = run.rows(x);
    run_linear({run.at(x), parts.data(), int64_t(parts.size()), dtype_, rows, run.stride(out),
                depth, run.stride(x), gelu, run.at(out)},
               rows <= few_rows_);
  });
}

void Program::add_layer_norm(Columns x, Columns residual, const void* weight, const void* bias,
                             float eps, Columns out) {
  calls_.push_back([=](const Run& run) {
    cpu_kernels().add_layer_norm({run.at(x), run.at(residual), weight, bias, dtype_, run.rows(out),
                                  run.stride(out), run.stride(x), run.stride(residual), eps,
                                  run.at(out)});
  });
}

void Program::add_rms_norm(Columns x, Columns residual, const void* weight, int64_t heads,
                           int64_t hidden, float eps, Columns normed, Columns summed) {
  calls_.push_back([=](const Run& run) {
    const HeadsArg added = residual.buffer < 0 ? HeadsArg{} : run.heads(residual, hidden);
    cpu_kernels().add_rms_norm({run.heads(x, hidden), added, weight, dtype_, run.rows(x), heads,
                                hidden, eps, run.at(normed), run.at(summed)});
  });
}

void Program::rope(Columns x, Columns cos, Columns sin, int64_t heads, int64_t head_dim) {
  calls_.push_back([=](const Run& run) {
    cpu_kernels().rope({run.heads(x, head_dim), run.at(cos), run.at(sin), dtype_, run.rows(x),
                        heads, head_dim, run.stride(cos), run.stride(sin)});
  });
}

void Program::silu_mul(Columns gate, Columns up, int64_t columns, Columns out) {
  calls_.push_back([=](const Run& run) {
    cpu_kernels().silu_mul({run.at(gate), run.at(up), dtype_, run.rows(gate), columns,
                            run.stride(gate), run.stride(up), run.at(out)});
  });
}

void Program::attention(Columns query, Columns key, Columns value, VarlenAttentionArgs shape,
                        Columns out) {
  calls_.push_back([=](const Run& run) {
    VarlenAttentionArgs args = shape;
    args.query = run.heads(query, args.head_dim);
    args.key = run.heads(key, args.head_dim);
    args.value = run.heads(value, args.head_dim);
    args.dtype = dtype_;
    args.batch = run.batch.sequences;
    args.cu_seqlens_k = run.batch.cu_seqlens;
    const bool picked = buffers_[query.buffer].per_sequence;
    args.cu_seqlens_q = picked ? run.arena.cu_picked.data() : args.cu_seqlens_k;
    args.out = run.at(out);
    cpu_kernels().varlen_attention(args);
  });
}

void Program::pick(Columns x, int64_t columns, Columns out) {
  const int64_t bytes = columns * element_size(dtype_);
  calls_.push_back([=](const Run& run) {
    const int64_t from = run.stride(x) * element_size(dtype_);
    const int64_t to = run.stride(out) * element_size(dtype_);
    for (int64_t i = 0; i < run.batch.sequences; ++i) {
      std::memcpy(run.at(out) + i * to, run.at(x) + run.batch.picked[i] * from, bytes);
    }
  });
}

void Program::run(const std::vector<uintptr_t>& external, const Batch& batch) {
  size_t wanted = 0;
  bool per_sequence = false;
  for (const Buffer& buffer : buffers_) {
    wanted += buffer.external;
    per_sequence |= buffer.per_sequence;
  }
  if (external.size() != wanted || (per_sequence && !batch.picked) || (embeds_ && !batch.ids)) {
    throw std::invalid_argument("external, picked, ids: not what the program was recorded with");
  }
  std::unique_ptr<Arena> arena;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      arena = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!arena) arena = std::make_unique<Arena>();
  place(*arena, external, batch);
  for (const auto& call : calls_) call({*this, *arena, batch});
  if (arena->bytes > kKeptBytes) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(arena));
}

void Program::place(Arena& arena, const std::vector<uintptr_t>& external,
                    const Batch& batch) const {
  const auto owner = [&](size_t i) { return buffers_[i].over < 0 ? i : size_t(buffers_[i].over); };
  std::vector<int64_t> sizes(buffers_.size());
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const Buffer& buffer = buffers_[i];
    if (buffer.external) continue;
    const int64_t rows = buffer.per_sequence ? batch.sequences : batch.tokens;
    const int64_t size = rows * buffer.columns * element_size(dtype_);
    sizes[owner(i)] = std::max(sizes[owner(i)], (size + kLine - 1) / kLine * kLine);
  }
  std::vector<int64_t> offsets;
  int64_t bytes = kLine;
  for (const int64_t size : sizes) {
    offsets.push_back(bytes);
    bytes += size;
  }
  if (arena.bytes < bytes) {
    arena.memory.reset();  // before, so that two do not exist at a time
    arena.memory.reset(new char[bytes]);
    arena.bytes = bytes;
  }
  const uintptr_t memory = uintptr_t(arena.memory.get());
  const uintptr_t aligned = memory / kLine * kLine;
  arena.begin.clear();
  size_t given = 0;
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const uintptr_t begin = buffers_[i].external ? external[given++] : aligned + offsets[owner(i)];
    arena.begin.push_back((char*)begin);
  }
  for (int64_t i = int64_t(arena.cu_picked.size()); i <= batch.sequences; ++i) {
    arena.cu_picked.push_back(int32_t(i));
  }
}

void run_linear(const LinearArgs& args, bool few_rows) {
  if (few_rows) return cpu_kernels().linear_few_rows(args);
  // Reused by later calls (a few MB): new pages in every call would cost as much as the arithmetic.
  static thread_local std::vector<float> scratch;
  const size_t wanted = cpu_kernels().linear_scratch(args) + kLine / sizeof(float);
  if (scratch.size() < wanted) scratch.resize(wanted);
  // No register is loaded from two lines.
  cpu_kernels().linear(args, (float*)((uintptr_t(scratch.data()) + kLine - 1) / kLine * kLine));
}

}  // namespace embedfuse
