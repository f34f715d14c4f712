// One SIMD register of fp32, per instruction set. Included once by each cpu/isa_*.cpp, inside
// that ISA's namespace and under its target pragma; hence no include guard.

#if EMBEDFUSE_ISA >= EMBEDFUSE_AVX512

struct Vec {
  static constexpr int N = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
  }
  static Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static Vec load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(f16* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0)); }
  void store(bf16* p) const {  // to nearest, ties to even; NaN stays NaN
    const __m512i u = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, half), 16);
    const __m512i bits = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), high,
                                              _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bits));
  }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  #if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
// c + a0 b0 + a1 b1 in each lane, where a and b hold two bf16 values per lane.
inline Vec dot_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v),
                           (__m512bh)_mm512_castps_si512(b.v))};
}
  #endif
// The larger or the smaller of the two; b if one is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// yes in the lanes where a > b, no elsewhere, NaN among them.
inline Vec where_greater(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), yes.v)};
}
// best = candidate and its label, where that is larger, or the first NaN.
inline void keep_larger(Vec& best, Vec& label, Vec candidate, Vec candidate_label) {
  const __mmask16 number = _mm512_cmp_ps_mask(best.v, best.v, _CMP_ORD_Q);
  const __mmask16 take = _mm512_mask_cmp_ps_mask(number, candidate.v, best.v, _CMP_NLE_UQ);
  best.v = _mm512_mask_mov_ps(best.v, take, candidate.v);
  label.v = _mm512_mask_mov_ps(label.v, take, candidate_label.v);
}
// 2^n for whole numbers -126 <= n <= 127; 0 for n = -127.
inline Vec pow2(Vec n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
// Transposes, first within groups of four registers, then among all sixteen.
inline void transpose(Vec rows[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 low01 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xee);
    rows[i].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[4 + i].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    rows[8 + i].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[12 + i].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
}
// The four sums a, b, c, d: the lanes are transposed and added in pairs.
inline void sum4(const Vec a[4], float* out) {
  const __m512 ab =
      _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 cd =
      _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512 abcd =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif EMBEDFUSE_ISA == EMBEDFUSE_AVX2

struct Vec {
  static constexpr int N = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  static Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static Vec load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(f16* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 0)); }
  void store(bf16* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, half), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i bits = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m128i low = _mm256_castsi256_si128(bits), top = _mm256_extracti128_si256(bits, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, top));
  }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec where_greater(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
inline void keep_larger(Vec& best, Vec& label, Vec candidate, Vec candidate_label) {
  const __m256 take = _mm256_and_ps(_mm256_cmp_ps(best.v, best.v, _CMP_ORD_Q),
                                    _mm256_cmp_ps(candidate.v, best.v, _CMP_NLE_UQ));
  best.v = _mm256_blendv_ps(best.v, candidate.v, take);
  label.v = _mm256_blendv_ps(label.v, candidate_label.v, take);
}
inline Vec pow2(Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}
inline void transpose(Vec rows[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    rows[4 + i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}
inline void sum4(const Vec a[4], float* out) {
  const __m256 ab = _mm256_hadd_ps(a[0].v, a[1].v);
  const __m256 cd = _mm256_hadd_ps(a[2].v, a[3].v);
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

#else  // any processor; the compiler vectorises what it can

struct Vec {
  static constexpr int N = 1;
  float v;
  static Vec zero() { return {0.f}; }
  static Vec all(float x) { return {x}; }
  template <class T>
  static Vec load(const T* p) {
    return {to_float(*p)};
  }
  template <class T>
  void store(T* p) const {
    from_float(v, p);
  }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec max(Vec a, Vec b) { return a.v > b.v ? a : b; }
inline Vec min(Vec a, Vec b) { return a.v < b.v ? a : b; }
inline Vec where_greater(Vec a, Vec b, Vec yes, Vec no) { return a.v > b.v ? yes : no; }
inline void keep_larger(Vec& best, Vec& label, Vec candidate, Vec candidate_label) {
  if (best.v != best.v || candidate.v <= best.v) return;
  best = candidate;
  label = candidate_label;
}
inline Vec pow2(Vec n) { return {bits_float(uint32_t(int32_t(n.v) + 127) << 23)}; }
inline void transpose(Vec[1]) {}
inline void sum4(const Vec a[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = a[i].v;
}

#endif

inline float sum(Vec a) {
  const Vec four[4] = {a, Vec::zero(), Vec::zero(), Vec::zero()};
  float sums[4];
  sum4(four, sums);
  return sums[0];
}

// e^x within 1 ulp of fp32: infinity from where it leaves the range, 0 below -87.7, where it would be subnormal.
// NaN stays NaN.
inline Vec exp(Vec x) {
  x = min(Vec::all(89.f), max(Vec::all(-88.f), x));
  // x = n ln2 + r with |r| <= ln2 / 2: adding 1.5 * 2^23 rounds x / ln2 to the whole number n, and
  // ln2 is subtracted in two parts, the first short enough that n times it is exact.
  const Vec n = fma(x, Vec::all(0x1.715476p+0f), Vec::all(0x1.8p+23f)) - Vec::all(0x1.8p+23f);
  Vec r = fma(n, Vec::all(-0x1.62e4p-1f), x);
  r = fma(n, Vec::all(-0x1.7f7d1cp-20f), r);
  // (e^r - 1 - r) / r^2, fitted to the least largest error of e^r (3e-9, relative).
  Vec p = Vec::all(0.00138145394f);
  p = fma(p, r, Vec::all(0.00836874545f));
  p = fma(p, r, Vec::all(0.041668389f));
  p = fma(p, r, Vec::all(0.166665211f));
  p = fma(p, r, Vec::all(0.49999994f));
  p = fma(p, r, Vec::all(1.f));
  p = fma(p, r, Vec::all(1.f));
  // n = 128, whose power is no number, while e^x still is one up to 88.72: half of it, doubled.
  const Vec last = Vec::all(127.f);
  return where_greater(n, last, p + p, p) * pow2(min(last, n));
}
