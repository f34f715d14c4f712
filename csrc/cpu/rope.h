// (x_d, x_{d + half}) = (x_d cos_d - x_{d + half} sin_d, x_{d + half} cos_d + x_d sin_d), in place.
//
// A token's cos and sin are used for all its heads while they are in the L1 cache. Computes in fp32.
// Included once per ISA (no include guard).

template <class T>
void rope_head(T* x, const T* cos, const T* sin, int64_t half) {
  const int64_t whole = half - half % Vec::N;
  T* y = x + half;
  for (int64_t d = 0; d < whole; d += Vec::N) {
    const Vec a = Vec::load(x + d), b = Vec::load(y + d);
    const Vec c = Vec::load(cos + d), s = Vec::load(sin + d);
    (a * c - b * s).store(x + d);
    fma(a, s, b * c).store(y + d);
  }
  for (int64_t d = whole; d < half; ++d) {
    const float a = to_float(x[d]), b = to_float(y[d]);
    const float c = to_float(cos[d]), s = to_float(sin[d]);
    from_float(a * c - b * s, x + d);
    from_float(b * c + a * s, y + d);
  }
}

template <class T>
void rope_tokens(int64_t begin, int64_t end, void* context) {
  const RopeArgs& a = *(const RopeArgs*)context;
  for (int64_t token = begin; token < end; ++token) {
    const T* cos = (const T*)a.cos + token * a.cos_stride;
    const T* sin = (const T*)a.sin + token * a.sin_stride;
    T* x = (T*)a.x.data + token * a.x.token_stride;
    for (int64_t head = 0; head < a.heads; ++head) {
      rope_head(x + head * a.x.head_stride, cos, sin, a.head_dim / 2);
    }
  }
}

void rope(const RopeArgs& a) {
  const int64_t grain = grain_of(4 * a.heads * a.head_dim);
  void* context = (void*)&a;
  if (a.dtype == kFloat32) return parallel_for(0, a.tokens, grain, rope_tokens<float>, context);
  if (a.dtype == kFloat16) return parallel_for(0, a.tokens, grain, rope_tokens<f16>, context);
  parallel_for(0, a.tokens, grain, rope_tokens<bf16>, context);
}
