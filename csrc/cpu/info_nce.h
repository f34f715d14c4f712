// Per row of a tile of scores c, over the columns j that count, with z = scale c + bias:
//   update:   maximum m, sum of e^(z - m), sum of z  |  sigmoid: -, sum of softplus(z), sum of sigmoid(z)
//   gradient: c_j = w g_statistic + g_total,  w = e^(z - statistic)  |  sigmoid: w = sigmoid(z);  target: g_target
//             | into a sum: sum_j += a_i b_j w'_j, c_j = w'_j c_j, with w' that gradient
// where c is the stored value times a_i b_j (x_factor, y_factor), if these are given.
//
// A row is masked and scaled once into a buffer in the L1 cache, where columns that do not count are -inf. Each
// row is computed by one thread, so no sum depends on the number of threads. Included once per ISA (no include
// guard).

constexpr float kLowest = -3.402823466e+38f;

struct InfoNceJob {
  const InfoNceTile& tile;
  const InfoNceState* state;        // one of
  const InfoNceGradient* gradient;  // the two
};

// The first n of a register's elements; zero beyond them.
inline Vec load_first(const float* p, int64_t n) {
  if (n >= Vec::N) return Vec::load(p);
  float part[Vec::N] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return Vec::load(part);
}

inline void store_first(Vec v, float* p, int64_t n) {
  if (n >= Vec::N) return v.store(p);
  float part[Vec::N];
  v.store(part);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

inline Vec load_scores(const InfoNceTile& t, int64_t row, int64_t j) {
  const int64_t n = t.columns - j;
  const Vec c = load_first(t.scores + row * t.columns + j, n);
  return t.y_factor ? c * Vec::all(t.x_factor[row]) * load_first(t.y_factor + j, n) : c;
}

// logits[j] = scale c_j + bias if j counts, else -inf, which also pads the last register. Nothing else decides
// which columns count.
inline void fill_logits(const InfoNceTile& t, int64_t row, float* logits) {
  const Vec none = Vec::all(-__builtin_inff());
  for (int64_t j = 0; j < t.columns; j += Vec::N) {
    const int64_t n = t.columns - j;
    const Vec c = load_scores(t, row, j);
    Vec z = fma(c, Vec::all(t.scale), Vec::all(t.bias));
    if (t.limit) z = where_greater(c, Vec::all(t.limit[row]), none, z);
    if (t.guide) {
      const Vec g = load_first(t.guide + row * t.columns + j, n);
      z = where_greater(g, Vec::all(t.guide_limit[row]), none, z);
    }
    if (t.x_keys) {
      float equal[Vec::N] = {};
      for (int64_t i = 0; i < Vec::N && i < n; ++i) equal[i] = t.y_keys[j + i] == t.x_keys[row];
      z = where_greater(Vec::load(equal), Vec::zero(), none, z);
    }
    z.store(logits + j);
    for (int64_t i = n; i < Vec::N; ++i) logits[j + i] = -__builtin_inff();
  }
  const int64_t target = t.target ? t.target[row] - t.first : -1;
  if (target >= 0 && target < t.columns) logits[target] = -__builtin_inff();
}

// log(1 + u) for 0 <= u <= 1: 2 artanh(u / (2 + u)) as a series in the square, of which 8 terms reach fp32.
inline Vec log1p(Vec u) {
  const Vec t = u / (u + Vec::all(2.f)), s = t * t;
  Vec p = Vec::all(2.f / 15);
  for (int k = 13; k > 0; k -= 2) p = fma(p, s, Vec::all(2.f / k));
  return p * t;
}

// sigmoid(z) and softplus(z); 0 for -inf.
inline Vec sigmoid(Vec z, Vec* softplus) {
  const Vec one = Vec::all(1.f);
  const Vec e = exp(Vec::zero() - max(Vec::zero() - z, z));
  if (softplus) *softplus = max(z, Vec::zero()) + log1p(e);
  return where_greater(Vec::zero(), z, e, one) / (one + e);
}

inline float largest(const float* x, int64_t n) {
  Vec top = Vec::all(-__builtin_inff());
  for (int64_t j = 0; j < n; j += Vec::N) top = max(Vec::load(x + j), top);
  float lanes[Vec::N];
  top.store(lanes);
  float m = lanes[0];
  for (int i = 1; i < Vec::N; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

inline float exp(float x) {
  float lanes[Vec::N];
  exp(Vec::all(x)).store(lanes);
  return lanes[0];
}

// A row without columns has the maximum or statistic -inf, which must not be subtracted from a logit.
inline float finite_base(float x) { return x == -__builtin_inff() ? 0.f : x; }

inline void update_row(const InfoNceTile& t, const InfoNceState& s, int64_t row, float* logits) {
  const Vec lowest = Vec::all(kLowest);
  fill_logits(t, row, logits);
  const float before = s.maximum[row];
  float now = before, base = 0.f;
  if (!t.sigmoid) {
    now = largest(logits, t.columns);
    now = now > before ? now : before;
    base = finite_base(now);
  }
  Vec sums = Vec::zero(), total = Vec::zero(), count = Vec::zero();
  for (int64_t j = 0; j < t.columns; j += Vec::N) {
    const Vec z = Vec::load(logits + j);
    Vec weight;
    if (t.sigmoid) {
      Vec softplus;
      weight = sigmoid(z, &softplus);
      sums = sums + softplus;
      total = total + weight;
    } else {
      weight = exp(z - Vec::all(base));
      sums = sums + weight;
      total = total + where_greater(lowest, z, Vec::zero(), z);
    }
    count = count + where_greater(lowest, z, Vec::zero(), Vec::all(1.f));
    if (s.factor) store_first(weight, t.scores + row * t.columns + j, t.columns - j);
  }
  // Without columns so far the sum is 0, and there is no maximum to rescale from.
  const float factor = t.sigmoid ? 1.f : before == -__builtin_inff() ? 0.f : exp(before - base);
  s.maximum[row] = now;
  s.sum[row] = s.sum[row] * factor + sum(sums);
  s.total[row] += sum(total);
  s.count[row] += int64_t(sum(count));
  if (s.factor) s.factor[row] = factor;
}

// out = G; it may be `logits`.
inline void weigh_row(const InfoNceTile& t, const InfoNceGradient& g, int64_t row,
                      const float* logits, float* out) {
  const Vec base = Vec::all(finite_base(g.statistic[row]));
  const Vec scale = Vec::all(g.g_statistic[row]), offset = Vec::all(g.g_total[row]);
  for (int64_t j = 0; j < t.columns; j += Vec::N) {
    const Vec z = Vec::load(logits + j);
    // A weight is at most 1; with large logits the rounding of the statistic could exceed that.
    const Vec weight = t.sigmoid ? sigmoid(z, nullptr) : exp(min(Vec::zero(), z - base));
    const Vec grad = fma(weight, scale, offset);
    store_first(where_greater(Vec::all(kLowest), z, Vec::zero(), grad), out + j, t.columns - j);
  }
  const int64_t target = t.target ? t.target[row] - t.first : -1;
  if (target >= 0 && target < t.columns) out[target] = g.g_target[row];
}

inline void gradient_row(const InfoNceTile& t, const InfoNceGradient& g, int64_t row,
                         float* logits) {
  fill_logits(t, row, logits);
  float* out = t.scores + row * t.columns;
  if (!g.sum) return weigh_row(t, g, row, logits, out);
  weigh_row(t, g, row, logits, logits);
  float* sums = g.sum + row * t.columns;
  for (int64_t j = 0; j < t.columns; j += Vec::N) {
    const int64_t n = t.columns - j;
    const Vec grad = Vec::load(logits + j);
    const Vec of_stored =
        t.y_factor ? grad * Vec::all(t.x_factor[row]) * load_first(t.y_factor + j, n) : grad;
    store_first(load_first(sums + j, n) + of_stored, sums + j, n);
    store_first(grad * load_scores(t, row, j), out + j, n);
  }
}

inline void info_nce_rows(int64_t begin, int64_t end, void* context) {
  const InfoNceJob& job = *(const InfoNceJob*)context;
  alignas(64) float logits[kInfoNceColumns + Vec::N];
  for (int64_t row = begin; row < end; ++row) {
    if (job.state) update_row(job.tile, *job.state, row, logits);
    if (job.gradient) gradient_row(job.tile, *job.gradient, row, logits);
  }
}

inline void info_nce_all(InfoNceJob job) {
  const int64_t grain = grain_of(8 * job.tile.columns);
  parallel_for(0, job.tile.rows, grain, info_nce_rows, &job);
}

void info_nce_update(const InfoNceTile& tile, const InfoNceState& state) {
  info_nce_all({tile, &state, nullptr});
}

void info_nce_gradient(const InfoNceTile& tile, const InfoNceGradient& gradient) {
  info_nce_all({tile, nullptr, &gradient});
}
