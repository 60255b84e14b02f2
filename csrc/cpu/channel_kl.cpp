// KL(softmax(teacher / T) || softmax(student / T)) along one dim, and its gradient, in one pass over memory.
//
//   loss = loss_scale * (A / Zt + log(Zs / Zt)),  A = sum_j et_j (y_j - x_j),  x = (s - max s) / T,  y = (t - max t) /
//   T ds_j = grad * grad_scale * (es_j / Zs - et_j / Zt),  es = exp(x), Zs = sum es, likewise t
//
// Maxima run: they are raised chunk by chunk, so that a chunk is read from memory once and its second use hits L1.
// Sums are fp32 inside a chunk and fp64 across chunks. Meanings: teacher -inf adds 0; student -inf where the teacher is
// not gives an infinite loss and a finite gradient; a row all of -inf, in either tensor, gives 0 and no gradient; NaN
// or +inf give NaN.
#include "channel_kl.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/columns.h"
#include "cpu/row_sums.h"
#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

constexpr int64_t kChunk = 1024;  // s, t, es, et of a chunk: 16 KiB, half of the smallest L1
constexpr int64_t kTileFloats =
    64 * 1024;  // lanes: elements of one tensor in a tile; two such tiles fill 512 KiB of L2
constexpr int64_t kMaxLanes = 1024, kMinLanes = 64, kLaneRun = 128, kAhead = 2;

template <bool kKeep, class A>
inline void add_chunk(const A* s, const A* t, int64_t n, A c, Sums<A>* sums, A* es, A* et) {
  const A bs = finite_base(sums->ms), bt = finite_base(sums->mt);
  A zs = 0, zt = 0, a = 0;
#pragma omp simd reduction(+ : zs, zt, a)
  for (int64_t i = 0; i < n; ++i) {
    const A x = (s[i] - bs) * c, y = (t[i] - bt) * c;
    const A ex = exp_neg(x), ey = exp_neg(y);
    if (kKeep) {
      es[i] = ex;
      et[i] = ey;
    }
    zs += ex;
    zt += ey;
    const A term = ey * (y - x);
    a += ey != A(0) ? term : A(0);
  }
  sums->zs += zs;
  sums->zt += zt;
  sums->a += a;
}

// Ask for memory ahead of time: while exponentials are taken, and where rows of a tile lie a page apart, hardware
// prefetchers do not look far enough.
template <int kWrite, class T>
inline void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(row + i, kWrite, 2);
}

template <class A>
struct Scratch {
  std::vector<A> s, t, es, et, bases;
};

// Exponentials wait for the row's sums in the output itself where its type allows, so that only et needs scratch.
template <class T, class A>
A* exps_of_student(T* out, std::vector<A>* scratch, int64_t n) {
  if constexpr (std::is_same_v<T, A>) {
    return out;
  } else {
    if (int64_t(scratch->size()) < n) scratch->resize(n);
    return scratch->data();
  }
}

template <class T>
void row(const T* s, const T* t, int64_t n, const ChannelKl& args, double grad, compute_t<T>* loss, T* ds,
         Scratch<compute_t<T>>* scratch) {
  using A = compute_t<T>;
  const A c = A(args.inv_temperature);
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  Sums<A> sums;
  A* es = nullptr;
  A* et = nullptr;
  if (ds != nullptr) {
    es = exps_of_student(ds, &scratch->es, n);
    scratch->et.resize(std::max<int64_t>(n, scratch->et.size()));
    scratch->bases.resize(std::max<int64_t>(2 * chunks, scratch->bases.size()));
    et = scratch->et.data();
  }
  scratch->s.resize(kChunk);
  scratch->t.resize(kChunk);
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t i = k * kChunk, m = std::min(kChunk, n - i);
    const A* sk = load(s + i, scratch->s.data(), m);
    const A* tk = load(t + i, scratch->t.data(), m);
    A ms = sums.ms, mt = sums.mt;
    raise_max(sk, tk, m, &ms, &mt);
    sums.raise(ms, mt, args.inv_temperature);
    // The next chunk may be the next row's: rows lie behind each other.
    prefetch_row<0>(s + i + m, kChunk);
    prefetch_row<0>(t + i + m, kChunk);
    if (ds != nullptr) {
      scratch->bases[2 * k] = ms;
      scratch->bases[2 * k + 1] = mt;
      add_chunk<true>(sk, tk, m, c, &sums, es + i, et + i);
    } else {
      add_chunk<false>(sk, tk, m, c, &sums, es, et);
    }
  }
  if (loss != nullptr) *loss = A(args.loss_scale * sums.kl());
  if (ds == nullptr) return;
  const double scale = args.grad_scale * grad;
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t i = k * kChunk, m = std::min(kChunk, n - i);
    // Exponentials of a chunk are relative to the maxima so far; a chunk of -inf holds zeros.
    const auto factor = [&](A base, A max, double z) {
      return base == kNegInf<A> ? (z == z ? 0.0 : z)
                                : std::exp((double(base) - double(max)) * args.inv_temperature) / z;
    };
    A fs = 0, ft = 0;
    if (!sums.is_empty()) {
      fs = A(scale * factor(scratch->bases[2 * k], sums.ms, sums.zs));
      ft = A(scale * factor(scratch->bases[2 * k + 1], sums.mt, sums.zt));
    }
    A* e = es + i;
    const A* f = et + i;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) e[j] = e[j] * fs - f[j] * ft;
    if constexpr (!std::is_same_v<T, A>) store(ds + i, e, m);
  }
}

