// What the CPU kernels share: conversions and an exponential that compilers vectorise. Included inside namespace
// CPD_ISA, so that no function compiled for one instruction set can be linked into another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace cpd {
namespace CPD_ISA {
namespace {

struct half_t {
  uint16_t bits;
};
struct bfloat_t {
  uint16_t bits;
};

inline float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(bfloat_t x) {
  return as_float(uint32_t(x.bits) << 16);
}
inline float to_float(half_t x) {
  uint32_t u = uint32_t(x.bits & 0x7fff) << 13;
  u = (x.bits & 0x7c00) == 0x7c00 ? (u | 0x7f800000) : as_bits(as_float(u) * 0x1p112f);  // exact, subnormals included
  return as_float(u | (uint32_t(x.bits & 0x8000) << 16));
}

inline void from_float(float f, bfloat_t* out) {
  const uint32_t u = as_bits(f);
  out->bits = uint16_t(f != f ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float f, half_t* out) {
  const uint32_t u = as_bits(f), sign = (u >> 16) & 0x8000, mag = u & 0x7fffffff;
  uint32_t h;
  if (mag > 0x7f800000) {
    h = 0x7e00;  // NaN
  } else if (mag >= 0x47800000) {
    h = 0x7c00;  // beyond the range: infinity
  } else if (mag < 0x38800000) {
    h = as_bits(as_float(mag) + 0.5f) - as_bits(0.5f);  // subnormal: the adder rounds at 2^-24
  } else {
    h = (mag - 0x38000000 + 0xfff + ((mag >> 13) & 1)) >> 13;  // round to nearest even; carries into infinity
  }
  out->bits = uint16_t(h | sign);
}

// n values as the type that is computed in: the tensor itself, or a converted copy in buffer.
inline const float* load(const float* x, float*, int64_t) {
  return x;
}
inline const double* load(const double* x, double*, int64_t) {
  return x;
}
inline const float* load(const bfloat_t* x, float* buffer, int64_t n) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}
inline const float* load(const half_t* x, float* buffer, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
#endif
  for (; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}

inline void store(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
inline void store(double* to, const double* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
inline void store(bfloat_t* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(from[i], to + i);
}
inline void store(half_t* to, const float* from, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < n; ++i) from_float(from[i], to + i);
}

// exp(x) for x <= 0 (NaN stays NaN), relative error about 1e-7; 0 below -88, where fp32 becomes subnormal.
// x = n ln 2 + r; 2^n by exponent bits, which are all zero for the smallest n: no branch that could keep loops from
// being vectorised well. exp(r) = 1 + r + r^2 q(r), q fitted on |r| <= ln(2)/2.
inline float exp_neg(float x) {
  const float clamped = -88.0f > x ? -88.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold n
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float q = 0.0013933688f;
  q = q * r + 0.008363205f;
  q = q * r + 0.041666463f;
  q = q * r + 0.16666576f;
  q = q * r + 0.5f;
  const float e = q * (r * r) + r + 1.0f;
  return e * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}
inline double exp_neg(double x) {
  return std::exp(x);
}

// log(x) for normal x > 0 (NaN stays NaN), absolute error 1e-12: x = 2^e m, m within sqrt(2) of 1, and
// log m = 2 atanh((m - 1) / (m + 1)) by its series.
inline double log_positive(double x) {
  uint64_t u;
  std::memcpy(&u, &x, 8);
  const uint64_t exponent = (u >> 52) | 0x4330000000000000u;  // 2^52 + biased exponent, as a double's bits
  const uint64_t mantissa = (u & 0x000fffffffffffffu) | 0x3ff0000000000000u;
  double e, m;
  std::memcpy(&e, &exponent, 8);
  std::memcpy(&m, &mantissa, 8);
  const bool high = m > 1.4142135623730951;
  m = high ? m * 0.5 : m;
  e = e - (4503599627370496.0 + 1023.0) + (high ? 1.0 : 0.0);
  const double f = (m - 1.0) / (m + 1.0), g = f * f;
  double p = 1.0 / 15;
  p = p * g + 1.0 / 13;
  p = p * g + 1.0 / 11;
  p = p * g + 1.0 / 9;
  p = p * g + 1.0 / 7;
  p = p * g + 1.0 / 5;
  p = p * g + 1.0 / 3;
  return e * 0.6931471805599453 + 2.0 * (f + f * g * p) + x * 0.0;  // the last term carries NaN
}

}  // namespace
}  // namespace CPD_ISA
}  // namespace cpd

// The body of a function of `args`, by the type of their tensors.
#define CPD_FOR_DTYPE(function)        \
  switch (args.dtype) {                \
    case Dtype::kF32:                  \
      return function<float>(args);    \
    case Dtype::kF64:                  \
      return function<double>(args);   \
    case Dtype::kF16:                  \
      return function<half_t>(args);   \
    case Dtype::kBF16:                 \
      return function<bfloat_t>(args); \
  }
