// Lexical kernels that touch no vector registers: compiled once, for every processor.
#pragma once
#include "embedfuse/args.h"

namespace embedfuse::cpu {

// index (tokens): from cu_seqlens[b] on, the tokens that sequence b keeps, by rising id, then -1.
// counts (batch): how many it keeps. order (tokens): likewise, the numbers of its entries, 0 to counts[b] - 1, in
// the order in which their ids first stand in it. False if a kept id is outside [0, 2^31).
bool sparse_scatter(const SparseScatterArgs&, int64_t* index, int64_t* counts, int64_t* order);

// False if the rows' bounds do not rise from 0 to `entries`, or an id is outside [0, 2^31).
bool valid_csr(const CsrArgs&, int64_t entries);
void lexical_scores(const LexicalScoresArgs&);

}  // namespace embedfuse::cpu
