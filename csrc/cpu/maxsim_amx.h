// maxsim's products by the tile unit: 64 document rows at a time, in tiles of 16, with query rows as pack_rows and
// screen_query leave them, 16 to a tile. Like registers, the tiles of the result hold query rows side by side,
// so everything else is that of avx512_bf16, whose pragma this file is under.
//
// A step over 64 bytes of depth takes four products, of 4 document tiles with 1 of the queries or of 2 with 2: a
// product takes 16 cycles and its result 52, so four results hide the latency. Result tiles are 0 to 3.
// Tested by emulation only so far (tests/build/test_amx.py); none of this has been timed.
// Included once (no include guard).
#include "embedfuse/amx.h"

constexpr int64_t kTileRows = 16, kTileBytes = 64;
constexpr int64_t kPackedStride = kBlockRows * 4;  // bytes from word to word

// Document rows of bf16: `rows` of them, and where they end. A tile that would reach beyond a row, or beyond the
// last one, is loaded from a copy, zero there.
struct Bf16Rows {
  const bf16* data;
  int64_t stride, rows, depth;
  template <int C>
  void begin(int) const {
    tile_zero<C>();
  }
  template <int A>
  void load(int tile, int64_t step) const {
    const bf16* x = data + tile * kTileRows * stride + step * 32;
    const int64_t live = rows - tile * kTileRows, width = depth - step * 32;
    if (live < kTileRows || width < 32) return load_part<A>(x, live, width);
    for (int r = 0; r < kTileRows; ++r) __builtin_prefetch(x + (4 * kTileRows + r) * stride);
    tile_load<A>(x, stride * 2);
  }
  template <int A>
  void load_part(const bf16* x, int64_t live, int64_t width) const {
    alignas(64) bf16 copy[kTileRows * 32];
    const __mmask32 inside = width < 32 ? (1u << width) - 1 : ~0u;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const __m512i row = _mm512_maskz_loadu_epi16(r < live ? inside : 0, x + r * stride);
      _mm512_store_si512(copy + r * 32, row);
    }
    tile_load<A>(copy, kTileBytes);
  }
  template <int C, int A, int B>
  static void dot() {
    tile_dot_bf16<C, A, B>();
  }
};

// Rows of D + 128 as screen_copy leaves them, whole tiles.
struct ByteRows {
  const uint8_t* data;
  int64_t stride;
  const float* start;  // initial value of the sums, for each query row
  const int8_t* ahead;
  template <int C>
  void begin(int query_tile) const {
    tile_load<C>(start + query_tile * kTileRows, 0);
  }
  template <int A>
  void load(int tile, int64_t step) const {
    const int64_t at = tile * kTileRows * stride + step * kTileRows * kTileBytes;
    for (int r = 0; r < kTileRows; ++r) __builtin_prefetch(ahead + at + r * kTileBytes);
    tile_load<A>(data + tile * kTileRows * stride + step * kTileBytes, stride);
  }
  template <int C, int A, int B>
  static void dot() {
    tile_dot_bytes<C, A, B>();
  }
};

// Result tile C, of document tile C / VECS with query tile C % VECS. `pitch`: from row to row, in floats.
template <int C, int VECS>
inline void store_result(float* products, int64_t pitch) {
  tile_store<C>(products + C / VECS * kTileRows * pitch + C % VECS * kTileRows, pitch * 4);
}

// products[m] of 4 / VECS document tiles with VECS query tiles.
template <int VECS, class Rows>
inline void multiply_tiles(const Rows& rows, const float* packed, int64_t steps, float* products,
                           int64_t pitch) {
  rows.template begin<0>(0);
  rows.template begin<1>(1 % VECS);
  rows.template begin<2>(0);
  rows.template begin<3>(1 % VECS);
  for (int64_t step = 0; step < steps; ++step, packed += kTileRows * kBlockRows) {
    tile_load<7>(packed, kPackedStride);
    rows.template load<4>(0, step);
    Rows::template dot<0, 4, 7>();
    if constexpr (VECS == 1) {
      rows.template load<5>(1, step);
      Rows::template dot<1, 5, 7>();
      rows.template load<6>(2, step);
      Rows::template dot<2, 6, 7>();
      rows.template load<4>(3, step);
      Rows::template dot<3, 4, 7>();
    } else {
      tile_load<6>(packed + kTileRows, kPackedStride);
      Rows::template dot<1, 4, 6>();
      rows.template load<5>(1, step);
      Rows::template dot<2, 5, 7>();
      Rows::template dot<3, 5, 6>();
    }
  }
  store_result<0, VECS>(products, pitch);
  store_result<1, VECS>(products, pitch);
  store_result<2, VECS>(products, pitch);
  store_result<3, VECS>(products, pitch);
}

