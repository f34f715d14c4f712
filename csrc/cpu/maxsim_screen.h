// maxsim over int8 documents where the processor multiplies bytes (VNNI): products of the documents with
// queries rounded to int8 show which rows may hold a maximum, and only those meet the queries themselves.
// Included once per ISA (no include guard).
//
// q = c Q + e with Q whole numbers up to 127. For a document row with values D and factor f
//     | f q D - c f Q D |  <=  |e| |f D|  <=  |e| B,   B the largest |f D| of the chunk,
// so a row whose f Q D lies more than 2 (|e| / c) B below the largest cannot hold the maximum. What is left
// (one or two rows for each query row) is multiplied in fp32; the result is the exact maximum, as if all had been.
// Where more than an eighth is left, or numbers are not finite, all rows of the chunk are multiplied in fp32.
// The instruction takes signed by unsigned bytes: a document's become D + 128, and sums begin at -128 sum(Q).
// A tile unit (AMX) would take the place of `screen_tile` alone.

constexpr int64_t kScreenBytes = 384 * 1024;
// Sums of more products could pass 2^31.
constexpr int64_t kScreenDepth = 32768;

inline int64_t screen_stride(const MaxSimArgs& a) { return (a.depth + 63) / 64 * 64; }
inline int64_t screen_quads(const MaxSimArgs& a) { return (a.depth + 3) / 4; }
inline int64_t screen_rows(const MaxSimArgs& a) {
  const int64_t fit = kScreenBytes / (screen_stride(a) + 1) / kTileColumns * kTileColumns;
  return fit < kTileColumns ? kTileColumns : fit > kChunkRows ? kChunkRows : fit;
}
// Products of `live` query rows with `rows` document rows that may be left.
inline int64_t most_left(int64_t live, int64_t rows) { return live + live * rows / 8; }

// What a thread holds; arrays of one value per query row of the group come first.
struct Screen {
  float *packed, *start;                            // int8 (quad, kBlockRows, 4) per block; int32
  float *inverse, *slack;                           // 1 / c, and |e| / c with what fp32 may round
  float *chunk, *squares, *products, *tops, *left;  // of a document

  Screen(const MaxSimArgs& a, int64_t query_rows, float* scratch) {
    const int64_t rows = screen_rows(a);
    packed = scratch;
    start = packed + query_rows * screen_quads(a);
    inverse = start + query_rows;
    slack = inverse + query_rows;
    chunk = slack + query_rows;
    squares = chunk + rows * screen_stride(a) / 4;
    products = squares + rows + Vec::N;
    tops = products + rows * kBlockRows;
    left = tops + rows * kBlockRows / kTileColumns;
  }
};

inline int64_t screen_floats(const MaxSimArgs& a, int64_t query_rows) {
  const int64_t rows = screen_rows(a);
  return query_rows * (screen_quads(a) + 3) + rows * (screen_stride(a) / 4 + 1 + kBlockRows) +
         rows * kBlockRows / kTileColumns + Vec::N + most_left(kBlockRows, rows);
}

// One query row, number `row` of the group. One that is not finite, or too small for c, gets a slack with
// which every product is left.
template <class T>
void screen_query(const T* x, int64_t depth, int64_t row, int64_t quads, const Screen& screen) {
  float largest = 0.f, poison = 0.f;
  for (int64_t k = 0; k < depth; ++k) {
    const float size = __builtin_fabsf(to_float(x[k]));
    largest = size > largest ? size : largest;
    poison += 0.f * size;
  }
  const bool usable = poison == 0.f && largest > 1e-30f && largest < 1e30f;
  const float step = usable ? largest / 127.f : 1.f;
  int8_t* packed = (int8_t*)(screen.packed + row / kBlockRows * kBlockRows * quads);
  packed += row % kBlockRows * 4;
  float squares = 0.f;
  int32_t total = 0;
  for (int64_t k = 0; k < 4 * quads; ++k) {
    const float value = usable && k < depth ? to_float(x[k]) : 0.f;
    // Adding 1.5 * 2^23 rounds to the nearest whole number.
    const float whole = (value / step + 0x1.8p+23f) - 0x1.8p+23f;
    const float error = value / step - whole;  // in steps: the square of a small e would be 0
    squares += error * error;
    total += int32_t(whole);
    packed[k / 4 * kBlockRows * 4 + k % 4] = int8_t(whole);
  }
  screen.start[row] = bits_float(uint32_t(-128 * total));
  screen.inverse[row] = 1.f / step;
  // Rounding of products to fp32: they are at most 127 sqrt(depth) B.
  const float rounding = 0x1p-20f * 127.f * __builtin_sqrtf(float(depth));
  screen.slack[row] = usable ? 1.01f * __builtin_sqrtf(squares) + rounding : __builtin_inff();
}

