// Element types in memory, and their codes in Python (native.py: DTYPES).
#pragma once
#include <cstdint>
#include <cstring>

namespace embedfuse {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // A product with 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  const uint32_t u = float_bits(x);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  // Round to nearest, ties to even.
  out->bits = nan ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(float x, f16* out) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = u >> 16 & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 aligns the subnormal's bits
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

}  // namespace embedfuse
