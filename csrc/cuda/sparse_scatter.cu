// x_bv = max over the tokens t of sequence b with id v of max(w_t, 0), NaN largest.
//
// sparse_dense: a thread per token takes the maximum into a zeroed output, whose bits order as the weights do.
// sparse_scatter: a block per sequence sorts (id, position) pairs, so that the tokens of an entry lie side by
// side; atomicMax finds the best of each, weight first, then the earlier position. A second, small launch moves
// the entries of all sequences together. Up to kSharedTokens tokens are sorted in shared memory; longer sequences
// in a scratch buffer, in L2, by tiles of shared memory.
// Limits: with fewer sequences than the GPU has SMs the others are idle; the second launch reads the counts of all
// sequences in each block, and their number squared passes the time of the first from some 10,000 on.
#include "cuda/kernels.h"
#include "embedfuse/cuda.cuh"

namespace embedfuse::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kTokenThreads = 256;
constexpr int kSharedTokens = 2048;

using Key = unsigned long long;
constexpr Key kNoToken = ~0ull;

// The bits of the weight if it gives an entry, else 0; one number for all NaN, above all others.
__device__ inline uint32_t order_key(const SparseScatterArgs& a, int64_t t) {
  for (int i = 0; i < a.n_excluded; ++i) {
    if (a.input_ids[t] == a.excluded[i]) return 0;
  }
  const bool wide = a.dtype == kFloat32;
  const uint32_t bits = wide ? static_cast<const uint32_t*>(a.token_weights)[t]
                             : static_cast<const uint16_t*>(a.token_weights)[t];
  const uint32_t infinity = wide ? 0x7f800000 : a.dtype == kFloat16 ? 0x7c00 : 0x7f80;
  const uint32_t magnitude = bits & (wide ? 0x7fffffff : 0x7fff);
  if (magnitude > infinity) return infinity | infinity >> 1;
  return bits == magnitude ? bits : 0;
}

// One step of the sorting network: compares each key with the one `stride` further, or, mirrored, the first with
// the last of each 2 * stride, and so on inwards. Keys from n on count as the largest.
__device__ inline void compare(Key* keys, int n, int stride, bool mirrored) {
  for (int pair = threadIdx.x;; pair += blockDim.x) {
    const int within = pair & (stride - 1), i = 2 * pair - within;
    if (i >= n) break;
    const int j = mirrored ? i + 2 * (stride - within) - 1 : i + stride;
    if (j < n && keys[j] < keys[i]) {
      const Key key = keys[i];
      keys[i] = keys[j];
      keys[j] = key;
    }
  }
  __syncthreads();
}

// From sorted runs of 2 * stride, each in two sorted halves of which no key of the first is above one of the second.
__device__ inline void merge(Key* keys, int n, int stride) {
  for (; stride > 0; stride /= 2) compare(keys, n, stride, false);
}

__device__ inline void sort(Key* keys, int n) {
  __syncthreads();
  for (int run = 1; run < n; run *= 2) {
    compare(keys, n, run, true);
    merge(keys, n, run / 2);
  }
}

// Loads each kSharedTokens of the keys into the tile, for sort or merge, and stores them.
template <class F>
__device__ inline void in_tiles(Key* keys, int n, Key* tile, F sort_or_merge) {
  for (int first = 0; first < n; first += kSharedTokens) {
    const int size = min(kSharedTokens, n - first);
    for (int i = threadIdx.x; i < size; i += blockDim.x) tile[i] = keys[first + i];
    __syncthreads();
    sort_or_merge(tile, size);
    for (int i = threadIdx.x; i < size; i += blockDim.x) keys[first + i] = tile[i];
    __syncthreads();
  }
}

__device__ inline void sort_long(Key* keys, int n, Key* tile) {
  __syncthreads();
  in_tiles(keys, n, tile, sort);
  for (int run = kSharedTokens; run < n; run *= 2) {
    compare(keys, n, run, true);
    for (int stride = run / 2; stride >= kSharedTokens; stride /= 2) {
      compare(keys, n, stride, false);
    }
    in_tiles(keys, n, tile, [](Key* some, int size) { merge(some, size, kSharedTokens / 2); });
  }
}

// Of one sequence: its sorted keys, the best token of each entry, the entry of each token that is its id's first.
struct Sequence {
  int64_t start;
  int n;
  Key *keys, *best;
  int* entry_at;
};

__device__ inline void fill(const SparseScatterArgs& a, const Sequence& s) {
  for (int t = threadIdx.x; t < s.n; t += blockDim.x) {
    const bool counts = order_key(a, s.start + t) != 0;
    s.keys[t] = counts ? Key(a.input_ids[s.start + t]) << 32 | uint32_t(t) : kNoToken;
    s.best[t] = 0;
    s.entry_at[t] = -1;
  }
}

// Numbers the entries by id; how many they are.
__device__ inline int find_best(const SparseScatterArgs& a, const Sequence& s, int* counts) {
  int entries = 0;
  for (int first = 0; first < s.n; first += blockDim.x) {
    const int i = first + threadIdx.x;
    const Key key = i < s.n ? s.keys[i] : kNoToken;
    const bool begins = key != kNoToken && (i == 0 || s.keys[i - 1] >> 32 != key >> 32);
    const Rank rank = block_rank(begins, counts);
    const int entry = entries + rank.before - !begins;
    entries += rank.total;
    if (key == kNoToken) continue;
    const uint32_t t = uint32_t(key);
    if (begins) s.entry_at[t] = entry;
    atomicMax(&s.best[entry], Key(order_key(a, s.start + t)) << 32 | uint32_t(~t));
  }
  __syncthreads();
  return entries;
}

