// Philox4x32-10, many counters at a time: the 128 bits of a counter are the signs of 128 elements.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cpd {
namespace CPD_ISA {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int64_t kBlock = 128;  // signs a counter

struct Counter {
  uint32_t key0, key1, tensor, probe;
};

inline void philox_one(uint32_t block, const Counter& c, uint32_t* out) {
  uint32_t c0 = block, c1 = c.tensor, c2 = c.probe, c3 = 0, k0 = c.key0, k1 = c.key1;
  for (int r = 0; r < 10; ++r) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// A state word in the low half of each 64-bit lane: the multiplier takes low halves and leaves 64 bits, and what is
// left in the upper halves never comes down again.
#if defined(__AVX512F__)
constexpr int64_t kPhiloxLanes = 8;
using Lanes = __m512i;
inline Lanes all(uint32_t x) {
  return _mm512_set1_epi64(x);
}
inline Lanes counting(uint32_t first) {
  return _mm512_add_epi64(all(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
inline Lanes multiply(Lanes x, Lanes y) {
  return _mm512_mul_epu32(x, y);
}
inline Lanes high(Lanes x) {
  return _mm512_srli_epi64(x, 32);
}
inline Lanes exclusive(Lanes x, Lanes y, Lanes z) {
  return _mm512_ternarylogic_epi64(x, y, z, 0x96);
}
inline Lanes pack(Lanes low, Lanes up) {
  return _mm512_mask_blend_epi32(0xaaaa, low, _mm512_slli_epi64(up, 32));
}
inline void store_lanes(uint64_t* out, Lanes x) {
  _mm512_storeu_si512(out, x);
}
#elif defined(__AVX2__)
constexpr int64_t kPhiloxLanes = 4;
using Lanes = __m256i;
inline Lanes all(uint32_t x) {
  return _mm256_set1_epi64x(x);
}
inline Lanes counting(uint32_t first) {
  return _mm256_add_epi64(all(first), _mm256_set_epi64x(3, 2, 1, 0));
}
inline Lanes multiply(Lanes x, Lanes y) {
  return _mm256_mul_epu32(x, y);
}
inline Lanes high(Lanes x) {
  return _mm256_srli_epi64(x, 32);
}
inline Lanes exclusive(Lanes x, Lanes y, Lanes z) {
  return _mm256_xor_si256(_mm256_xor_si256(x, y), z);
}
inline Lanes pack(Lanes low, Lanes up) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(up, 32), 0xaa);
}
inline void store_lanes(uint64_t* out, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x);
}
#else
constexpr int64_t kPhiloxLanes = 1;
#endif

// The words of blocks first, first + 1, ..: out needs room for 4 * count words, rounded up to whole groups of lanes.
inline void philox(int64_t first, int64_t count, const Counter& c, uint32_t* out) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const Lanes m0 = all(kPhiloxM0), m1 = all(kPhiloxM1);
  for (int64_t i = 0; i < count; i += kPhiloxLanes) {
    Lanes c0 = counting(uint32_t(first + i)), c1 = all(c.tensor), c2 = all(c.probe), c3 = all(0);
    uint32_t k0 = c.key0, k1 = c.key1;
    for (int r = 0; r < 10; ++r) {
      const Lanes p0 = multiply(c0, m0), p1 = multiply(c2, m1);
      c0 = exclusive(high(p1), c1, all(k0));
      c1 = p1;
      c2 = exclusive(high(p0), c3, all(k1));
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    uint64_t lower[kPhiloxLanes], upper[kPhiloxLanes];
    store_lanes(lower, pack(c0, c1));
    store_lanes(upper, pack(c2, c3));
    for (int64_t lane = 0; lane < kPhiloxLanes; ++lane) {
      std::memcpy(out + 4 * (i + lane), lower + lane, 8);
      std::memcpy(out + 4 * (i + lane) + 2, upper + lane, 8);
    }
  }
#else
  for (int64_t i = 0; i < count; ++i) philox_one(uint32_t(first + i), c, out + 4 * i);
#endif
}

}  // namespace
}  // namespace CPD_ISA
}  // namespace cpd