template <class T>
void rows(const ChannelKl& args) {
  using A = compute_t<T>;
  const int64_t n = args.reduce;
  if (args.dstudent) want_large_pages(args.dstudent, args.outer * n * int64_t(sizeof(T)));
#pragma omp parallel num_threads(args.num_threads)
  {
    Scratch<A> scratch;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < args.outer; ++r) {
      const double grad = args.grad ? double(static_cast<const A*>(args.grad)[r]) : 1.0;
      row(static_cast<const T*>(args.student) + r * n, static_cast<const T*>(args.teacher) + r * n, n, args, grad,
          args.loss ? static_cast<A*>(args.loss) + r : nullptr,
          args.dstudent ? static_cast<T*>(args.dstudent) + r * n : nullptr, &scratch);
    }
  }
}

// ---- lanes: the reduced dim is strided; a tile of neighbouring columns runs side by side in the vector registers ----

// A tile is copied to contiguous scratch first: rows of it lie a power of two apart in memory as often as not, and
// would chase each other out of the few cache sets they share.
template <class A>
struct Lanes {
  std::vector<A> ms, mt;                // maxima that the sums are relative to
  std::vector<double> zs, zt, a;        // sums so far
  std::vector<A> bs, bt, czs, czt, ca;  // bases (finite) and sums of the run of rows at hand
  std::vector<A> fs, ft;                // factors of the gradient
  std::vector<A> s, t;                  // (rows, width), in place their exponentials, in place the gradient
  Lanes(int64_t width, int64_t rows)
      : ms(width),
        mt(width),
        zs(width),
        zt(width),
        a(width),
        bs(width),
        bt(width),
        czs(width),
        czt(width),
        ca(width),
        fs(width),
        ft(width),
        s(rows * width),
        t(rows * width) {}

  void reset(int64_t width) {
    std::fill_n(ms.begin(), width, kNegInf<A>);
    std::fill_n(mt.begin(), width, kNegInf<A>);
    for (auto* sums : {&zs, &zt, &a}) std::fill_n(sums->begin(), width, 0.0);
  }
};

template <class T, class A>
void copy_lanes(const T* from, int64_t n, A* to) {
  if constexpr (std::is_same_v<T, A>) {
    store(to, from, n);
  } else {
    load(from, to, n);
  }
}

