// Running sums of a KL between two softmaxes, shared by the CUDA bodies; meanings as in csrc/cpu/channel_kl.cpp.
#pragma once
#include <algorithm>

#include "cuda/device.h"

namespace cpd {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class A>
__device__ inline A neg_inf() {
  return A(-INFINITY);
}

// x - base for a maximum that may be -inf: then x is -inf (or NaN) as well, and any finite base serves.
template <class A>
__device__ inline A difference(A x, A base) {
  return base == neg_inf<A>() ? x : x - base;
}

__device__ inline float max_of(float x, float y) {
  return fmaxf(x, y);
}
__device__ inline double max_of(double x, double y) {
  return fmax(x, y);
}
__device__ inline float exp2_of(float x) {
  return exp2f(x);
}
__device__ inline double exp2_of(double x) {
  return exp2(x);
}

// Sums relative to the maxima ms, mt; a = sum et (y - x) in units of ln 2.
template <class A>
struct Stats {
  A ms, mt, zs, zt, a;
};

template <class A>
__device__ inline Stats<A> no_stats() {
  return {neg_inf<A>(), neg_inf<A>(), A(0), A(0), A(0)};
}

// Bring sums to larger maxima.
template <class A>
__device__ inline void raise(Stats<A>& x, A ms, A mt, A c) {
  const A shift_s = x.ms == neg_inf<A>() ? A(0) : (ms - x.ms) * c;
  const A shift_t = x.mt == neg_inf<A>() ? A(0) : (mt - x.mt) * c;
  const A fade = exp2_of(-shift_t);
  x.a = fade == A(0) ? A(0) : fade * (x.a + x.zt * (shift_s - shift_t));
  x.zs *= exp2_of(-shift_s);
  x.zt *= fade;
  x.ms = ms;
  x.mt = mt;
}

template <class A>
__device__ inline Stats<A> merge(Stats<A> x, Stats<A> y, A c) {
  const A ms = max_of(x.ms, y.ms), mt = max_of(x.mt, y.mt);
  raise(x, ms, mt, c);
  raise(y, ms, mt, c);
  return {ms, mt, x.zs + y.zs, x.zt + y.zt, x.a + y.a};
}

// One more element, that counts k times.
template <class A>
__device__ inline void add(Stats<A>& x, A s, A t, A c, A k = A(1)) {
  const A ms = max_of(x.ms, s), mt = max_of(x.mt, t);
  if (ms > x.ms || mt > x.mt) raise(x, ms, mt, c);
  const A ys = difference(s, ms) * c, yt = difference(t, mt) * c;
  const A et = k * exp2_of(yt);
  x.zs += k * exp2_of(ys);
  x.zt += et;
  x.a += et == A(0) ? A(0) : et * (yt - ys);
}

template <class A>
__device__ inline bool is_empty(const Stats<A>& x) {
  return (x.ms == neg_inf<A>() || x.mt == neg_inf<A>()) && x.zs == x.zs && x.zt == x.zt;
}

template <class A>
__device__ inline A kl_of(const Stats<A>& x) {
  return is_empty(x) ? A(0) : (x.a / x.zt + A(log2(x.zs / x.zt))) * A(kLn2);
}

template <class A>
__device__ inline Stats<A> shuffle_down(const Stats<A>& x, int by) {
  const unsigned all = 0xffffffffu;
  return {__shfl_down_sync(all, x.ms, by), __shfl_down_sync(all, x.mt, by), __shfl_down_sync(all, x.zs, by),
          __shfl_down_sync(all, x.zt, by), __shfl_down_sync(all, x.a, by)};
}

// Merge over a block of whole warps in a fixed order; every thread gets the result. Room: 32 Stats.
template <class A>
__device__ inline Stats<A> merge_block(Stats<A> x, A c, Stats<A>* room) {
  for (int by = 16; by > 0; by /= 2) x = merge(x, shuffle_down(x, by), c);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  __syncthreads();  // room may still be read from the row before
  if (lane == 0) room[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = lane < warps ? room[lane] : no_stats<A>();
    for (int by = 16; by > 0; by /= 2) x = merge(x, shuffle_down(x, by), c);
    if (lane == 0) room[0] = x;
  }
  __syncthreads();
  return room[0];
}

struct Numbers {
  double log2e_over_t, loss_scale, grad_scale;
};

template <class A>
struct Factors {
  A student, teacher;
};

// What the softmaxes are multiplied with to give the gradient.
template <class A>
__device__ inline Factors<A> gradient_factors(const Stats<A>& x, const A* grad, int64_t at, Numbers numbers) {
  if (is_empty(x)) return {A(0), A(0)};
  const A g = A(numbers.grad_scale) * (grad ? grad[at] : A(1));
  return {g / x.zs, g / x.zt};
}

}  // namespace
}  // namespace cpd
