// The tile unit (AMX): eight tiles of 16 rows by 64 bytes. Included by cpu/maxsim_amx.h inside its namespace; hence
// no include guard.
//
// Not the compiler's intrinsics: g++'s only take registers as literals, and do not declare that a load reads memory.

#if defined(EMBEDFUSE_EMULATE_AMX)  // the tests' instructions, for processors without them
  #include "amx_emulated.h"
#else
inline void tile_configure(const void* config) {
  asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
}
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Row r begins `stride` r bytes after the first.
template <int T>
inline void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(T) : "memory");
}
// C[m][n] += sum over k of A[m][k] B[k][n], where each step of k is a pair of bf16 values,
template <int C, int A, int B>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// or four bytes, unsigned in A and signed in B.
template <int C, int A, int B>
inline void tile_dot_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

// Configures all tiles of the calling thread at full size, for the lifetime of this object.
struct Tiles {
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64, "as the processor reads it");
    tile_configure(&config);
  }
  ~Tiles() { tile_release(); }
  Tiles(const Tiles&) = delete;
};
