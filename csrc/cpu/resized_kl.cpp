// channel_kl and class_kl with pixel weights, and between maps of two sizes: upsampled logits exist one row at a time.
//
// Two sweeps over the rows of the larger map. The first makes maxima, sums and loss; the second makes each row again
// and takes the gradient, which goes through the transpose of the interpolation where the student is the smaller. So
// results do not depend on the number of threads: sweep two owns whole maps of the student.
#include <algorithm>
#include <vector>

#include "channel_kl.h"
#include "cpu/row_sums.h"
#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

// Where each of `out` positions lies among `in` positions: between first and second, `share` of the way.
template <class A>
struct Axis {
  std::vector<int64_t> first, second;
  std::vector<A> share;
  bool same;

  Axis(int64_t in, int64_t out, bool align_corners) : first(out), second(out), share(out), same(in == out) {
    const double step = align_corners ? (out > 1 ? double(in - 1) / double(out - 1) : 0.0) : double(in) / double(out);
    for (int64_t i = 0; i < out; ++i) {
      const double x = align_corners ? double(i) * step : std::max((double(i) + 0.5) * step - 0.5, 0.0);
      first[i] = std::min(int64_t(x), in - 1);
      second[i] = std::min(first[i] + 1, in - 1);
      share[i] = A(x - double(first[i]));
    }
  }
};

// One tensor's maps, read as if they were of the larger size.
template <class T>
struct Maps {
  using A = compute_t<T>;
  Axis<A> y, x;
  int64_t h, w, out_w;
  std::vector<A> upper, lower;

  Maps(int64_t h_, int64_t w_, int64_t out_h, int64_t out_w_, bool align_corners)
      : y(h_, out_h, align_corners), x(w_, out_w_, align_corners), h(h_), w(w_), out_w(out_w_), upper(w_), lower(w_) {}

  bool same() const { return y.same && x.same; }

  void row(const T* map, int64_t at, A* out) {
    if (same()) {
      const A* from = load(map + at * w, out, w);
      if (from != out) std::copy_n(from, w, out);
      return;
    }
    const A* p = load(map + y.first[at] * w, upper.data(), w);
    const A* q = load(map + y.second[at] * w, lower.data(), w);
    const A share = y.share[at];
    for (int64_t i = 0; i < w; ++i) upper[i] = share == A(0) ? p[i] : (A(1) - share) * p[i] + share * q[i];
    for (int64_t i = 0; i < out_w; ++i) {
      const A k = x.share[i], left = upper[x.first[i]];
      out[i] = k == A(0) ? left : (A(1) - k) * left + k * upper[x.second[i]];
    }
  }

  // The transpose of row(): one row of the larger map's gradient, added to the smaller's.
  void add_transposed(const A* d, int64_t at, A* sum) {
    std::fill(upper.begin(), upper.end(), A(0));
    for (int64_t i = 0; i < out_w; ++i) {
      upper[x.first[i]] += (A(1) - x.share[i]) * d[i];
      upper[x.second[i]] += x.share[i] * d[i];
    }
    A* p = sum + y.first[at] * w;
    A* q = sum + y.second[at] * w;
    const A share = y.share[at];
    for (int64_t i = 0; i < w; ++i) {
      p[i] += (A(1) - share) * upper[i];
      q[i] += share * upper[i];
    }
  }
};

template <class T>
struct Rows {
  using A = compute_t<T>;
  const ResizedKl& args;
  int64_t h, w;
  Maps<T> s_maps, t_maps;
  std::vector<A> s, t, sum;

  explicit Rows(const ResizedKl& a)
      : args(a),
        h(std::max(a.student_h, a.teacher_h)),
        w(std::max(a.student_w, a.teacher_w)),
        s_maps(a.student_h, a.student_w, h, w, a.align_corners),
        t_maps(a.teacher_h, a.teacher_w, h, w, a.align_corners),
        s(w),
        t(w),
        sum(a.dstudent && !s_maps.same() ? a.student_h * a.student_w : 0) {}

