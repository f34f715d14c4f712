// score(q, d) = sum over the rows i of q of max over the rows j of d of q_i d_j, and where each maximum is.
//
// The queries are few and small: a thread rearranges a group of them as linear.h does with x, so that query
// rows are in the lanes of the registers, and reads every document once, kTileColumns rows at a time. Maxima are
// then computed lane by lane, without a horizontal step. Documents in a dtype without an instruction are
// converted to fp32 a chunk at a time; a chunk stays in the caches for all queries of the group. If the
// processor multiplies bytes, int8 documents are screened first (maxsim_screen.h).
// Limits: a query costs as much as its rows rounded up to whole registers.
// Included once per ISA (no include guard).

struct MaxSimJob {
  const MaxSimArgs& a;
  float* scratch;
  int64_t thread_floats;  // of scratch
  int64_t items;
  int64_t queries_at_once;  // of an item
  int64_t next;             // the next item to take
};

inline int64_t longest_query(const MaxSimArgs& a) {  // in blocks
  int64_t longest = 1;
  for (int64_t i = 0; i < a.query.count; ++i) {
    const int64_t blocks = blocks_of(span_rows(a.query, i));
    if (blocks > longest) longest = blocks;
  }
  return longest;
}

// Blocks that a group may have: those of the longest query, or as many as the budget holds.
inline int64_t group_blocks(const MaxSimArgs& a) {
  const int64_t longest = longest_query(a);
  if (a.pairs) return longest;
  const int64_t fit = kGroupFloats / (kBlockRows * (a.depth + 1)) / longest;
  const int64_t queries = fit < 1 ? 1 : fit < a.query.count ? fit : a.query.count;
  return longest * queries;
}

inline int64_t maxsim_threads(const MaxSimArgs& a) {
  int64_t rows = 0;
  if (a.pairs) {
    for (int64_t p = 0; p < a.pair_count; ++p) {
      rows += span_rows(a.query, a.pairs[2 * p]) * span_rows(a.document, a.pairs[2 * p + 1]);
    }
  } else {
    int64_t documents = 0;
    for (int64_t i = 0; i < a.query.count; ++i) rows += span_rows(a.query, i);
    for (int64_t i = 0; i < a.document.count; ++i) documents += span_rows(a.document, i);
    rows *= documents;
  }
  // One thread per 2 million multiplications, which take it about 50 us.
  const int64_t wanted = 1 + rows * a.depth / 2000000;
  return wanted < num_threads() ? wanted : num_threads();
}

// Floats of a packed row: the tile unit pads it to 32 values of bf16.
inline int64_t row_floats(const MaxSimArgs& a) { return a.depth < 16 ? 16 : a.depth; }

// Updates the maxima of all queries of the group with one chunk of a document.
template <class M>
void update_queries(const MaxSimArgs& a, const QueryGroup& group,
                    const typename M::Element* document, int64_t stride, int64_t rows,
                    int64_t place, const float* factors) {
  int64_t block = 0;
  for (int64_t q = group.first; q < group.last; ++q) {
    for (int64_t live = span_rows(a.query, q); live > 0; live -= kBlockRows, ++block) {
      update_block<M>(a, group, block, live, document, stride, rows, place, factors);
    }
  }
}

// The same with a whole document. Doc: its elements in memory; M multiplies those that it names, after a
// conversion if they differ.
template <class Doc, class M>
void update_document(const MaxSimArgs& a, const QueryGroup& group, int64_t document) {
  const int64_t step = chunk_rows(a, M::kRows), all = span_rows(a.document, document);
  const int64_t stride = a.document.stride;
  const auto* x = (const typename Doc::Element*)a.document.texts[document];
  const float* scale = a.scale ? a.scale + a.document.spans[2 * document] : nullptr;
  for (int64_t row = 0; row < all; row += step, x += step * stride) {
    const int64_t rows = all - row < step ? all - row : step;
    const float* factors = row_factors(a, x, rows, scale ? scale + row : nullptr, group.factor);
    if constexpr (sizeof(typename Doc::Element) == sizeof(typename M::Element)) {
      update_queries<M>(a, group, x, stride, rows, row, factors);
    } else {
      load_rows(x, stride, rows, a.depth, a.depth, group.chunk);
      update_queries<M>(a, group, group.chunk, a.depth, rows, row, factors);
    }
  }
}