template <class Query>
void screen_queries(const MaxSimArgs& a, const QueryGroup& group, const Screen& screen) {
  const int64_t quads = screen_quads(a);
  int64_t row = 0;
  for (int64_t q = group.first; q < group.last; ++q) {
    const auto* x = (const typename Query::Element*)a.query.texts[q];
    for (int64_t r = 0; r < span_rows(a.query, q); ++r, x += a.query.stride, ++row) {
      screen_query(x, a.depth, row, quads, screen);
    }
    for (; row % kBlockRows; ++row) {  // lanes without a row: nothing is ever left
      screen.start[row] = screen.inverse[row] = 0.f;
      screen.slack[row] = -__builtin_inff();
      int32_t* packed = (int32_t*)screen.packed + row / kBlockRows * kBlockRows * quads;
      for (int64_t u = 0; u < quads; ++u) packed[u * kBlockRows + row % kBlockRows] = 0;
    }
  }
}

// Rows of a document to chunk rows of D + 128, with upper bounds of |D|^2.
inline void screen_copy(const int8_t* const rows[kTileColumns], int64_t depth, int64_t stride,
                        uint8_t* chunk, float* squares) {
  Vec sums[kTileColumns];
  for (int m = 0; m < kTileColumns; ++m, chunk += stride) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += 64) {
      const __mmask64 inside = depth - k < 64 ? (1ull << (depth - k)) - 1 : ~0ull;
      const __m512i x = _mm512_maskz_loadu_epi8(inside, rows[m] + k);
      _mm512_storeu_si512(chunk + k, _mm512_xor_si512(x, _mm512_set1_epi8(-128)));
      // |-128| is no signed byte, 127 stands for it; the bound makes up for that.
      const __m512i size = _mm512_abs_epi8(x);
      sum = _mm512_dpbusd_epi32(sum, size, _mm512_min_epu8(size, _mm512_set1_epi8(127)));
    }
    sums[m].v = _mm512_cvtepi32_ps(sum);
  }
  for (int m = 0; m < kTileColumns; m += 4) sum4(sums + m, squares + m);
}

// The largest |f D| of the chunk, rounded up; -1 where it is of no use.
inline float screen_bound(const float* squares, const float* factors, int64_t rows) {
  __m512 most = _mm512_setzero_ps(), total = most;
  for (int64_t r = 0; r < rows; r += Vec::N) {
    const __mmask16 inside = rows - r < Vec::N ? (1u << (rows - r)) - 1 : 0xffff;
    const __m512 norm = _mm512_sqrt_ps(_mm512_maskz_loadu_ps(inside, squares + r));
    const __m512 factor = _mm512_abs_ps(_mm512_maskz_loadu_ps(inside, factors + r));
    const __m512 size = _mm512_mul_ps(norm, factor);
    most = _mm512_max_ps(most, size);
    total = _mm512_add_ps(total, size);
  }
  const float bound = 1.0001f * (128.f / 127.f) * _mm512_reduce_max_ps(most);
  const bool usable = _mm512_reduce_add_ps(total) < 1e30f && bound > 1e-25f;
  return usable ? bound : -1.f;
}

// Lanes in which x is at least `floor`, or `floor` is NaN: inf - inf, after an infinite maximum of a query that
// has no bound.
inline uint32_t reached(Vec x, Vec floor) { return _mm512_cmp_ps_mask(x.v, floor.v, _CMP_NLT_UQ); }