// Rows [0, n) of a tile into scratch; maxima are raised on the way, and the sums so far brought to them.
template <class T, class A>
void lanes_load(const T* s, const T* t, int64_t stride, int64_t n, int64_t width, A c, Lanes<A>* lanes) {
  A* bs = lanes->bs.data();
  A* bt = lanes->bt.data();
  A* ms = lanes->ms.data();
  A* mt = lanes->mt.data();
  double* zs = lanes->zs.data();
  double* zt = lanes->zt.data();
  double* a = lanes->a.data();
  std::copy_n(ms, width, bs);
  std::copy_n(mt, width, bt);
  for (int64_t r = 0; r < n; ++r) {
    A* sr = lanes->s.data() + r * width;
    A* tr = lanes->t.data() + r * width;
    if (r + kAhead < n) {
      prefetch_row<0>(s + (r + kAhead) * stride, width);
      prefetch_row<0>(t + (r + kAhead) * stride, width);
    }
    copy_lanes(s + r * stride, width, sr);
    copy_lanes(t + r * stride, width, tr);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      bs[i] = sr[i] > bs[i] ? sr[i] : bs[i];
      bt[i] = tr[i] > bt[i] ? tr[i] : bt[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const A shift_s = ms[i] == kNegInf<A> ? A(0) : (bs[i] - ms[i]) * c;
    const A shift_t = mt[i] == kNegInf<A> ? A(0) : (bt[i] - mt[i]) * c;
    const A fade_s = exp_neg(-shift_s), fade_t = exp_neg(-shift_t);
    const double brought = fade_t * (a[i] + zt[i] * (shift_s - shift_t));
    a[i] = fade_t == A(0) ? 0.0 : brought;
    zs[i] *= fade_s;
    zt[i] *= fade_t;
    ms[i] = bs[i];
    mt[i] = bt[i];
    bs[i] = finite_base(bs[i]);
    bt[i] = finite_base(bt[i]);
  }
}

// Add rows [begin, end) of scratch to the sums: fp32 over these rows, fp64 beyond.
template <bool kKeep, class T, class A>
void lanes_add(int64_t begin, int64_t end, int64_t width, A c, Lanes<A>* lanes, const T* next_s, const T* next_t,
               int64_t stride) {
  const A* bs = lanes->bs.data();
  const A* bt = lanes->bt.data();
  A* zs = lanes->czs.data();
  A* zt = lanes->czt.data();
  A* a = lanes->ca.data();
  for (int64_t i = 0; i < width; ++i) zs[i] = zt[i] = a[i] = 0;
  for (int64_t r = begin; r < end; ++r) {
    A* sr = lanes->s.data() + r * width;
    A* tr = lanes->t.data() + r * width;
    prefetch_row<0>(next_s + r * stride, width);
    prefetch_row<0>(next_t + r * stride, width);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A x = (sr[i] - bs[i]) * c, y = (tr[i] - bt[i]) * c;
      const A ex = exp_neg(x), ey = exp_neg(y);
      if (kKeep) {
        sr[i] = ex;
        tr[i] = ey;
      }
      zs[i] += ex;
      zt[i] += ey;
      const A term = ey * (y - x);
      const A kept = ey != A(0) ? term : A(0);
      a[i] += kept;
    }
  }
  double* all_zs = lanes->zs.data();
  double* all_zt = lanes->zt.data();
  double* all_a = lanes->a.data();
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    all_zs[i] += zs[i];
    all_zt[i] += zt[i];
    all_a[i] += a[i];
  }
}

// Loss and gradient factors of every lane, once its sums are complete.
template <class A>
void lanes_finish(const ChannelKl& args, int64_t column, int64_t width, Lanes<A>* lanes) {
  const A* grad = args.grad ? static_cast<const A*>(args.grad) + column : nullptr;
  A* loss = args.loss ? static_cast<A*>(args.loss) + column : nullptr;
  const A* ms = lanes->ms.data();
  const A* mt = lanes->mt.data();
  const double* zs = lanes->zs.data();
  const double* zt = lanes->zt.data();
  const double* a = lanes->a.data();
  A* fs = lanes->fs.data();
  A* ft = lanes->ft.data();
  const double loss_scale = args.loss_scale, grad_scale = args.grad_scale;
  for (int64_t i = 0; i < width; ++i) fs[i] = grad ? grad[i] : A(1);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const bool empty = ((ms[i] == kNegInf<A>) | (mt[i] == kNegInf<A>)) & (zs[i] == zs[i]) & (zt[i] == zt[i]);
    const double scale = grad_scale * fs[i];
    fs[i] = empty ? A(0) : A(scale / zs[i]);
    ft[i] = empty ? A(0) : A(scale / zt[i]);
  }
  if (loss == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const bool empty = ((ms[i] == kNegInf<A>) | (mt[i] == kNegInf<A>)) & (zs[i] == zs[i]) & (zt[i] == zt[i]);
    const double kl = a[i] / zt[i] + log_positive(zs[i] / zt[i]);
    loss[i] = empty ? A(0) : A(loss_scale * kl);
  }
}