__device__ inline void write(const Sequence& s, int entries, int* index, int* order, int* counts) {
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    index[i] = int(s.start) + int(~uint32_t(s.best[i]));
  }
  int written = 0;
  for (int first = 0; first < s.n; first += blockDim.x) {
    const int t = first + threadIdx.x;
    const int entry = t < s.n ? s.entry_at[t] : -1;
    const Rank rank = block_rank(entry >= 0, counts);
    if (entry >= 0) order[written + rank.before] = entry;
    written += rank.total;
  }
}

// Of each sequence from its start on, and how many entries it has.
struct Entries {
  int *index, *order;  // (tokens)
  int* counts;         // (batch)
};

// Scratch: keys and best (tokens), entry_at (tokens); used by sequences that shared memory does not hold.
__global__ void __launch_bounds__(kThreads)
    sequences_kernel(const __grid_constant__ SparseScatterArgs a, Key* scratch, const Entries out) {
  __shared__ Key keys[kSharedTokens], best[kSharedTokens];
  __shared__ int entry_at[kSharedTokens], counts[kMaxWarps];
  const int64_t start = a.cu_seqlens[blockIdx.x];
  const int n = a.cu_seqlens[blockIdx.x + 1] - int(start);
  const bool is_short = n <= kSharedTokens;
  int* entry_at_scratch = reinterpret_cast<int*>(scratch + 2 * a.tokens);
  const Sequence s = is_short ? Sequence{start, n, keys, best, entry_at}
                              : Sequence{start, n, scratch + start, scratch + a.tokens + start,
                                         entry_at_scratch + start};
  fill(a, s);
  if (is_short) {
    sort(s.keys, n);
  } else {
    sort_long(s.keys, n, keys);
  }
  const int entries = find_best(a, s, counts);
  write(s, entries, out.index + start, out.order + start, counts);
  if (threadIdx.x == 0) out.counts[blockIdx.x] = entries;
}

// A block per sequence, and one more for the last element of indptr; together they write -1 behind the entries.
__global__ void __launch_bounds__(kTokenThreads)
    join_kernel(const __grid_constant__ SparseScatterArgs a, const Entries in, int64_t* index,
                int64_t* indptr, int64_t* order) {
  __shared__ int sums[kMaxWarps], totals[kMaxWarps];
  const int b = blockIdx.x;
  int before = 0, total = 0;
  for (int i = threadIdx.x; i < a.batch; i += blockDim.x) {
    total += in.counts[i];
    if (i < b) before += in.counts[i];
  }
  before = block_reduce(before, 0, Add{}, sums);
  total = block_reduce(total, 0, Add{}, totals);
  if (threadIdx.x == 0) indptr[b] = before;
  for (int i = threadIdx.x; b < a.batch && i < in.counts[b]; i += blockDim.x) {
    index[before + i] = in.index[a.cu_seqlens[b] + i];
    order[before + i] = in.order[a.cu_seqlens[b] + i];
  }
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = total + int64_t(b) * blockDim.x + threadIdx.x; t < a.tokens; t += threads) {
    index[t] = order[t] = -1;
  }
}

__device__ inline void atomic_max(uint32_t* p, uint32_t value) { atomicMax(p, value); }
__device__ inline void atomic_max(uint16_t* p, uint16_t value) {
  uint16_t found = 0;  // likely, and what is there the first exchange tells
  while (found < value) {
    const uint16_t before = atomicCAS(p, found, value);
    if (before == found) break;
    found = before;
  }
}

// The sequence of the token, batch for one behind all.
__device__ inline int64_t sequence_of(const SparseScatterArgs& a, int64_t t) {
  int64_t low = 0, high = a.batch;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.cu_seqlens[middle + 1] <= t) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Bits>
__global__ void __launch_bounds__(kTokenThreads)
    dense_kernel(const __grid_constant__ SparseScatterArgs a, int64_t vocabulary, Bits* out) {
  const int64_t t = blockIdx.x * int64_t(kTokenThreads) + threadIdx.x;
  if (t >= a.tokens) return;
  const uint32_t key = order_key(a, t);
  const int64_t b = sequence_of(a, t);
  if (key == 0 || b == a.batch) return;
  const int64_t id = a.input_ids[t];
  if (id < 0 || id >= vocabulary) __trap();
  atomic_max(out + b * vocabulary + id, Bits(key));
}

}  // namespace

cudaError_t sparse_scatter(const SparseScatterArgs& a, int64_t* index, int64_t* indptr,
                           int64_t* order, void* scratch, cudaStream_t stream) {
  Key* keys = static_cast<Key*>(scratch);
  int* rest = reinterpret_cast<int*>(keys + 2 * a.tokens) + a.tokens;
  const Entries entries{rest, rest + a.tokens, rest + 2 * a.tokens};
  if (a.batch > 0) {
    sequences_kernel<<<unsigned(a.batch), kThreads, 0, stream>>>(a, keys, entries);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  join_kernel<<<unsigned(a.batch + 1), kTokenThreads, 0, stream>>>(a, entries, index, indptr,
                                                                   order);
  return cudaGetLastError();
}

cudaError_t sparse_dense(const SparseScatterArgs& a, int64_t vocabulary, void* out,
                         cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  const unsigned blocks = unsigned((a.tokens + kTokenThreads - 1) / kTokenThreads);
  if (a.dtype == kFloat32) {
    dense_kernel<uint32_t>
        <<<blocks, kTokenThreads, 0, stream>>>(a, vocabulary, static_cast<uint32_t*>(out));
  } else {
    dense_kernel<uint16_t>
        <<<blocks, kTokenThreads, 0, stream>>>(a, vocabulary, static_cast<uint16_t*>(out));
  }
  return cudaGetLastError();
}

}  // namespace embedfuse::cuda
