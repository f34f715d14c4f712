// sums = round(words[id] + types[type]), places = positions[position], one row per token.
//
// Rounded to the element type between the two additions, as the model does; the second is part of the norm that
// follows. Included once per ISA (no include guard).

template <class T>
void embed_tokens(int64_t begin, int64_t end, void* context) {
  const EmbedArgs& a = *(const EmbedArgs*)context;
  const int64_t n = a.hidden, whole = n - n % Vec::N;
  for (int64_t token = begin; token < end; ++token) {
    const T* word = (const T*)a.words + a.ids[token] * n;
    const T* type = (const T*)a.types + (a.type_ids ? a.type_ids[token] * n : 0);
    T* out = (T*)a.sums + token * n;
    for (int64_t j = 0; j < whole; j += Vec::N) {
      (Vec::load(word + j) + Vec::load(type + j)).store(out + j);
    }
    for (int64_t j = whole; j < n; ++j) from_float(to_float(word[j]) + to_float(type[j]), out + j);
    const T* place = (const T*)a.positions + a.position_ids[token] * n;
    __builtin_memcpy((T*)a.places + token * n, place, n * sizeof(T));
  }
}

void embed(const EmbedArgs& a) {
  const int64_t grain = grain_of(4 * a.hidden);
  void* context = (void*)&a;
  if (a.dtype == kFloat32) return parallel_for(0, a.tokens, grain, embed_tokens<float>, context);
  if (a.dtype == kFloat16) return parallel_for(0, a.tokens, grain, embed_tokens<f16>, context);
  parallel_for(0, a.tokens, grain, embed_tokens<bf16>, context);
}