template <class T>
void tile(const ChannelKl& args, int64_t o, int64_t lane, int64_t width, int64_t chunk, Lanes<compute_t<T>>* lanes) {
  using A = compute_t<T>;
  const int64_t n = args.reduce, stride = args.inner, begin = o * n * stride + lane, column = o * stride + lane;
  const T* s = static_cast<const T*>(args.student) + begin;
  const T* t = static_cast<const T*>(args.teacher) + begin;
  T* ds = args.dstudent ? static_cast<T*>(args.dstudent) + begin : nullptr;
  const A c = A(args.inv_temperature);
  const bool keep = n <= chunk;  // whole columns fit: their exponentials wait in scratch
  lanes->reset(width);
  for (int64_t r = 0; r < n; r += chunk) {
    const int64_t m = std::min(chunk, n - r);
    lanes_load(s + r * stride, t + r * stride, stride, m, width, c, lanes);
    for (int64_t k = 0; k < m; k += kLaneRun) {
      const int64_t end = std::min(m, k + kLaneRun);
      // Prefetched meanwhile: the tile to the right, or the chunk below.
      const int64_t next = keep ? width : (r + m) * stride;
      if (keep) {
        lanes_add<true>(k, end, width, c, lanes, s + next, t + next, stride);
      } else {
        lanes_add<false>(k, end, width, c, lanes, s + next, t + next, stride);
      }
    }
  }
  lanes_finish(args, column, width, lanes);
  if (ds == nullptr) return;
  const A* fs = lanes->fs.data();
  const A* ft = lanes->ft.data();
  const A* bs = lanes->bs.data();
  const A* bt = lanes->bt.data();
  for (int64_t r = 0; r < n; ++r) {
    A* e = lanes->s.data() + (keep ? r * width : 0);
    A* f = lanes->t.data() + (keep ? r * width : 0);
    if (r + kAhead < n) prefetch_row<1>(ds + (r + kAhead) * stride, width);
    if (keep) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) e[i] = e[i] * fs[i] - f[i] * ft[i];
    } else {
      copy_lanes(s + r * stride, width, e);
      copy_lanes(t + r * stride, width, f);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const A x = (e[i] - bs[i]) * c, y = (f[i] - bt[i]) * c;
        e[i] = exp_neg(x) * fs[i] - exp_neg(y) * ft[i];
      }
    }
    store(ds + r * stride, e, width);
  }
}

template <class T>
void columns(const ChannelKl& args) {
  using A = compute_t<T>;
  // As wide as L2 allows, in whole cache lines: neighbours in memory are what prefetchers like. Columns too long for
  // that are read twice, in chunks.
  const int64_t fit = kTileFloats / args.reduce / 16 * 16;
  const int64_t width = std::min(args.inner, fit >= kMinLanes ? std::min(fit, kMaxLanes) : kMaxLanes);
  const int64_t chunk = std::min(args.reduce, kTileFloats / width);
  const int64_t tiles = (args.inner + width - 1) / width;
#pragma omp parallel num_threads(args.num_threads)
  {
    Lanes<A> lanes(width, chunk);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < args.outer * tiles; ++k) {
      const int64_t lane = (k % tiles) * width;
      tile<T>(args, k / tiles, lane, std::min(width, args.inner - lane), chunk, &lanes);
    }
  }
}

template <class T>
void run(const ChannelKl& args) {
  if (args.inner == 1) return rows<T>(args);
  if constexpr (!std::is_same_v<T, double>) {
    if (args.reduce <= kColumnRows) return columns_in_registers<T>(args);
  }
  columns<T>(args);
}

template <class T>
void scale(const ScaleRows& args) {
  using A = compute_t<T>;
  const A* grad = static_cast<const A*>(args.grad);
  T* ds = static_cast<T*>(args.dstudent);
  const int64_t n = args.reduce, inner = args.inner;
  const int64_t columns = args.outer * inner;
  if (std::all_of(grad, grad + columns, [](A g) { return g == A(1); })) return;
#pragma omp parallel for schedule(static) num_threads(args.num_threads)
  for (int64_t k = 0; k < args.outer * n; ++k) {
    const A* g = grad + k / n * inner;
    T* d = ds + k * inner;
    if (inner == 1 && *g == A(1)) continue;
#pragma omp simd
    for (int64_t i = 0; i < inner; ++i) d[i] = g[i] == A(0) ? T(0) : T(d[i] * g[i]);
  }
}

}  // namespace

void channel_kl(const ChannelKl& args) {
  switch (args.dtype) {
    case Dtype::kF32:
      return run<float>(args);
    case Dtype::kF64:
      return run<double>(args);
    case Dtype::kF16:
      return run<half_t>(args);
    case Dtype::kBF16:
      return run<bfloat_t>(args);
  }
}

// Gradients are made ahead of the incoming one in fp32 and fp64 only: half types would lose their smallest values.
void scale_rows(const ScaleRows& args) {
  if (args.dtype == Dtype::kF32) scale<float>(args);
  if (args.dtype == Dtype::kF64) scale<double>(args);
}

}  // namespace CPD_ISA
}  // namespace cpd