  const A* weight(int64_t n, int64_t y) const {
    return args.weight ? static_cast<const A*>(args.weight) + (n * h + y) * w : nullptr;
  }
  // Row y of map (n, c) of both tensors; pixels of weight 0 are -inf in both, which adds nothing anywhere.
  void read(int64_t n, int64_t c, int64_t y) {
    const int64_t map = n * args.c + c;
    s_maps.row(static_cast<const T*>(args.student) + map * args.student_h * args.student_w, y, s.data());
    t_maps.row(static_cast<const T*>(args.teacher) + map * args.teacher_h * args.teacher_w, y, t.data());
    if (const A* k = weight(n, y)) {
      for (int64_t i = 0; i < w; ++i) {
        s[i] = k[i] == A(0) ? kNegInf<A> : s[i];
        t[i] = k[i] == A(0) ? kNegInf<A> : t[i];
      }
    }
  }
  void begin_map() { std::fill(sum.begin(), sum.end(), A(0)); }
  void write(int64_t n, int64_t c, int64_t y, const A* d) {
    if (s_maps.same()) {
      store(static_cast<T*>(args.dstudent) + ((n * args.c + c) * h + y) * w, d, w);
    } else {
      s_maps.add_transposed(d, y, sum.data());
    }
  }
  void end_map(int64_t n, int64_t c) {
    if (s_maps.same()) return;
    const int64_t size = args.student_h * args.student_w;
    store(static_cast<T*>(args.dstudent) + (n * args.c + c) * size, sum.data(), size);
  }
};

template <class T>
void over_pixels(const ResizedKl& args) {
  using A = compute_t<T>;
  const A scale = A(args.inv_temperature);
#pragma omp parallel num_threads(args.num_threads)
  {
    Rows<T> rows(args);
#pragma omp for schedule(static)
    for (int64_t map = 0; map < args.n * args.c; ++map) {
      const int64_t n = map / args.c, c = map % args.c;
      Sums<A> sums;
      for (int64_t y = 0; y < rows.h; ++y) {
        rows.read(n, c, y);
        const A *s = rows.s.data(), *t = rows.t.data(), *k = rows.weight(n, y);
        A ms = sums.ms, mt = sums.mt;
        raise_max(s, t, rows.w, &ms, &mt);
        sums.raise(ms, mt, args.inv_temperature);
        const A bs = finite_base(ms), bt = finite_base(mt);
        A zs = 0, zt = 0, a = 0;
#pragma omp simd reduction(+ : zs, zt, a)
        for (int64_t i = 0; i < rows.w; ++i) {
          const A dx = (s[i] - bs) * scale, dy = (t[i] - bt) * scale, one = k ? k[i] : A(1);
          const A ex = one * exp_neg(dx), ey = one * exp_neg(dy);
          zs += ex;
          zt += ey;
          const A term = ey * (dy - dx);
          a += ey != A(0) ? term : A(0);
        }
        sums.zs += zs;
        sums.zt += zt;
        sums.a += a;
      }
      if (args.loss) static_cast<A*>(args.loss)[map] = A(args.loss_scale * sums.kl());
      if (args.dstudent == nullptr) continue;
      const double g = args.grad_scale * (args.grad ? double(static_cast<const A*>(args.grad)[map]) : 1.0);
      const bool empty = sums.is_empty();
      const A fs = empty ? A(0) : A(g / sums.zs), ft = empty ? A(0) : A(g / sums.zt);
      const A bs = finite_base(sums.ms), bt = finite_base(sums.mt);
      rows.begin_map();
      for (int64_t y = 0; y < rows.h; ++y) {
        rows.read(n, c, y);
        A* s = rows.s.data();
        const A *t = rows.t.data(), *k = rows.weight(n, y);
#pragma omp simd
        for (int64_t i = 0; i < rows.w; ++i) {
          const A ex = exp_neg((s[i] - bs) * scale), ey = exp_neg((t[i] - bt) * scale);
          s[i] = (k ? k[i] : A(1)) * (ex * fs - ey * ft);
        }
        rows.write(n, c, y, s);
      }
      rows.end_map(n, c);
    }
  }
}

