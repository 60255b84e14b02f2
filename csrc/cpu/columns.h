// Columns in fp32 arithmetic: the softmaxes run down a strided dim, neighbouring columns fill the vector registers.
//
// Rows of a tile lie a power of two apart as often as not, and share a few sets of every cache: nothing prefetched
// stays. So a tile is copied to scratch of its own while the tile before it is computed, a few rows at a time: memory
// is asked for just before a group of columns is computed, and copied just after. A group keeps its sums in registers
// from the first row to the last, and its factors until its gradient is written.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "channel_kl.h"
#include "cpu/simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cpd {
namespace CPD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
constexpr int kVectors = 2, kGroup = kVectors * kLanes;  // two chains of exponentials in flight
constexpr int64_t kColumnWidth = 64;       // columns of a tile: 128 were 5 to 20 % slower, 32 waste page walks
constexpr int64_t kColumnRows = 2048;      // two tiles of two tensors: 2 MiB; more is rare, and slower
constexpr int64_t kSumRun = 32;            // rows summed on their own, so that fp32 sums stay sharp
constexpr int64_t kStreamBytes = 4 << 20;  // larger gradients go past the caches

inline vfloat splat(float x) {
  return x - vfloat{};
}
inline vfloat load_vector(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store_vector(float* p, vfloat v) {
  std::memcpy(p, &v, sizeof(v));
}
// a > b ? a : b, so b where either is NaN: one instruction.
inline vfloat max_or_second(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return vfloat(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return vfloat(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}
inline void stream_vector(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, __m512(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, __m256(v));
#else
  store_vector(p, v);
#endif
}
// Fresh memory is mapped a page at a time as it is first written: larger pages make that several times cheaper.
inline void want_large_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failure is fine
#endif
}
inline void end_of_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// 2^(d c) for d <= 0, relative error about 1.5e-7. The polynomial is a relative minimax fit on |r| <= 1/2, 9e-8.
// Exact: 0 below -126.5, NaN stays NaN. Otherwise at least 2^-126 comes out, and NaN must be seen elsewhere: two
// operations less.
template <bool kExact>
inline vfloat exp2_neg(vfloat d, vfloat c, vfloat lowest) {
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits hold the nearest integer
  const vfloat clamped = max_or_second(lowest, d);
  const vfloat shifted = clamped * c + magic;
  const vfloat r = clamped * c - (shifted - magic);
  vfloat p = splat(0.0013264724f);
  p = p * r + 0.009671513f;
  p = p * r + 0.055507336f;
  p = p * r + 0.24022242f;
  p = p * r + 0.693147f;
  p = p * r + 1.0f;
  if (kExact) return p * vfloat((vint(shifted) << 23) + 0x3f800000);
  return vfloat(vint(p) + (vint(shifted) << 23));
}

// log2(x) for normal x > 0, absolute error 1e-7 near 1: x = 2^e m, log m = 2 atanh((m - 1) / (m + 1)).
inline vfloat log2_positive(vfloat x) {
  const vint bits = vint(x) - 0x3f3504f3;  // sqrt(1/2): m is within sqrt(2) of 1
  const vint e = bits >> 23;
  const vfloat m = vfloat(vint(x) - (e << 23));
  const vfloat f = (m - 1.0f) / (m + 1.0f), g = f * f;
  vfloat p = splat(1.0f / 9);
  p = p * g + 1.0f / 7;
  p = p * g + 1.0f / 5;
  p = p * g + 1.0f / 3;
  p = p * g + 1.0f;
  return __builtin_convertvector(e, vfloat) + 2.885390082f * (f * p) + x * 0.0f;  // the last term carries NaN
}

// One tile's worth of both tensors, (rows, pitch), 64-byte aligned; maxima of its columns, raised while it is copied.
struct TileBuffer {
  float *s, *t, *ms, *mt;
};

struct ColumnScratch {
  std::vector<float> memory;
  TileBuffer tiles[2];
  int64_t pitch;

  ColumnScratch(int64_t width, int64_t rows) {
    pitch = (width + kGroup - 1) / kGroup * kGroup + 16;  // one line more: rows in neighbouring sets
    memory.resize(size_t(4 * pitch * (rows + 1) + 16));
    float* p = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 4;
    for (TileBuffer& tile : tiles) {
      for (float** part : {&tile.ms, &tile.mt}) {
        *part = p;
        p += pitch;
      }
      for (float** part : {&tile.s, &tile.t}) {
        *part = p;
        p += pitch * rows;
      }
    }
  }
};

// Where a tile lies in the tensors.
struct Place {
  int64_t begin = 0, column = 0, width = 0;
};

template <class T>
inline void copy_row(const T* from, int64_t n, float* to) {
  const float* x = load(from, to, n);
  if (x != to) std::copy_n(x, n, to);
}

// Rows [begin, end) of one tensor's tile into scratch, raising the maxima: those stay in registers if kVectorsOfTile,
// the tile's width in vectors, is known (0: it is not).
template <int kVectorsOfTile, class T>
void copy_tensor(const T* from, int64_t stride, int64_t begin, int64_t end, int64_t width, int64_t pitch, float* to,
                 float* max) {
  if constexpr (kVectorsOfTile > 0) {
    vfloat m[kVectorsOfTile];
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsOfTile; ++v) m[v] = load_vector(max + v * kLanes);
    for (int64_t r = begin; r < end; ++r) {
      const float* x = load(from + r * stride, to + r * pitch, width);  // half types are converted into place
#pragma GCC unroll 16
      for (int v = 0; v < kVectorsOfTile; ++v) {
        const vfloat y = load_vector(x + v * kLanes);
        store_vector(to + r * pitch + v * kLanes, y);
        m[v] = max_or_second(y, m[v]);
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsOfTile; ++v) store_vector(max + v * kLanes, m[v]);
  } else {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = load(from + r * stride, to + r * pitch, width);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        to[r * pitch + i] = x[i];
        max[i] = x[i] > max[i] ? x[i] : max[i];
      }
    }
  }
}