// products[m] = factors[m] D_m Q for chunk rows m over VECS registers of query rows, and the largest of each in
// `tops`. Where the tile after next begins in the document is fetched meanwhile. Without the pragmas GCC
// unrolls too late to keep the sums in registers.
template <int VECS>
void screen_tile(const uint8_t* chunk, int64_t stride, const float* packed, const float* start,
                 int64_t quads, const float* factors, const int8_t* ahead, float* products,
                 float* tops) {
  __m512i acc[kTileColumns][VECS];
#pragma GCC unroll 8
  for (int m = 0; m < kTileColumns; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) acc[m][v] = _mm512_loadu_si512(start + v * Vec::N);
  }
  for (int64_t u = 0; u < quads; ++u) {
    __m512i x[VECS];
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) x[v] = _mm512_loadu_si512(packed + u * kBlockRows + v * Vec::N);
    __builtin_prefetch(ahead + u * kTileColumns * 4);
#pragma GCC unroll 8
    for (int m = 0; m < kTileColumns; ++m) {
      int32_t quad;
      __builtin_memcpy(&quad, chunk + m * stride + 4 * u, 4);
      const __m512i w = _mm512_set1_epi32(quad);
#pragma GCC unroll 3
      for (int v = 0; v < VECS; ++v) acc[m][v] = _mm512_dpbusd_epi32(acc[m][v], w, x[v]);
    }
  }
  Vec top[VECS];
#pragma GCC unroll 8
  for (int m = 0; m < kTileColumns; ++m) {
    const Vec factor = Vec::all(factors[m]);
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) {
      const Vec product = Vec{_mm512_cvtepi32_ps(acc[m][v])} * factor;
      product.store(products + (m * VECS + v) * Vec::N);
      top[v] = m ? max(top[v], product) : product;
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < VECS; ++v) top[v].store(tops + v * Vec::N);
}

// Numbers (row * VECS * N + lane) of the products that reach `floor`, of tiles whose tops do; -1 where they
// are more than `most`.
template <int VECS>
int64_t screen_left(const float* products, const float* tops, int64_t rows, const Vec floor[VECS],
                    int64_t most, uint32_t* left) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; r += kTileColumns, tops += VECS * Vec::N) {
    for (int v = 0; v < VECS; ++v) {
      if (!reached(Vec::load(tops + v * Vec::N), floor[v])) continue;
      for (int64_t m = r; m < rows && m < r + kTileColumns; ++m) {
        const int64_t at = (m * VECS + v) * Vec::N;
        for (uint32_t lanes = reached(Vec::load(products + at), floor[v]); lanes;
             lanes &= lanes - 1) {
          if (count == most) return -1;
          left[count++] = uint32_t(at + __builtin_ctz(lanes));
        }
      }
    }
  }
  return count;
}

template <class T>
float dot(const T* query, const int8_t* document, int64_t depth) {
  Vec even = Vec::zero(), odd = Vec::zero();
  int64_t k = 0;
  for (; k + 2 * Vec::N <= depth; k += 2 * Vec::N) {
    even = fma(Vec::load(query + k), Vec::load(document + k), even);
    odd = fma(Vec::load(query + k + Vec::N), Vec::load(document + k + Vec::N), odd);
  }
  float total = sum(even + odd);
  for (; k < depth; ++k) total += to_float(query[k]) * to_float(document[k]);
  return total;
}

struct ScreenChunk {
  const int8_t* rows;
  int64_t count, place;  // of its rows; number of the first one
  const float* factors;
};