// Packs the group's query rows, `padded` words each, zero beyond the row's end.
template <class In>
void pack_group(const MaxSimArgs& a, const QueryGroup& group, int64_t padded) {
  const int64_t words = a.depth / In::kPerWord, stride = a.query.stride;
  int64_t block = 0;
  for (int64_t q = group.first; q < group.last; ++q) {
    const auto* x = (const typename In::Element*)a.query.texts[q];
    for (int64_t left = span_rows(a.query, q); left > 0; left -= kBlockRows, ++block) {
      const int64_t rows = left < kBlockRows ? left : kBlockRows;
      float* packed = group.packed + block * kBlockRows * padded;
      pack_rows<In>(x, stride, rows, words, packed);
      for (int64_t i = words * kBlockRows; i < padded * kBlockRows; ++i) packed[i] = 0.f;
      for (int64_t r = 0; r < rows && a.normalize; ++r, x += stride) {
        group.query_norm[block * kBlockRows + r] = normalizer(x, a.depth, 1.f);
      }
      if (!a.normalize) x += rows * stride;
    }
  }
}

// A document with an additional zero vector starts from its product 0, at no place.
inline void start_best(const MaxSimArgs& a, const QueryGroup& group, int64_t blocks,
                       int64_t document) {
  const bool zero = a.zero && a.zero[document];
  for (int64_t r = 0; r < blocks * kBlockRows; ++r) {
    group.best[r] = zero ? 0.f : -__builtin_inff();
    group.place[r] = bits_float(zero ? ~0u : 0u);
  }
}

// Stores the scores of the group's queries for a document: pair `pair`, and every `step`th pair after it.
inline void store_scores(const MaxSimArgs& a, const QueryGroup& group, int64_t document,
                         int64_t pair, int64_t step) {
  const bool empty = span_rows(a.document, document) == 0;
  int64_t block = 0;
  for (int64_t q = group.first; q < group.last; ++q, pair += step) {
    const int64_t rows = empty ? 0 : span_rows(a.query, q), at = block * kBlockRows;
    float total = 0.f;
    for (int64_t r = at; r < at + rows; ++r) {
      total += a.normalize ? group.best[r] * group.query_norm[r] : group.best[r];
    }
    a.scores[pair] = total;
    for (int64_t r = 0; r < a.width; ++r) {
      a.argmax[pair * a.width + r] = r < rows ? int32_t(float_bits(group.place[at + r])) : -1;
    }
    block += blocks_of(span_rows(a.query, q));
  }
}

// Computes every product, by M.
template <class Query, class Doc, class M>
struct Direct {
  Direct(const MaxSimArgs&, int64_t, float*) {}
  static int64_t floats(const MaxSimArgs&, int64_t) { return 0; }
  void pack(const MaxSimArgs& a, const QueryGroup& group) const {
    pack_group<Query>(a, group, M::words(a.depth));
  }
  void update(const MaxSimArgs& a, const QueryGroup& group, int64_t document) const {
    update_document<Doc, M>(a, group, document);
  }
};

#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
// Computes in fp32 only the products that may be a maximum, found by `Bytes`.
template <class Query, class Bytes>
struct Screened {
  Screen screen;
  Screened(const MaxSimArgs& a, int64_t rows, float* scratch)
      : screen(screen_shape<Bytes>(a), rows, scratch) {}
  static int64_t floats(const MaxSimArgs& a, int64_t rows) {
    return screen_floats(screen_shape<Bytes>(a), rows);
  }
  void pack(const MaxSimArgs& a, const QueryGroup& group) const {
    pack_group<Query>(a, group, a.depth);
    screen_queries<Query>(a, group, screen);
  }
  void update(const MaxSimArgs& a, const QueryGroup& group, int64_t document) const {
    screen_document<Query, Bytes>(a, group, screen, document);
  }
};
#endif

