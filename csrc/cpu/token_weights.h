// weights_t = relu(h_t . weight + bias): the hidden states are read once, four rows at a time.
// Included once per ISA (no include guard).

template <class T>
void token_weights_rows(int64_t begin, int64_t end, void* context) {
  const TokenWeightsArgs& a = *(const TokenWeightsArgs*)context;
  const T* weight = (const T*)a.weight;
  const float bias = a.bias ? to_float(*(const T*)a.bias) : 0.f;
  for (int64_t t = begin; t < end; t += 4) {
    const int rows = end - t < 4 ? int(end - t) : 4;
    const T* x[4];  // past the last row, the last one again
    Vec acc[4];
    for (int r = 0; r < 4; ++r) {
      x[r] = (const T*)a.hidden_states + (t + (r < rows ? r : rows - 1)) * a.row_stride;
      acc[r] = Vec::zero();
    }
    int64_t k = 0;
    for (; k + Vec::N <= a.hidden; k += Vec::N) {
      const Vec w = Vec::load(weight + k);
      for (int r = 0; r < 4; ++r) {
        // Eight rows ahead, to L2: the processor's own prefetcher starts anew at each row.
        __builtin_prefetch(x[r] + 8 * a.row_stride + k, 0, 2);
        acc[r] = fma(Vec::load(x[r] + k), w, acc[r]);
      }
    }
    float dot[4];
    sum4(acc, dot);
    for (int r = 0; r < rows; ++r) {
      for (int64_t c = k; c < a.hidden; ++c) dot[r] += to_float(x[r][c]) * to_float(weight[c]);
      dot[r] += bias;
      // Written so that NaN stays NaN.
      a.weights[t + r] = dot[r] <= 0.f ? 0.f : dot[r];
    }
  }
}

void token_weights(const TokenWeightsArgs& a) {
  const int64_t grain = grain_of(a.hidden);
  void* context = (void*)&a;
  if (a.dtype == kFloat32) {
    return parallel_for(0, a.tokens, grain, token_weights_rows<float>, context);
  }
  if (a.dtype == kFloat16) {
    return parallel_for(0, a.tokens, grain, token_weights_rows<f16>, context);
  }
  parallel_for(0, a.tokens, grain, token_weights_rows<bf16>, context);
}
