// out_r = sum over the entries k of segment r with i_k >= 0 of w_k x_{i_k}
//
// A row of the result stays in the L1 cache while one thread adds its entries in order, so the result does not
// depend on the number of threads. Included once per ISA (no include guard).

template <class T>
void sum_segments(int64_t begin, int64_t end, void* context) {
  const SegmentSumArgs& a = *(const SegmentSumArgs*)context;
  for (int64_t row = begin; row < end; ++row) {
    float* out = a.out + row * a.depth;
    for (int64_t j = 0; j < a.depth; ++j) out[j] = 0.f;
    for (int64_t k = a.indptr[row]; k < a.indptr[row + 1]; ++k) {
      if (a.index[k] < 0) continue;
      const T* x = (const T*)a.x + a.index[k] * a.stride;
      const float w = a.weights[k];
      int64_t j = 0;
      for (; j + Vec::N <= a.depth; j += Vec::N) {
        fma(Vec::all(w), Vec::load(x + j), Vec::load(out + j)).store(out + j);
      }
      for (; j < a.depth; ++j) out[j] += w * to_float(x[j]);
    }
  }
}

void segment_sum(const SegmentSumArgs& a) {
  const int64_t per_row = a.indptr[a.rows] / (a.rows + 1) + 1;
  const int64_t grain = grain_of(per_row * a.depth);
  void* context = (void*)&a;
  if (a.dtype == kFloat32) return parallel_for(0, a.rows, grain, sum_segments<float>, context);
  if (a.dtype == kFloat16) return parallel_for(0, a.rows, grain, sum_segments<f16>, context);
  parallel_for(0, a.rows, grain, sum_segments<bf16>, context);
}
