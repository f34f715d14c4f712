// Lexical kernels without vector instructions: compiled once, for every processor.
#pragma once
#include "embedfuse/args.h"

namespace embedfuse::cpu {

// index (tokens): the kept tokens of all sequences, by sequence and ascending id, then -1. indptr (batch + 1): where
// each sequence's entries begin there, and the end. order (tokens): for each sequence the numbers of its entries, from
// 0, in the order in which their ids first occur in it, then -1. False if a kept id is outside [0, 2^31).
bool sparse_scatter(const SparseScatterArgs&, int64_t* index, int64_t* indptr, int64_t* order);

// False if the bounds of the rows do not ascend from 0 to `entries`, ids do not ascend within a row, or an id is
// outside [0, 2^31).
bool valid_csr(const CsrArgs&, int64_t entries);
void lexical_scores(const LexicalScoresArgs&);

}  // namespace embedfuse::cpu
