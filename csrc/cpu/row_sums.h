// The sums that make a KL of one pair of rows, relative to maxima that may still rise.
#pragma once
#include <cmath>
#include <type_traits>

#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
constexpr A kNegInf = -std::numeric_limits<A>::infinity();

template <class A>
inline A finite_base(A max) {
  return max == kNegInf<A> ? A(0) : max;
}

// The running sums of one row; ms, mt are the maxima they are relative to.
template <class A>
struct Sums {
  A ms = kNegInf<A>, mt = kNegInf<A>;
  double zs = 0, zt = 0, a = 0;

  void raise(A new_ms, A new_mt, double c) {
    if (new_ms > ms) {
      if (ms != kNegInf<A>) {
        const double shift = (double(new_ms) - double(ms)) * c;
        zs *= std::exp(-shift);
        a += zt * shift;
      }
      ms = new_ms;
    }
    if (new_mt > mt) {
      if (mt != kNegInf<A>) {
        const double shift = (double(new_mt) - double(mt)) * c, f = std::exp(-shift);
        a = f == 0 ? 0 : f * (a - zt * shift);
        zt *= f;
      }
      mt = new_mt;
    }
  }
  bool is_empty() const { return (ms == kNegInf<A> || mt == kNegInf<A>) && zs == zs && zt == zt; }
  double kl() const { return is_empty() ? 0.0 : a / zt + std::log(zs / zt); }
};

template <class A>
inline void raise_max(const A* s, const A* t, int64_t n, A* ms_out, A* mt_out) {
  A ms = *ms_out, mt = *mt_out;
#pragma omp simd reduction(max : ms, mt)
  for (int64_t i = 0; i < n; ++i) {
    ms = s[i] > ms ? s[i] : ms;
    mt = t[i] > mt ? t[i] : mt;
  }
  *ms_out = ms;
  *mt_out = mt;
}

}  // namespace
}  // namespace CPD_ISA
}  // namespace cpd
