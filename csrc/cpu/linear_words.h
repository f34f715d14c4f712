// A word is what a lane multiplies in one instruction: an fp32 value, or two adjacent bf16 values if the
// processor has an instruction for it. Included once per ISA (no include guard).

template <class T>
struct Floats {
  using Element = T;
  static constexpr int kPerWord = 1;
  static Vec load(const T* p) { return Vec::load(p); }
  static float word(const T* p) { return to_float(*p); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
struct Bf16Pairs {
  using Element = bf16;
  static constexpr int kPerWord = 2;
  static Vec load(const bf16* p) { return Vec::load((const float*)p); }
  static float word(const bf16* p) {
    return bits_float(uint32_t(p[0].bits) | uint32_t(p[1].bits) << 16);
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return dot_pairs(a, b, c); }
};
#endif
