// out = gate / (1 + exp(-gate)) up, in fp32.
// Included once per ISA (no include guard).

inline Vec silu(Vec gate) { return gate / (Vec::all(1.f) + exp(Vec::zero() - gate)); }

template <class T>
void silu_mul_rows(int64_t begin, int64_t end, void* context) {
  const SiluMulArgs& a = *(const SiluMulArgs*)context;
  const int64_t whole = a.columns - a.columns % Vec::N;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = (const T*)a.gate + row * a.gate_stride;
    const T* up = (const T*)a.up + row * a.up_stride;
    T* out = (T*)a.out + row * a.columns;
    for (int64_t j = 0; j < whole; j += Vec::N) {
      (silu(Vec::load(gate + j)) * Vec::load(up + j)).store(out + j);
    }
    // The rest one by one, each in all lanes of a register.
    for (int64_t j = whole; j < a.columns; ++j) {
      float product[Vec::N];
      (silu(Vec::all(to_float(gate[j]))) * Vec::all(to_float(up[j]))).store(product);
      from_float(product[0], out + j);
    }
  }
}

void silu_mul(const SiluMulArgs& a) {
  const int64_t grain = grain_of(8 * a.columns);
  void* context = (void*)&a;
  if (a.dtype == kFloat32) return parallel_for(0, a.rows, grain, silu_mul_rows<float>, context);
  if (a.dtype == kFloat16) return parallel_for(0, a.rows, grain, silu_mul_rows<f16>, context);
  parallel_for(0, a.rows, grain, silu_mul_rows<bf16>, context);
}