// A chunk against block `block` of the group, whose `live` rows begin at `query`. The first block also
// brings the chunk into place. False: too many products are left.
template <class T, int VECS>
bool screen_block(const MaxSimArgs& a, const QueryGroup& group, const Screen& screen, int64_t block,
                  int64_t live, const T* query, const ScreenChunk& chunk) {
  constexpr int64_t kLanes = VECS * Vec::N;
  const int64_t stride = screen_stride(a), quads = screen_quads(a), base = block * kBlockRows;
  float* tops = screen.tops;
  for (int64_t r = 0; r < chunk.count; r += kTileColumns, tops += kLanes) {
    uint8_t* copy = (uint8_t*)screen.chunk + r * stride;
    const int8_t* rows[kTileColumns];  // past the last row, the last one again
    float factors[kTileColumns];
    for (int m = 0; m < kTileColumns; ++m) {
      const int64_t row = r + m < chunk.count ? r + m : chunk.count - 1;
      rows[m] = chunk.rows + row * a.document.stride;
      factors[m] = chunk.factors[row];
    }
    if (block == 0) screen_copy(rows, a.depth, stride, copy, screen.squares + r);
    screen_tile<VECS>(copy, stride, screen.packed + base * quads, screen.start + base, quads,
                      factors, rows[0] + 2 * kTileColumns * a.depth, screen.products + r * kLanes,
                      tops);
  }
  const float bound = screen_bound(screen.squares, chunk.factors, chunk.count);
  if (bound < 0.f) return false;
  float *best = group.best + base, *place = group.place + base;
  Vec floor[VECS];
  for (int v = 0; v < VECS; ++v) {
    Vec top = Vec::load(screen.tops + v * Vec::N);
    for (const float* other = screen.tops + v * Vec::N; other < tops; other += kLanes) {
      top = max(top, Vec::load(other));
    }
    const Vec slack = Vec::load(screen.slack + base + v * Vec::N) * Vec::all(bound);
    const Vec so_far = Vec::load(best + v * Vec::N) * Vec::load(screen.inverse + base + v * Vec::N);
    floor[v] = max(so_far, top - slack) - slack;
  }
  uint32_t* left = (uint32_t*)screen.left;
  const int64_t most = most_left(live < kBlockRows ? live : kBlockRows, chunk.count);
  const int64_t count =
      screen_left<VECS>(screen.products, screen.tops, chunk.count, floor, most, left);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = left[i] / kLanes, lane = left[i] % kLanes;
    const float product = chunk.factors[row] * dot(query + lane * a.query.stride,
                                                   chunk.rows + row * a.document.stride, a.depth);
    if (best[lane] != best[lane] || product <= best[lane]) continue;
    best[lane] = product;
    place[lane] = bits_float(uint32_t(chunk.place + row));
  }
  return count >= 0;
}

template <class T>
void screen_chunk(const MaxSimArgs& a, const QueryGroup& group, const Screen& screen,
                  const ScreenChunk& chunk) {
  int64_t block = 0;
  for (int64_t q = group.first; q < group.last; ++q) {
    const T* x = (const T*)a.query.texts[q];
    for (int64_t live = span_rows(a.query, q); live > 0; live -= kBlockRows, ++block) {
      const bool done =
          live > 2 * Vec::N ? screen_block<T, 3>(a, group, screen, block, live, x, chunk)
          : live > Vec::N   ? screen_block<T, 2>(a, group, screen, block, live, x, chunk)
                            : screen_block<T, 1>(a, group, screen, block, live, x, chunk);
      const int64_t step = chunk_rows(a);
      for (int64_t r = 0; r < chunk.count && !done; r += step) {
        const int64_t rows = chunk.count - r < step ? chunk.count - r : step;
        load_rows(chunk.rows + r * a.document.stride, a.document.stride, rows, a.depth, a.depth,
                  group.chunk);
        meet_block<Floats<float>>(a, group, block, live, group.chunk, a.depth, rows,
                                  chunk.place + r, chunk.factors + r);
      }
      x += kBlockRows * a.query.stride;
    }
  }
}

template <class Query>
void screen_pass(const MaxSimArgs& a, const QueryGroup& group, const Screen& screen,
                 int64_t document) {
  const int64_t step = screen_rows(a), all = span_rows(a.document, document);
  const auto* x = (const int8_t*)a.document.texts[document];
  const float* scale = a.scale + a.document.spans[2 * document];
  for (int64_t row = 0; row < all; row += step, x += step * a.document.stride) {
    const int64_t rows = all - row < step ? all - row : step;
    const float* factors = row_factors(a, x, rows, scale + row, group.factor);
    screen_chunk<typename Query::Element>(a, group, screen, {x, rows, row, factors});
  }
}
