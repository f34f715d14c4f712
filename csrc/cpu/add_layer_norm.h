// out = LayerNorm(x + residual) weight + bias, one row after the other.
//
// Two passes for the statistics: the mean, then the deviations from it. Their squares give the variance, and
// their mean corrects the rounding of the first mean (corrected two-pass algorithm, Chan, Golub and LeVeque
// 1983), so that a large mean costs no precision. Each pass adds x and residual again: the row is in the L1 cache
// by then.
// Included once per ISA (no include guard).

template <class T>
void add_layer_norm_row(const AddLayerNormArgs& a, int64_t row) {
  const T* x = (const T*)a.x + row * a.x_stride;
  const T* residual = (const T*)a.residual + row * a.residual_stride;
  const T* weight = (const T*)a.weight;
  const T* bias = (const T*)a.bias;
  T* out = (T*)a.out + row * a.hidden;
  const int64_t n = a.hidden, whole = n - n % Vec::N;

  Vec sums = Vec::zero();
  float rest = 0.f;
  for (int64_t j = 0; j < whole; j += Vec::N) {
    sums = sums + (Vec::load(x + j) + Vec::load(residual + j));
  }
  for (int64_t j = whole; j < n; ++j) rest += to_float(x[j]) + to_float(residual[j]);
  const float mean = (sum(sums) + rest) / float(n);

  const Vec means = Vec::all(mean);
  Vec deviations = Vec::zero(), squares = Vec::zero();
  float deviation = 0.f, square = 0.f;
  for (int64_t j = 0; j < whole; j += Vec::N) {
    const Vec d = Vec::load(x + j) + Vec::load(residual + j) - means;
    deviations = deviations + d;
    squares = fma(d, d, squares);
  }
  for (int64_t j = whole; j < n; ++j) {
    const float d = to_float(x[j]) + to_float(residual[j]) - mean;
    deviation += d;
    square += d * d;
  }
  const float shift = (sum(deviations) + deviation) / float(n);
  float variance = (sum(squares) + square) / float(n) - shift * shift;
  if (variance < 0.f) variance = 0.f;  // by rounding; NaN stays NaN
  const float rstd = 1.f / __builtin_sqrtf(variance + a.eps);

  const Vec shifts = Vec::all(shift), rstds = Vec::all(rstd);
  for (int64_t j = 0; j < whole; j += Vec::N) {
    const Vec d = Vec::load(x + j) + Vec::load(residual + j) - means - shifts;
    const Vec b = bias ? Vec::load(bias + j) : Vec::zero();
    fma(d * rstds, Vec::load(weight + j), b).store(out + j);
  }
  for (int64_t j = whole; j < n; ++j) {
    const float d = to_float(x[j]) + to_float(residual[j]) - mean - shift;
    from_float(d * rstd * to_float(weight[j]) + (bias ? to_float(bias[j]) : 0.f), out + j);
  }
}

template <class T>
void add_layer_norm_rows(int64_t begin, int64_t end, void* context) {
  const AddLayerNormArgs& a = *(const AddLayerNormArgs*)context;
  for (int64_t row = begin; row < end; ++row) add_layer_norm_row<T>(a, row);
}

void add_layer_norm(const AddLayerNormArgs& a) {
  const int64_t grain = grain_of(4 * a.hidden);
  void* context = (void*)&a;
  if (a.dtype == kFloat32) {
    return parallel_for(0, a.rows, grain, add_layer_norm_rows<float>, context);
  }
  if (a.dtype == kFloat16) return parallel_for(0, a.rows, grain, add_layer_norm_rows<f16>, context);
  parallel_for(0, a.rows, grain, add_layer_norm_rows<bf16>, context);
}