// Multiplies bf16 document rows, in place of Registers<Bf16Pairs>.
struct Bf16Tiles {
  using Element = bf16;
  static constexpr int64_t kRows = 64;
  static int64_t words(int64_t depth) { return (depth + 31) / 32 * kTileRows; }
  template <int VECS>
  static void multiply(const bf16* document, int64_t stride, int64_t rows, int64_t depth,
                       const float* packed, float* products) {
    const int64_t steps = (depth + 31) / 32;
    if constexpr (VECS > 1) {
      for (int64_t r = 0; r < kRows && r < rows; r += 32) {
        const Bf16Rows some{document + r * stride, stride, rows - r, depth};
        multiply_tiles<2>(some, packed, steps, products + r * kBlockRows, kBlockRows);
      }
    }
    if constexpr (VECS % 2) {
      const int64_t lane = (VECS - 1) * kTileRows;
      const Bf16Rows all{document, stride, rows, depth};
      multiply_tiles<1>(all, packed + lane, steps, products + lane, kBlockRows);
    }
  }
};

// Multiplies bytes, in place of VnniBytes.
struct ByteTiles {
  static constexpr int64_t kRows = 64, kQuads = kTileRows;
  template <int VECS>
  static void multiply(const uint8_t* chunk, int64_t stride, int64_t rows, const float* packed,
                       const float* start, int64_t quads, const float* factors, const int8_t* ahead,
                       float* products, float* tops) {
    constexpr int64_t kPitch = VECS * Vec::N;
    const int64_t steps = quads / kTileRows;
    if constexpr (VECS > 1) {
      for (int64_t r = 0; r < kRows && r < rows; r += 32) {
        const ByteRows some{chunk + r * stride, stride, start, ahead + r * stride};
        multiply_tiles<2>(some, packed, steps, products + r * kPitch, kPitch);
      }
    }
    if constexpr (VECS % 2) {
      const int64_t lane = (VECS - 1) * kTileRows;
      const ByteRows all{chunk, stride, start + lane, ahead};
      multiply_tiles<1>(all, packed + lane, steps, products + lane, kPitch);
    }
    for (int64_t r = 0; r < kRows && r < rows; r += kTileColumns, tops += kPitch) {
      __m512i sums[kTileColumns][VECS];
      for (int m = 0; m < kTileColumns; ++m) {
        for (int v = 0; v < VECS; ++v) {
          sums[m][v] = _mm512_loadu_si512(products + (r + m) * kPitch + v * Vec::N);
        }
      }
      screen_products<VECS>(sums, factors + r, products + r * kPitch, tops);
    }
  }
};

// A version that configures the tiles only while it runs: the threads may belong to another library's pool.
template <class Version>
struct WithTiles : Version {
  Tiles tiles;
  using Version::Version;
};

struct TileProducts {
  using Bf16 = WithTiles<Direct<Bf16Pairs, Bf16Pairs, Bf16Tiles>>;
  template <class Query>
  using Int8 = WithTiles<Screened<Query, ByteTiles>>;
};

constexpr CpuKernels with_tiles(CpuKernels kernels) {
  kernels.maxsim_scratch = avx512_bf16::maxsim_scratch<TileProducts>;
  kernels.maxsim = avx512_bf16::maxsim<TileProducts>;
  return kernels;
}
constexpr CpuKernels kKernels = with_tiles(avx512_bf16::kKernels);