template <class T>
void copy_rows(const T* s, const T* t, int64_t stride, int64_t begin, int64_t end, int64_t width, int64_t pitch,
               const TileBuffer& to) {
  if (width == kColumnWidth) {
    copy_tensor<kColumnWidth / kLanes>(s, stride, begin, end, width, pitch, to.s, to.ms);
    copy_tensor<kColumnWidth / kLanes>(t, stride, begin, end, width, pitch, to.t, to.mt);
  } else {
    copy_tensor<0>(s, stride, begin, end, width, pitch, to.s, to.ms);
    copy_tensor<0>(t, stride, begin, end, width, pitch, to.t, to.mt);
  }
}

// The copy of the next tile, a slice of its rows at a time: asked for while a group is computed, then fetched.
template <class T>
class NextTile {
 public:
  NextTile(const T* s, const T* t, int64_t stride, int64_t rows, int64_t width, int64_t pitch, int64_t slices,
           const TileBuffer& to)
      : s_(s),
        t_(t),
        stride_(stride),
        rows_(width ? rows : 0),
        width_(width),
        pitch_(pitch),
        slices_(slices),
        to_(to) {}

  // A slice will be fetched after `steps` calls of ask().
  void begin(int64_t steps) {
    row_ = rows_ * slice_ / slices_;
    end_ = rows_ * ++slice_ / slices_;
    asked_ = row_;
    column_ = 0;
    lines_ = ((end_ - row_) * ((width_ + kLine - 1) / kLine) + steps - 1) / std::max<int64_t>(steps, 1);
  }
  void ask() {
    for (int64_t i = 0; i < lines_; ++i) {
      __builtin_prefetch(s_ + asked_ * stride_ + column_, 0, 2);
      __builtin_prefetch(t_ + asked_ * stride_ + column_, 0, 2);
      column_ += kLine;
      if (column_ >= width_) {
        column_ = 0;
        if (++asked_ == end_) lines_ = 0;
      }
    }
  }
  void fetch() { copy_rows(s_, t_, stride_, row_, end_, width_, pitch_, to_); }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const T *s_, *t_;
  int64_t stride_, rows_, width_, pitch_, slices_, slice_ = 0, row_ = 0, end_ = 0, asked_ = 0, column_ = 0, lines_ = 0;
  TileBuffer to_;
};

// What is known of kGroup columns.
struct GroupSums {
  vfloat zs[kVectors], zt[kVectors], a[kVectors];
};

