// Products of int8 document rows with query rows rounded to int8, for maxsim_screen.h. The instructions take signed
// by unsigned bytes: a document's become D + 128, and sums begin at -128 sum(Q).
// Included once per ISA (no include guard).

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
      // |-128| is not a signed byte and becomes 127; screen_bound allows for that.
      const __m512i size = _mm512_abs_epi8(x);
      sum = _mm512_dpbusd_epi32(sum, size, _mm512_min_epu8(size, _mm512_set1_epi8(127)));
    }
    sums[m].v = _mm512_cvtepi32_ps(sum);
  }
  for (int m = 0; m < kTileColumns; m += 4) sum4(sums + m, squares + m);
}

// products[m] = factors[m] sums[m] over VECS registers of query rows, and the largest of each in `tops`.
// Without the pragmas GCC unrolls too late to keep the sums in registers.
template <int VECS>
inline void screen_products(const __m512i (&sums)[kTileColumns][VECS], const float* factors,
                            float* products, float* tops) {
  Vec top[VECS];
#pragma GCC unroll 8
  for (int m = 0; m < kTileColumns; ++m) {
    const Vec factor = Vec::all(factors[m]);
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) {
      const Vec product = Vec{_mm512_cvtepi32_ps(sums[m][v])} * factor;
      product.store(products + (m * VECS + v) * Vec::N);
      top[v] = m ? max(top[v], product) : product;
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < VECS; ++v) top[v].store(tops + v * Vec::N);
}

// Multiplies bytes in registers (VNNI).
struct VnniBytes {
  static constexpr int64_t kRows = kTileColumns;  // of a document, at a time
  static constexpr int64_t kQuads = 1;            // packed queries have a multiple of it
  // The first `rows` of kRows chunk rows, to `products` and `tops`. Prefetches from `ahead`.
  template <int VECS>
  static void multiply(const uint8_t* chunk, int64_t stride, int64_t /*rows*/, const float* packed,
                       const float* start, int64_t quads, const float* factors, const int8_t* ahead,
                       float* products, float* tops) {
    __m512i acc[kTileColumns][VECS];
#pragma GCC unroll 8
    for (int m = 0; m < kTileColumns; ++m) {
#pragma GCC unroll 3
      for (int v = 0; v < VECS; ++v) acc[m][v] = _mm512_loadu_si512(start + v * Vec::N);
    }
    for (int64_t u = 0; u < quads; ++u) {
      __m512i x[VECS];
#pragma GCC unroll 3
      for (int v = 0; v < VECS; ++v) {
        x[v] = _mm512_loadu_si512(packed + u * kBlockRows + v * Vec::N);
      }
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
    screen_products<VECS>(acc, factors, products, tops);
  }
};
