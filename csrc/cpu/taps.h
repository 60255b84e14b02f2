// Sums over taps, many positions and several channels at once: what convolutions come to once every tap is a constant
// offset into a frame (frames.h).
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMostVectors[] = {8, 8, 6, 5};  // by channels: what 32 registers hold
constexpr int kTaps = 9, kDotChannels = 3;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMostVectors[] = {4, 4, 3, 2};
constexpr int kTaps = 3, kDotChannels = 3;
#else
constexpr int kVectorBytes = 16;
constexpr int kMostVectors[] = {4, 4, 3, 2};
constexpr int kTaps = 3, kDotChannels = 3;
#endif
constexpr int kChannels = 4;  // at once

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef A loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(A)), may_alias));
};
template <class A>
using vec = typename VectorOf<A>::type;

template <class A>
inline vec<A> load_vec(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A>::loose*>(p);
}
template <class A>
inline vec<A> all(A x) {
  return x - vec<A>{};  // nothing is left of the subtraction; of an addition there would be, for -0
}
template <class A>
inline void store_vec(A* p, vec<A> x) {
  *reinterpret_cast<typename VectorOf<A>::loose*>(p) = x;
}

// out[c * pitch + p] = bias[c] + sum over taps t of weight[t * kCount + c] * base[offsets[t] + p], kWide vectors of p.
template <int kCount, int kWide, class A>
void correlate_block(const A* base, const int64_t* offsets, int64_t taps, const A* weight, const A* bias, A* out,
                     int64_t pitch) {
  vec<A> sums[kCount][kWide];
#pragma GCC unroll 16
  for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) sums[c][v] = all(bias[c]);
  }
  for (int64_t t = 0; t < taps; ++t) {
    const A* p = base + offsets[t];
    vec<A> x[kWide];
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) x[v] = load_vec(p + v * kLanes<A>);
#pragma GCC unroll 16
    for (int c = 0; c < kCount; ++c) {
      const vec<A> k = all(weight[t * kCount + c]);
#pragma GCC unroll 16
      for (int v = 0; v < kWide; ++v) sums[c][v] += k * x[v];
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) store_vec(out + c * pitch + v * kLanes<A>, sums[c][v]);
  }
}

template <class A>
using CorrelateBlock = void (*)(const A*, const int64_t*, int64_t, const A*, const A*, A*, int64_t);

template <class A, int kCount, int... kWides>
constexpr std::array<CorrelateBlock<A>, sizeof...(kWides)> blocks_of(std::integer_sequence<int, kWides...>) {
  return {correlate_block<kCount, kWides + 1, A>...};
}

// The same for all positions and `channels` <= kChannels; writes up to a vector more than `positions`.
template <int kCount, class A>
void correlate_channels(const A* base, const int64_t* offsets, int64_t taps, const A* weight, const A* bias, A* out,
                        int64_t pitch, int64_t positions) {
  constexpr int kMost = kMostVectors[kCount - 1];
  static constexpr auto kBlocks = blocks_of<A, kCount>(std::make_integer_sequence<int, kMost>());
  const int64_t vectors = (positions + kLanes<A> - 1) / kLanes<A>, blocks = (vectors + kMost - 1) / kMost;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * vectors / blocks, end = (b + 1) * vectors / blocks, p = begin * kLanes<A>;
    kBlocks[size_t(end - begin - 1)](base + p, offsets, taps, weight, bias, out + p, pitch);
  }
}

template <class A>
void correlate(const A* base, const int64_t* offsets, int64_t taps, const A* weight, const A* bias, A* out,
               int64_t pitch, int64_t positions, int64_t channels) {
  const auto function = channels == 1   ? correlate_channels<1, A>
                        : channels == 2 ? correlate_channels<2, A>
                        : channels == 3 ? correlate_channels<3, A>
                                        : correlate_channels<4, A>;
  function(base, offsets, taps, weight, bias, out, pitch, positions);
}

// Loaded once: compilers would rather read memory again, across two cache lines, for every operation.
template <class V>
inline void keep(V& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#else
  (void)x;
#endif
}

template <int kHalf, class A, int... kLane>
inline vec<A> other_half(vec<A> x, std::integer_sequence<int, kLane...>) {
  using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr vec<I> kFrom = {(kLane ^ kHalf)...};
  return __builtin_shuffle(x, kFrom);
}
template <class A, int kHalf = kLanes<A> / 2>
inline A sum_of(vec<A> x) {
  x += other_half<kHalf, A>(x, std::make_integer_sequence<int, kLanes<A>>());
  if constexpr (kHalf > 1) {
    return sum_of<A, kHalf / 2>(x);
  } else {
    return x[0];
  }
}

// Parts of a frame and of a gradient that lie `step` apart.
struct Parts {
  int64_t count, x_step, y_step, positions;
};

// sums[c * pitch + t] += sum over parts and positions p of y[c * channel_step + p] * x[offsets[t] + p], t < kTaps.
// Positions are rounded up to whole vectors: y is zero there.
template <int kCount, class A>
void dot_block(const A* x, const int64_t* offsets, const A* y, int64_t channel_step, const Parts& parts, double* sums,
               int64_t pitch, int64_t taps) {
  vec<A> acc[kCount][kTaps] = {};
  for (int64_t s = 0; s < parts.count; ++s) {
    const A *from = x + s * parts.x_step, *gradient = y + s * parts.y_step;
    for (int64_t p = 0; p < parts.positions; p += kLanes<A>) {
      vec<A> d[kCount];
#pragma GCC unroll 16
      for (int c = 0; c < kCount; ++c) d[c] = load_vec(gradient + c * channel_step + p);
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t) {
        vec<A> v = load_vec(from + offsets[t] + p);
        keep(v);
#pragma GCC unroll 16
        for (int c = 0; c < kCount; ++c) acc[c][t] += d[c] * v;
      }
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kCount; ++c) {
    for (int t = 0; t < std::min<int64_t>(taps, kTaps); ++t) sums[c * pitch + t] += double(sum_of<A>(acc[c][t]));
  }
}

// The same for any number of channels and taps; offsets hold kTaps more than `taps`, whatever they are.
template <class A>
void dots(const A* x, const int64_t* offsets, int64_t taps, const A* y, int64_t channel_step, int64_t channels,
          const Parts& parts, double* sums) {
  for (int64_t t = 0; t < taps; t += kTaps) {
    for (int64_t c = 0; c < channels;) {
      const int64_t left = channels - c;
      const int64_t count = left == 4 ? 2 : std::min<int64_t>(left, kDotChannels);
      const auto function = count == 1 ? dot_block<1, A> : count == 2 ? dot_block<2, A> : dot_block<3, A>;
      function(x, offsets + t, y + c * channel_step, channel_step, parts, sums + c * taps + t, taps, taps - t);
      c += count;
    }
  }
}

}  // namespace
}  // namespace CPD_ISA
}  // namespace cpd