// Exponentials in place, and their sums; a in units of ln 2.
template <bool kExact, class Next>
inline GroupSums sum_group(const TileBuffer& tile, int64_t at, int64_t pitch, int64_t rows, float c, Next* next) {
  const float none = -std::numeric_limits<float>::infinity();
  const vfloat scale = splat(c), lowest = splat((kExact ? -127.0f : -126.0f) / c);
  float* s = tile.s + at;
  float* t = tile.t + at;
  vfloat bs[kVectors], bt[kVectors];
  GroupSums all = {};
  for (int v = 0; v < kVectors; ++v) {
    bs[v] = load_vector(tile.ms + at + v * kLanes);
    bt[v] = load_vector(tile.mt + at + v * kLanes);
    bs[v] = bs[v] == none ? vfloat{} : bs[v];
    bt[v] = bt[v] == none ? vfloat{} : bt[v];
  }
  for (int64_t begin = 0; begin < rows; begin += kSumRun) {
    const int64_t end = std::min(rows, begin + kSumRun);
    GroupSums run = {};
    if (!kExact) next->begin(end - begin);
    for (int64_t r = begin; r < end; ++r) {
      if (!kExact) next->ask();
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* sp = s + r * pitch + v * kLanes;
        float* tp = t + r * pitch + v * kLanes;
        const vfloat x = load_vector(sp) - bs[v], y = load_vector(tp) - bt[v];
        const vfloat ex = exp2_neg<kExact>(x, scale, lowest), ey = exp2_neg<kExact>(y, scale, lowest);
        store_vector(sp, ex);
        store_vector(tp, ey);
        run.zs[v] += ex;
        run.zt[v] += ey;
        if (kExact) {
          const vfloat sum = run.a[v] + ey * (y - x);  // fused where the quick form is: equal in finite columns
          run.a[v] = ey != 0.0f ? sum : run.a[v];
        } else {
          run.a[v] += ey * (max_or_second(lowest, y) - x);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      all.zs[v] += run.zs[v];
      all.zt[v] += run.zt[v];
      all.a[v] += run.a[v] * c;
    }
    if (!kExact) next->fetch();
  }
  return all;
}

inline bool all_lanes(vint mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(__m256(mask)) == 0xff;
#else
  return (mask[0] & mask[1] & mask[2] & mask[3]) != 0;
#endif
}

// Whether the quick sums hold: NaN, +inf and a student's -inf make a infinite or NaN; a teacher's -inf does not count
// unless it is everywhere.
inline bool all_finite(const GroupSums& sums, const TileBuffer& tile, int64_t at) {
  vfloat zero = {};
  for (int v = 0; v < kVectors; ++v) {
    const vfloat mt = load_vector(tile.mt + at + v * kLanes);
    zero += (sums.a[v] - sums.a[v]) + (mt - mt);
  }
  return all_lanes(zero == 0.0f);
}

// Sums, loss and gradient of kGroup columns of a tile, at most `left` of them real.
template <class T>
void group(const ChannelKl& args, const TileBuffer& tile, const Place& place, int64_t at, int64_t pitch, float c,
           bool streams, NextTile<T>* next) {
  const float none = -std::numeric_limits<float>::infinity();
  const int64_t rows = args.reduce, stride = args.inner, left = std::min<int64_t>(place.width - at, kGroup);
  const T* student = static_cast<const T*>(args.student) + place.begin + at;
  const T* teacher = static_cast<const T*>(args.teacher) + place.begin + at;
  const float* grad = args.grad ? static_cast<const float*>(args.grad) + place.column : nullptr;
  float* loss = args.loss ? static_cast<float*>(args.loss) + place.column : nullptr;
  T* ds = args.dstudent ? static_cast<T*>(args.dstudent) + place.begin : nullptr;
  float* s = tile.s + at;
  float* t = tile.t + at;
  GroupSums sums = sum_group<false>(tile, at, pitch, rows, c, next);
  if (!all_finite(sums, tile, at)) {
    for (int64_t r = 0; r < rows; ++r) {
      copy_row(student + r * stride, left, s + r * pitch);
      copy_row(teacher + r * stride, left, t + r * pitch);
    }
    sums = sum_group<true>(tile, at, pitch, rows, c, next);
  }
  const vfloat *zs = sums.zs, *zt = sums.zt, *a = sums.a;
  vfloat fs[kVectors], ft[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    // All -inf in either tensor: no distribution. NaN among them shows in the sums.
    const vint empty =
        ((load_vector(tile.ms + at + v * kLanes) == none) | (load_vector(tile.mt + at + v * kLanes) == none)) &
        (zs[v] == zs[v]) & (zt[v] == zt[v]);
    vfloat g = splat(1.0f);
    if (grad) {
      float some[kLanes] = {};
      std::memcpy(some, grad + at + v * kLanes,
                  sizeof(float) * size_t(std::clamp<int64_t>(left - v * kLanes, 0, kLanes)));
      g = load_vector(some);
    }
    const vfloat scaled = float(args.grad_scale) * g;
    fs[v] = empty ? vfloat{} : scaled / zs[v];
    ft[v] = empty ? vfloat{} : scaled / zt[v];
    if (loss) {
      const vfloat kl = a[v] / zt[v] + log2_positive(zs[v] / zt[v]);
      float some[kLanes];
      store_vector(some, empty ? vfloat{} : kl * float(args.loss_scale * 0.6931471805599453));
      std::memcpy(loss + at + v * kLanes, some,
                  sizeof(float) * size_t(std::clamp<int64_t>(left - v * kLanes, 0, kLanes)));
    }
  }
  if (ds == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    float some[kGroup];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const vfloat d =
          load_vector(s + r * pitch + v * kLanes) * fs[v] - load_vector(t + r * pitch + v * kLanes) * ft[v];
      if (std::is_same_v<T, float> && streams) {
        stream_vector(reinterpret_cast<float*>(ds) + r * args.inner + at + v * kLanes, d);
      } else {
        store_vector(some + v * kLanes, d);
      }
    }
    if (!(std::is_same_v<T, float> && streams)) store(ds + r * args.inner + at, some, left);
  }
}