template <class T>
void over_classes(const ResizedKl& args) {
  using A = compute_t<T>;
  const A scale = A(args.inv_temperature);
  const int64_t h = std::max(args.student_h, args.teacher_h), w = std::max(args.student_w, args.teacher_w);
  // What sweep two needs of every pixel; a few values beside the c of its logits.
  std::vector<A> bases_s(size_t(args.n * h * w)), bases_t(bases_s), factors_s(bases_s), factors_t(bases_s);
#pragma omp parallel num_threads(args.num_threads)
  {
    Rows<T> rows(args);
    std::vector<A> all_s(size_t(args.c * w)), all_t(size_t(args.c * w));  // one row of pixels, all classes
    std::vector<A> ms(static_cast<size_t>(w)), mt(ms);
    std::vector<double> zs(static_cast<size_t>(w)), zt(zs), a(zs);
#pragma omp for schedule(static)
    for (int64_t line = 0; line < args.n * h; ++line) {
      const int64_t n = line / h, y = line % h;
      std::fill(ms.begin(), ms.end(), kNegInf<A>);
      std::fill(mt.begin(), mt.end(), kNegInf<A>);
      for (auto* sums : {&zs, &zt, &a}) std::fill(sums->begin(), sums->end(), 0.0);
      for (int64_t c = 0; c < args.c; ++c) {
        rows.read(n, c, y);
        for (int64_t i = 0; i < w; ++i) {
          const A x = rows.s[i], z = rows.t[i];
          all_s[c * w + i] = x;
          all_t[c * w + i] = z;
          ms[i] = x > ms[i] ? x : ms[i];
          mt[i] = z > mt[i] ? z : mt[i];
        }
      }
      for (int64_t c = 0; c < args.c; ++c) {
        const A *s = all_s.data() + c * w, *t = all_t.data() + c * w;
        const A *pm = ms.data(), *qm = mt.data();
        double *pz = zs.data(), *qz = zt.data(), *pa = a.data();
#pragma omp simd
        for (int64_t i = 0; i < w; ++i) {
          const A bs = pm[i] == kNegInf<A> ? A(0) : pm[i], bt = qm[i] == kNegInf<A> ? A(0) : qm[i];
          const A dx = (s[i] - bs) * scale, dy = (t[i] - bt) * scale;
          const A ex = exp_neg(dx), ey = exp_neg(dy), term = ey * (dy - dx);
          pz[i] += ex;
          qz[i] += ey;
          pa[i] += ey != A(0) ? term : A(0);
        }
      }
      const A* k = rows.weight(n, y);
      for (int64_t i = 0; i < w; ++i) {
        const int64_t pixel = line * w + i;
        const bool empty = (ms[i] == kNegInf<A> || mt[i] == kNegInf<A>) && zs[i] == zs[i] && zt[i] == zt[i];
        const double one = k ? double(k[i]) : 1.0;
        const double kl = empty ? 0.0 : a[i] / zt[i] + std::log(zs[i] / zt[i]);
        if (args.loss) static_cast<A*>(args.loss)[pixel] = A(args.loss_scale * one * kl);
        const double g = args.grad_scale * one * (args.grad ? double(static_cast<const A*>(args.grad)[pixel]) : 1.0);
        bases_s[pixel] = finite_base(ms[i]);
        bases_t[pixel] = finite_base(mt[i]);
        factors_s[pixel] = empty ? A(0) : A(g / zs[i]);
        factors_t[pixel] = empty ? A(0) : A(g / zt[i]);
      }
    }
    if (args.dstudent != nullptr) {
#pragma omp for schedule(static)
      for (int64_t map = 0; map < args.n * args.c; ++map) {
        const int64_t n = map / args.c, c = map % args.c;
        rows.begin_map();
        for (int64_t y = 0; y < h; ++y) {
          rows.read(n, c, y);
          A* s = rows.s.data();
          const A* t = rows.t.data();
          const int64_t line = (n * h + y) * w;
          const A *bs = bases_s.data() + line, *bt = bases_t.data() + line;
          const A *fs = factors_s.data() + line, *ft = factors_t.data() + line;
#pragma omp simd
          for (int64_t i = 0; i < w; ++i) {
            const A ex = exp_neg((s[i] - bs[i]) * scale), ey = exp_neg((t[i] - bt[i]) * scale);
            s[i] = ex * fs[i] - ey * ft[i];
          }
          rows.write(n, c, y, s);
        }
        rows.end_map(n, c);
      }
    }
  }
}

template <class T>
void run(const ResizedKl& args) {
  if (args.over_classes) {
    over_classes<T>(args);
  } else {
    over_pixels<T>(args);
  }
}

}  // namespace

void resized_kl(const ResizedKl& args) {
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

}  // namespace CPD_ISA
}  // namespace cpd
