// The tile unit's instructions in plain C++, after Intel's reference: what amx.h has as assembly. Anything that the
// processor would refuse ends the process.

struct EmulatedTile {
  int rows, row_bytes;  // 0 unless configured
  alignas(64) uint8_t bytes[16][64];
};
inline thread_local EmulatedTile emulated_tiles[8];
inline thread_local bool tiles_configured = false;

inline void refuse(const char* what) {
  const char* const parts[] = {"emulated AMX: ", what, "\n"};
  for (const char* part : parts) {
    if (::write(2, part, __builtin_strlen(part)) < 0) break;
  }
  __builtin_abort();
}

inline void tile_configure(const void* config) {
  const uint8_t* c = (const uint8_t*)config;
  if (tiles_configured) refuse("configured twice without a release");
  if (c[0] != 1 || c[1] != 0) refuse("palette or start row");
  for (int i = 2; i < 64; ++i) {
    const bool beyond = i < 16 || (i >= 32 && i < 48) || i >= 56;  // reserved, and tiles 8 to 15
    if (beyond && c[i]) refuse("reserved bytes of the configuration");
  }
  for (int t = 0; t < 8; ++t) {
    const int row_bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
    if (row_bytes > 64 || rows > 16 || !row_bytes != !rows) refuse("shape of a tile");
    emulated_tiles[t] = EmulatedTile{rows, row_bytes, {}};
  }
  tiles_configured = true;
}

inline void tile_release() {
  for (EmulatedTile& tile : emulated_tiles) tile = EmulatedTile{};
  tiles_configured = false;
}

template <int T>
inline EmulatedTile& emulated_tile() {
  static_assert(T >= 0 && T < 8, "there are eight tiles");
  if (!tiles_configured || !emulated_tiles[T].rows) refuse("a tile that is not configured");
  return emulated_tiles[T];
}

template <int T>
inline void tile_zero() {
  EmulatedTile& tile = emulated_tile<T>();
  tile = EmulatedTile{tile.rows, tile.row_bytes, {}};
}

template <int T>
inline void tile_load(const void* rows, int64_t stride) {
  EmulatedTile& tile = emulated_tile<T>();
  tile_zero<T>();
  for (int r = 0; r < tile.rows; ++r) {
    __builtin_memcpy(tile.bytes[r], (const uint8_t*)rows + r * stride, tile.row_bytes);
  }
}

template <int T>
inline void tile_store(void* rows, int64_t stride) {
  const EmulatedTile& tile = emulated_tile<T>();
  for (int r = 0; r < tile.rows; ++r) {
    __builtin_memcpy((uint8_t*)rows + r * stride, tile.bytes[r], tile.row_bytes);
  }
}

inline void check_shapes(const EmulatedTile& c, const EmulatedTile& a, const EmulatedTile& b) {
  if (c.rows != a.rows || c.row_bytes != b.row_bytes || a.row_bytes != 4 * b.rows) {
    refuse("shapes that do not fit");
  }
  if (&c == &a || &c == &b || &a == &b) refuse("one tile twice");
}

// Inputs and results below the normal range count as 0.
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.f * x : x; }

// The two products of a pair are summed apart over k, then together, then added.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  EmulatedTile& c = emulated_tile<C>();
  const EmulatedTile &a = emulated_tile<A>(), &b = emulated_tile<B>();
  check_shapes(c, a, b);
  for (int m = 0; m < c.rows; ++m) {
    const bf16* of_a = (const bf16*)a.bytes[m];
    float sums[16][2] = {};
    for (int k = 0; k < b.rows; ++k) {
      const bf16* of_b = (const bf16*)b.bytes[k];
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        for (int i = 0; i < 2; ++i) {
          const float x = flushed(to_float(of_a[2 * k + i]));
          sums[n][i] = flushed(__builtin_fmaf(x, flushed(to_float(of_b[2 * n + i])), sums[n][i]));
        }
      }
    }
    float* of_c = (float*)c.bytes[m];
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      of_c[n] = flushed(flushed(of_c[n]) + flushed(sums[n][0] + sums[n][1]));
    }
  }
}

template <int C, int A, int B>
inline void tile_dot_bytes() {
  EmulatedTile& c = emulated_tile<C>();
  const EmulatedTile &a = emulated_tile<A>(), &b = emulated_tile<B>();
  check_shapes(c, a, b);
  for (int m = 0; m < c.rows; ++m) {
    uint32_t* of_c = (uint32_t*)c.bytes[m];
    for (int k = 0; k < b.rows; ++k) {
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        for (int i = 0; i < 4; ++i) {
          of_c[n] +=
              uint32_t(int32_t(a.bytes[m][4 * k + i]) * int32_t(int8_t(b.bytes[k][4 * n + i])));
        }
      }
    }
  }
}