template <class T>
void columns_in_registers(const ChannelKl& args) {
  const int64_t rows = args.reduce, stride = args.inner;
  const int64_t width = std::min(stride, kColumnWidth), tiles = (stride + width - 1) / width, all = args.outer * tiles;
  const T* student = static_cast<const T*>(args.student);
  const T* teacher = static_cast<const T*>(args.teacher);
  const float c = float(args.inv_temperature * 1.4426950408889634);
  const bool can_stream = reinterpret_cast<uintptr_t>(args.dstudent) % 64 == 0 && stride % kGroup == 0 &&
                          args.outer * rows * stride * int64_t(sizeof(T)) >= kStreamBytes;
  if (args.dstudent) want_large_pages(args.dstudent, args.outer * rows * stride * int64_t(sizeof(T)));
  const auto place = [&](int64_t k) {
    const int64_t lane = k % tiles * width;
    return Place{k / tiles * rows * stride + lane, k / tiles * stride + lane, std::min(width, stride - lane)};
  };
#pragma omp parallel num_threads(args.num_threads)
  {
    ColumnScratch scratch(width, rows);
    int64_t last = -2;
    int now = 0;
    const auto clear = [&](const TileBuffer& tile) {
      std::fill_n(tile.ms, scratch.pitch, -std::numeric_limits<float>::infinity());
      std::fill_n(tile.mt, scratch.pitch, -std::numeric_limits<float>::infinity());
    };
#pragma omp for schedule(static)
    for (int64_t k = 0; k < all; ++k) {
      const Place here = place(k), next = k + 1 < all ? place(k + 1) : Place{};
      if (last != k - 1) {  // the first tile of a thread: nobody has copied it yet
        clear(scratch.tiles[now]);
        copy_rows(student + here.begin, teacher + here.begin, stride, 0, rows, here.width, scratch.pitch,
                  scratch.tiles[now]);
      }
      last = k;
      const TileBuffer &tile = scratch.tiles[now], &other = scratch.tiles[1 - now];
      clear(other);
      const int64_t groups = (here.width + kGroup - 1) / kGroup;
      NextTile<T> ahead(student + next.begin, teacher + next.begin, stride, rows, next.width, scratch.pitch,
                        groups * ((rows + kSumRun - 1) / kSumRun), other);
      for (int64_t g = 0; g < groups; ++g) group<T>(args, tile, here, g * kGroup, scratch.pitch, c, can_stream, &ahead);
      now = 1 - now;
    }
    if (can_stream) end_of_streams();
  }
}

}  // namespace
}  // namespace CPD_ISA
}  // namespace cpd
