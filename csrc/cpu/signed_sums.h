// Sums of values times signs, or of squares: of one long row, or of many short ones, sixteen at a time. Whatever the
// instruction set, the same operations in the same order, so the same bits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/philox.h"
#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

constexpr int64_t kChunk = 2048;                                           // elements: 8 KiB of fp32, with their signs
constexpr int64_t kWords = (kChunk + 2 * kBlock) / 32 + 4 * kPhiloxLanes;  // a chunk may start inside a block
constexpr int64_t kAhead = 8192;                                           // bytes

// The signs of elements [begin, end) of a tensor.
struct Signs {
  uint32_t words[kWords];
  int64_t base = 0;

  void make(int64_t begin, int64_t end, const Counter& counter) {
    base = begin / kBlock * kBlock;
    philox(base / kBlock, (end - base + kBlock - 1) / kBlock, counter, words);
  }
  const char* bytes(int64_t i) const { return reinterpret_cast<const char*>(words) + ((i - base) >> 3); }
  uint32_t bit(int64_t i) const { return words[(i - base) >> 5] >> ((i - base) & 31) & 1u; }
};

// Calls whole(word, i) for i = 0, 32, .. of whole words in [begin, end), single(bit, i) for what is left; i counts from
// begin.
template <class Whole, class Single>
inline void each_sign(const Signs& signs, int64_t begin, int64_t end, Whole whole, Single single) {
  int64_t i = begin;
  const int64_t aligned = std::min(end, (begin + 31) / 32 * 32);
  for (; i < aligned; ++i) single(signs.bit(i), i - begin);
  for (; i + 32 <= end; i += 32) whole(signs.words[(i - signs.base) >> 5], i - begin);
  for (; i < end; ++i) single(signs.bit(i), i - begin);
}

inline float flip(float x, uint32_t sign) {
  return as_float(as_bits(x) ^ sign);
}

// A vector of 64 bytes, whatever the instruction set makes of it.
template <class A>
struct VectorOf {
  using Bits = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;
  typedef A Values __attribute__((vector_size(64)));
  typedef Bits Lanes __attribute__((vector_size(64)));
  static constexpr int64_t kLanes = 64 / sizeof(A);
  static constexpr int kTop = 8 * sizeof(A) - 1;

  static Values load(const A* x) {
    Values v;
    std::memcpy(&v, x, sizeof(v));
    return v;
  }
  static void store(A* x, Values v) { std::memcpy(x, &v, sizeof(v)); }
  // How far each lane's sign is from the top of a word whose bit `skip` is the first lane's.
  static Lanes shifts(int skip) {
    Lanes s{};
    for (int j = 0; j < kLanes; ++j) s[j] = Bits(kTop - skip - j);
    return s;
  }
  static Values flip(Values x, uint32_t word, Lanes shifts) {
    const Lanes signs = ((Lanes{} + Bits(word)) << shifts) & (Lanes{} + (Bits(1) << kTop));
    return reinterpret_cast<Values>(reinterpret_cast<Lanes>(x) ^ signs);
  }
  // The first n < kLanes lanes, and zeros.
  static Values first(Values v, Lanes mask) { return reinterpret_cast<Values>(reinterpret_cast<Lanes>(v) & mask); }
  static Lanes mask(int64_t n) {
    Lanes m{};
    for (int64_t j = 0; j < kLanes; ++j) m[j] = j < n ? ~Bits(0) : Bits(0);
    return m;
  }
  // Lanes are halved and added until one is left.
  static A sum(Values v) {
    A a[kLanes];
    store(a, v);
    for (int64_t n = kLanes / 2; n > 0; n /= 2) {
      for (int64_t j = 0; j < n; ++j) a[j] += a[j + n];
    }
    return a[0];
  }
};

using Floats = VectorOf<float>::Values;

