// Lexical kernels without vector instructions: compiled once, for every processor.
#pragma once
#include "embedfuse/args.h"

namespace embedfuse::cpu {

// index (tokens): from cu_seqlens[b] on, the tokens that sequence b keeps, by ascending id, then -1.
// counts (batch): how many it keeps. order (tokens): from cu_seqlens[b] on, the numbers of its entries, 0 to
// counts[b] - 1, in the order in which their ids first occur. False if a kept id is outside [0, 2^31).
bool sparse_scatter(const SparseScatterArgs&, int64_t* index, int64_t* counts, int64_t* order);

// False if the bounds of the rows do not ascend from 0 to `entries`, ids do not ascend within a row, or an id is
// outside [0, 2^31).
bool valid_csr(const CsrArgs&, int64_t entries);
void lexical_scores(const LexicalScoresArgs&);

}  // namespace embedfuse::cpu