// Takes one item after another until none is left, because documents differ too much in length to be assigned in
// advance. An item is a pair, or a document with a group of queries; the items of a group are consecutive.
template <class Version>
void maxsim_items(int64_t slot, int64_t, void* context) {
  MaxSimJob& job = *(MaxSimJob*)context;
  const MaxSimArgs& a = job.a;
  const int64_t rows = group_blocks(a) * kBlockRows;
  QueryGroup group;
  group.packed = job.scratch + slot * job.thread_floats;
  group.best = group.packed + rows * row_floats(a);
  group.place = group.best + rows;
  group.query_norm = group.place + rows;
  group.chunk = group.query_norm + rows;
  group.factor = group.chunk + (chunk_rows(a, kTileColumns) + kTile) * a.depth;
  const Version version(a, rows, group.factor + kChunkRows);
  int64_t blocks = 0;
  for (;;) {
    const int64_t item = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (item >= job.items) return;
    const int64_t first =
        a.pairs ? a.pairs[2 * item] : item / a.document.count * job.queries_at_once;
    const int64_t document = a.pairs ? a.pairs[2 * item + 1] : item % a.document.count;
    if (group.last == 0 || first != group.first) {
      group.first = first;
      group.last = first + job.queries_at_once;
      if (group.last > a.query.count) group.last = a.query.count;
      blocks = 0;
      for (int64_t q = first; q < group.last; ++q) blocks += blocks_of(span_rows(a.query, q));
      version.pack(a, group);
    }
    start_best(a, group, blocks, document);
    version.update(a, group, document);
    const int64_t pair = a.pairs ? item : first * a.document.count + document;
    store_scores(a, group, document, pair, a.document.count);
  }
}

// A version and the floats of scratch that each of its threads needs.
struct MaxSimVersion {
  RangeFn items;
  int64_t thread_floats;
};

template <class Version>
MaxSimVersion version_of(const MaxSimArgs& a) {
  const int64_t rows = group_blocks(a) * kBlockRows;
  const int64_t floats = rows * (row_floats(a) + 3) +
                         (chunk_rows(a, kTileColumns) + kTile) * a.depth + kChunkRows +
                         Version::floats(a, rows);
  return {maxsim_items<Version>, (floats + 15) / 16 * 16};  // whole cache lines
}

// Products that this ISA computes besides those in fp32: of pairs of bf16, and of bytes.
struct IsaProducts {
#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
  using Bf16 = Direct<Bf16Pairs, Bf16Pairs, Registers<Bf16Pairs>>;
  template <class Query>
  using Int8 = Screened<Query, VnniBytes>;
#endif
};

template <class Products, class Query>
MaxSimVersion int8_version(const MaxSimArgs& a) {
#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
  if (a.depth <= kScreenDepth) return version_of<typename Products::template Int8<Query>>(a);
#endif
  return version_of<Direct<Query, Floats<int8_t>, Registers<Floats<float>>>>(a);
}

template <class Products>
MaxSimVersion maxsim_version(const MaxSimArgs& a) {
  using Fp32 = Floats<float>;
  using Fp16 = Floats<f16>;
  using Bf16 = Floats<bf16>;
  if (a.scale) {
    return a.dtype == kFloat32   ? int8_version<Products, Fp32>(a)
           : a.dtype == kFloat16 ? int8_version<Products, Fp16>(a)
                                 : int8_version<Products, Bf16>(a);
  }
#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
  if (a.dtype == kBFloat16 && a.depth % 2 == 0) return version_of<typename Products::Bf16>(a);
#endif
  return a.dtype == kFloat32   ? version_of<Direct<Fp32, Fp32, Registers<Fp32>>>(a)
         : a.dtype == kFloat16 ? version_of<Direct<Fp16, Fp16, Registers<Fp32>>>(a)
                               : version_of<Direct<Bf16, Bf16, Registers<Fp32>>>(a);
}

// Floats of scratch that `maxsim` needs.
template <class Products = IsaProducts>
int64_t maxsim_scratch(const MaxSimArgs& a) {
  return maxsim_threads(a) * maxsim_version<Products>(a).thread_floats + 16;
}

template <class Products = IsaProducts>
void maxsim(const MaxSimArgs& a, float* scratch) {
  const int64_t threads = maxsim_threads(a);
  const MaxSimVersion version = maxsim_version<Products>(a);
  scratch = (float*)((uintptr_t(scratch) + 63) / 64 * 64);
  MaxSimJob job{a, scratch, version.thread_floats, a.pair_count, 1, 0};
  if (!a.pairs && a.query.count && a.document.count) {
    // Groups as large as the scratch memory allows, but enough items for all threads.
    const int64_t most = group_blocks(a) / longest_query(a);
    const int64_t fair = a.query.count * a.document.count / (4 * threads) + 1;
    job.queries_at_once = most < fair ? most : fair;
    const int64_t groups = (a.query.count + job.queries_at_once - 1) / job.queries_at_once;
    job.items = groups * a.document.count;
  }
  parallel_for(0, threads, 1, version.items, &job);
}