#if defined(__clang__)
#define CPD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CPD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VectorOf<float>::Lanes{__VA_ARGS__})
#endif
// The sums of sixteen vectors, each in the order of VectorOf::sum: every step halves two, three times four vectors.
inline Floats sums_of_16(const Floats* v) {
  Floats a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const Floats x = v[2 * i], y = v[2 * i + 1];
    a[i] = CPD_SHUFFLE(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           CPD_SHUFFLE(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const Floats x = a[2 * i], y = a[2 * i + 1];
    b[i] = CPD_SHUFFLE(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           CPD_SHUFFLE(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats x = b[2 * i], y = b[2 * i + 1];
    c[i] = CPD_SHUFFLE(x, y, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           CPD_SHUFFLE(x, y, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  return CPD_SHUFFLE(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         CPD_SHUFFLE(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#undef CPD_SHUFFLE

// v * x, or x * x, a vector at a time; x[0] is element `first`.
template <bool kSigns, class A>
class Products {
  using V = VectorOf<A>;

 public:
  Products(const A* x, const Signs& signs, int64_t first)
      : x_(x),
        signs_(signs),
        first_(first),
        bytes_(signs.bytes(first)),
        shifts_(V::shifts(int((first - signs.base) & 7))) {}

  typename V::Values vector(int64_t i) const {
    __builtin_prefetch(reinterpret_cast<const char*>(x_ + i) + kAhead, 0, 3);  // hardware stops at the end of a page
    const typename V::Values x = V::load(x_ + i);
    if (!kSigns) return x * x;
    uint32_t word;  // the first sign lies at the same place in the first byte of every vector
    std::memcpy(&word, bytes_ + i / 8, 4);
    return V::flip(x, word, shifts_);
  }
  A one(int64_t i) const { return !kSigns ? x_[i] * x_[i] : signs_.bit(first_ + i) ? -x_[i] : x_[i]; }

 private:
  const A* x_;
  const Signs& signs_;
  const int64_t first_;
  const char* bytes_;
  const typename V::Lanes shifts_;
};

// The sum of n products; with columns, each is also added to its column on the way. Four vectors of sums: one would
// wait for the adder at every step.
template <bool kColumns, class A, class P>
inline double sum_of(const P& products, int64_t n, A* columns) {
  using V = VectorOf<A>;
  constexpr int64_t kLanes = V::kLanes;
  typename V::Values sums[4] = {};
  const auto step = [&](int64_t i, typename V::Values* sum) {
    const typename V::Values y = products.vector(i);
    *sum += y;
    if (kColumns) V::store(columns + i, V::load(columns + i) + y);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    step(i, sums);
    step(i + kLanes, sums + 1);
    step(i + 2 * kLanes, sums + 2);
    step(i + 3 * kLanes, sums + 3);
  }
  for (; i + kLanes <= n; i += kLanes) step(i, sums);
  A total = n < kLanes ? A(0) : V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) {
    const A y = products.one(i);
    total += y;
    if (kColumns) columns[i] += y;
  }
  return double(total);
}

template <class A, class P>
inline void write_products(const P& products, int64_t n, A* y) {
  using V = VectorOf<A>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(y + i, products.vector(i));
  for (; i < n; ++i) y[i] = products.one(i);
}

// to[r] += the sum of row r of y, (rows, length); may read (and ignore) a vector past the end.
template <class A>
inline void add_row_sums(const A* y, int64_t rows, int64_t length, double* to) {
  using V = VectorOf<A>;
  const int64_t whole = length / V::kLanes * V::kLanes;
  const typename V::Lanes mask = V::mask(length - whole);
  const auto row = [&](int64_t r) {
    const A* x = y + r * length;
    typename V::Values sum = V::first(V::load(x + whole), mask);
    for (int64_t i = 0; i < whole; i += V::kLanes) sum += V::load(x + i);
    return sum;
  };
  int64_t r = 0;
  if (length == 1) {
    for (; r < rows; ++r) to[r] += double(y[r]);
    return;
  }
  if constexpr (std::is_same_v<A, float>) {
    for (; r + 16 <= rows; r += 16) {
      Floats sums[16];
      for (int k = 0; k < 16; ++k) sums[k] = row(r + k);
      const Floats totals = sums_of_16(sums);
      for (int k = 0; k < 16; ++k) to[r + k] += double(totals[k]);
    }
  }
  for (; r < rows; ++r) to[r] += double(V::sum(row(r)));
}

}  // namespace
}  // namespace CPD_ISA
}  // namespace cpd
