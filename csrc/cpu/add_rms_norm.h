// normed = round(s rstd) weight,  rstd = 1 / sqrt(mean(s^2) + eps),  s = round(x + residual), row by row.
//
// round: to the element type, as the model does between its steps. Statistics are fp32. The row is in the L1 cache
// after the first pass, which also writes s.
// Included once per ISA (no include guard).

template <class T>
void add_rms_norm_row(const T* x, const T* residual, const T* weight, int64_t n, float eps,
                      T* normed, T* summed) {
  const int64_t whole = n - n % Vec::N;
  Vec squares = Vec::zero();
  float square = 0.f;
  for (int64_t j = 0; j < whole; j += Vec::N) {
    Vec s = Vec::load(x + j);
    if (residual) {
      (s + Vec::load(residual + j)).store(summed + j);
      s = Vec::load(summed + j);
    }
    squares = fma(s, s, squares);
  }
  for (int64_t j = whole; j < n; ++j) {
    float s = to_float(x[j]);
    if (residual) {
      from_float(s + to_float(residual[j]), summed + j);
      s = to_float(summed[j]);
    }
    square += s * s;
  }
  const float rstd = 1.f / __builtin_sqrtf((sum(squares) + square) / float(n) + eps);

  const T* s = residual ? summed : x;
  const Vec rstds = Vec::all(rstd);
  for (int64_t j = 0; j < whole; j += Vec::N) {
    (Vec::load(s + j) * rstds).store(normed + j);
    (Vec::load(normed + j) * Vec::load(weight + j)).store(normed + j);
  }
  for (int64_t j = whole; j < n; ++j) {
    from_float(to_float(s[j]) * rstd, normed + j);
    from_float(to_float(normed[j]) * to_float(weight[j]), normed + j);
  }
}

template <class T>
void add_rms_norm_tokens(int64_t begin, int64_t end, void* context) {
  const AddRmsNormArgs& a = *(const AddRmsNormArgs*)context;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < a.heads; ++head) {
      const int64_t row = (token * a.heads + head) * a.hidden;
      const T* x = (const T*)a.x.data + token * a.x.token_stride + head * a.x.head_stride;
      const T* residual = nullptr;
      if (a.residual.data) {
        residual = (const T*)a.residual.data + token * a.residual.token_stride +
                   head * a.residual.head_stride;
      }
      add_rms_norm_row(x, residual, (const T*)a.weight, a.hidden, a.eps, (T*)a.normed + row,
                       residual ? (T*)a.summed + row : nullptr);
    }
  }
}

void add_rms_norm(const AddRmsNormArgs& a) {
  const int64_t grain = grain_of(4 * a.heads * a.hidden);
  void* context = (void*)&a;
  if (a.dtype == kFloat32) {
    return parallel_for(0, a.tokens, grain, add_rms_norm_tokens<float>, context);
  }
  if (a.dtype == kFloat16) {
    return parallel_for(0, a.tokens, grain, add_rms_norm_tokens<f16>, context);
  }
  parallel_for(0, a.tokens, grain, add_rms_norm_tokens<bf16>, context);
}
