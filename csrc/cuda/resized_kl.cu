// channel_kl and class_kl with pixel weights, and between maps of two sizes; meanings as in csrc/cpu/resized_kl.cpp.
//
// Upsampled logits exist in registers only. Sums first: of chunks of a map, then of the map (pixels), or of a pixel's
// classes, one pixel a thread. They leave maxima and factors of every distribution in scratch. The gradient is
// gathered: a thread owns one value of the student and visits the pixels that were interpolated from it, in a fixed
// order.
#include "channel_kl.h"
#include "cuda/softmax_kl.h"

namespace cpd {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8192;  // pixels of a map that one block sums

// One dim of a map of `in` values that is read at `out` positions, in >= 1, in <= out. Positions are fractions of whole
// numbers: exact, in any type.
struct Axis {
  uint32_t in, out;
  bool align_corners;
};

template <class A>
struct Position {
  uint32_t first, second;
  A share;  // of second
};

template <class A>
__device__ inline Position<A> position(Axis axis, uint32_t i) {
  const uint32_t last = axis.out > 1 ? axis.out - 1 : 1, edge = (2 * i + 1) * axis.in;
  const uint32_t divisor = axis.align_corners ? last : 2 * axis.out;
  const uint32_t at = axis.align_corners ? i * (axis.in - 1) : edge > axis.out ? edge - axis.out : 0;
  const uint32_t first = at / divisor;
  return {first, first + 1 < axis.in ? first + 1 : first, A(at - first * divisor) / A(divisor)};
}

// How much of value j is in position i.
template <class A>
__device__ inline A share_of(Axis axis, uint32_t i, uint32_t j) {
  const Position<A> p = position<A>(axis, i);
  return (p.first == j ? A(1) - p.share : A(0)) + (p.second == j ? p.share : A(0));
}

struct Range {
  uint32_t begin, end;
};

// Positions that hold something of value j: less than one value away.
__device__ inline Range positions_of(Axis axis, uint32_t j) {
  if (axis.in == 1) return {0, axis.out};
  const uint32_t before = j > 0 ? j - 1 : 0, half = 2 * axis.in, values = axis.in - 1, steps = axis.out - 1;
  uint32_t begin, end;
  if (axis.align_corners) {
    begin = before * steps / values + 1;
    end = ((j + 1) * steps + values - 1) / values;
  } else {
    begin = ((2 * before + 1) * axis.out - axis.in) / half + 1;
    end = ((2 * j + 3) * axis.out - axis.in + half - 1) / half;
  }
  return {j == 0 ? 0 : begin, j == values ? axis.out : end};
}

template <class A>
__device__ inline A between(A first, A second, A share) {  // without share * infinity where share is 0
  return share == A(0) ? first : (A(1) - share) * first + share * second;
}

template <class T>
__device__ inline compute_t<T> interpolated(const T* map, Axis rows, Axis columns, uint32_t y, uint32_t x) {
  using A = compute_t<T>;
  const Position<A> py = position<A>(rows, y), px = position<A>(columns, x);
  const T* upper = map + int64_t(py.first) * columns.in;
  const T* lower = map + int64_t(py.second) * columns.in;
  const A left = between(to_compute(upper[px.first]), to_compute(lower[px.first]), py.share);
  return between(left, between(to_compute(upper[px.second]), to_compute(lower[px.second]), py.share), px.share);
}

template <class T>
struct Maps {
  const T* student;
  const T* teacher;
  const compute_t<T>* weight;
  int64_t n, c;
  uint32_t h, w;  // of the larger
  Axis student_rows, student_columns, teacher_rows, teacher_columns;
  bool student_same, teacher_same, over_classes;
  double log2e_over_t, loss_scale, grad_scale;
};

template <class A>
struct Values {
  A s, t, weight;
};

// Both tensors at one pixel of map (n, c); -inf in both where the weight is 0, which adds nothing anywhere.
template <class T>
__device__ inline Values<compute_t<T>> read(const Maps<T>& maps, int64_t n, int64_t map, uint32_t y, uint32_t x) {
  using A = compute_t<T>;
  const int64_t pixels = int64_t(maps.h) * maps.w, pixel = int64_t(y) * maps.w + x;
  const A k = maps.weight ? maps.weight[n * pixels + pixel] : A(1);
  if (k == A(0)) return {neg_inf<A>(), neg_inf<A>(), k};
  const int64_t student_size = int64_t(maps.student_rows.in) * maps.student_columns.in;
  const int64_t teacher_size = int64_t(maps.teacher_rows.in) * maps.teacher_columns.in;
  const T* s = maps.student + map * student_size;
  const T* t = maps.teacher + map * teacher_size;
  return {maps.student_same ? to_compute(s[pixel]) : interpolated(s, maps.student_rows, maps.student_columns, y, x),
          maps.teacher_same ? to_compute(t[pixel]) : interpolated(t, maps.teacher_rows, maps.teacher_columns, y, x), k};
}

// What the gradient needs of a distribution: maxima, and grad * grad_scale over the sums.
template <class A>
struct Final {
  A ms, mt, fs, ft;
};

template <class A>
__device__ inline Final<A> final_of(const Stats<A>& x, A factor) {
  if (is_empty(x)) return {x.ms, x.mt, A(0), A(0)};
  return {x.ms, x.mt, factor / x.zs, factor / x.zt};
}

// Block (map, chunk) leaves the sums of its chunk.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    chunk_sums_kernel(Maps<T> maps, Stats<compute_t<T>>* partials, int64_t chunks) {
  using A = compute_t<T>;
  SHARED(Stats<A>, room, 32);
  const A c = A(maps.log2e_over_t);
  const int64_t pixels = int64_t(maps.h) * maps.w;
  for (int64_t block = blockIdx.x; block < maps.n * maps.c * chunks; block += gridDim.x) {
    const int64_t map = block / chunks, begin = block % chunks * kChunk;
    const int64_t end = begin + kChunk < pixels ? begin + kChunk : pixels;
    Stats<A> x = no_stats<A>();
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const uint32_t row = uint32_t(i) / maps.w;
      const Values<A> v = read(maps, map / maps.c, map, row, uint32_t(i) - row * maps.w);
      add(x, v.s, v.t, c, v.weight);
    }
    x = merge_block(x, c, room);
    if (threadIdx.x == 0) partials[block] = x;
  }
}

// A block a map merges its chunks.
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    map_sums_kernel(const Stats<A>* partials, const A* grad, A* loss, Final<A>* finals, int64_t num_maps,
                    int64_t chunks, double log2e_over_t, double loss_scale, double grad_scale) {
  SHARED(Stats<A>, room, 32);
  const A c = A(log2e_over_t);
  for (int64_t map = blockIdx.x; map < num_maps; map += gridDim.x) {
    Stats<A> x = no_stats<A>();
    for (int64_t k = threadIdx.x; k < chunks; k += blockDim.x) x = merge(x, partials[map * chunks + k], c);
    x = merge_block(x, c, room);
    if (threadIdx.x != 0) continue;
    if (loss) loss[map] = A(loss_scale * kl_of(x));
    finals[map] = final_of(x, A(grad_scale) * (grad ? grad[map] : A(1)));
  }
}

// A thread a pixel goes down its classes.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    pixel_sums_kernel(Maps<T> maps, const compute_t<T>* grad, compute_t<T>* loss, Final<compute_t<T>>* finals) {
  using A = compute_t<T>;
  const A c = A(maps.log2e_over_t);
  const int64_t pixels = int64_t(maps.h) * maps.w, all = maps.n * pixels;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t n = i / pixels;
    const uint32_t pixel = uint32_t(i - n * pixels), row = pixel / maps.w;
    Stats<A> x = no_stats<A>();
    for (int64_t k = 0; k < maps.c; ++k) {
      const Values<A> v = read(maps, n, n * maps.c + k, row, pixel - row * maps.w);
      add(x, v.s, v.t, c);
    }
    const A weight = maps.weight ? maps.weight[i] : A(1);
    if (loss) loss[i] = weight == A(0) ? A(0) : A(maps.loss_scale * weight * kl_of(x));
    finals[i] = final_of(x, A(maps.grad_scale) * weight * (grad ? grad[i] : A(1)));
  }
}

// A thread a value of the student.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    gather_gradient_kernel(Maps<T> maps, const Final<compute_t<T>>* finals, T* dstudent, int64_t blocks_a_map) {
  using A = compute_t<T>;
  const A c = A(maps.log2e_over_t);
  const int64_t pixels = int64_t(maps.h) * maps.w;
  const uint32_t width = maps.student_columns.in;
  const int64_t size = int64_t(maps.student_rows.in) * width;
  for (int64_t block = blockIdx.x; block < maps.n * maps.c * blocks_a_map; block += gridDim.x) {
    const int64_t map = block / blocks_a_map, n = map / maps.c;
    const int64_t at = block % blocks_a_map * blockDim.x + threadIdx.x;
    if (at >= size) continue;
    const uint32_t j = uint32_t(at) / width, i = uint32_t(at) - j * width;
    const Range rows = positions_of(maps.student_rows, j), columns = positions_of(maps.student_columns, i);
    A sum = A(0);
    for (uint32_t y = rows.begin; y < rows.end; ++y) {
      const A share_y = maps.student_same ? A(1) : share_of<A>(maps.student_rows, y, j);
      if (share_y == A(0)) continue;
      A row_sum = A(0);
      for (uint32_t x = columns.begin; x < columns.end; ++x) {
        const A share_x = maps.student_same ? A(1) : share_of<A>(maps.student_columns, x, i);
        if (share_x == A(0)) continue;
        const Values<A> v = read(maps, n, map, y, x);
        const Final<A> f = finals[maps.over_classes ? n * pixels + int64_t(y) * maps.w + x : map];
        const A es = exp2_of(difference(v.s, f.ms) * c), et = exp2_of(difference(v.t, f.mt) * c);
        const A k = maps.over_classes ? A(1) : v.weight;
        row_sum += share_x * k * (es * f.fs - et * f.ft);
      }
      sum += share_y * row_sum;
    }
    dstudent[map * size + at] = from_compute<T>(sum);
  }
}

struct Sizes {
  int64_t h, w, chunks, num_partials, num_finals;

  explicit Sizes(const ResizedKl& args)
      : h(std::max(args.student_h, args.teacher_h)),
        w(std::max(args.student_w, args.teacher_w)),
        chunks((h * w + kChunk - 1) / kChunk),
        num_partials(args.over_classes ? 0 : args.n * args.c * chunks),
        num_finals(args.over_classes ? args.n * h * w : args.n * args.c) {}
};

template <class T>
void run(const ResizedKl& args, void* stream) {
  using A = compute_t<T>;
  const Sizes sizes(args);
  if (args.scratch == nullptr) throw std::invalid_argument("resized_kl_cuda: needs scratch");
  const int64_t longest = std::max(sizes.h, sizes.w), area = sizes.h * sizes.w;
  const bool same_s = args.student_h * args.student_w == area, same_t = args.teacher_h * args.teacher_w == area;
  if (area >= int64_t(1) << 31 || (!(same_s && same_t) && longest > 32767)) {
    throw std::invalid_argument("resized_kl_cuda: maps have less than 2^31 pixels, and 32767 a side to be resized");
  }
  const auto axis = [&](int64_t in, int64_t out) { return Axis{uint32_t(in), uint32_t(out), args.align_corners}; };
  const Maps<T> maps{static_cast<const T*>(args.student),
                     static_cast<const T*>(args.teacher),
                     static_cast<const A*>(args.weight),
                     args.n,
                     args.c,
                     uint32_t(sizes.h),
                     uint32_t(sizes.w),
                     axis(args.student_h, sizes.h),
                     axis(args.student_w, sizes.w),
                     axis(args.teacher_h, sizes.h),
                     axis(args.teacher_w, sizes.w),
                     same_s,
                     same_t,
                     args.over_classes,
                     args.inv_temperature * kLog2E,
                     args.loss_scale,
                     args.grad_scale};
  const A* grad = static_cast<const A*>(args.grad);
  A* loss = static_cast<A*>(args.loss);
  auto* partials = static_cast<Stats<A>*>(args.scratch);
  auto* finals = reinterpret_cast<Final<A>*>(partials + sizes.num_partials);
  const dim3 block(kThreads);
  if (args.over_classes) {
    const int64_t blocks = (sizes.num_finals + kThreads - 1) / kThreads;
    launch(pixel_sums_kernel<T>, dim3(blocks_for(blocks)), block, stream, maps, grad, loss, finals);
  } else {
    launch(chunk_sums_kernel<T>, dim3(blocks_for(sizes.num_partials)), block, stream, maps, partials, sizes.chunks);
    const dim3 merging(sizes.chunks > 32 ? kThreads : 32);
    launch(map_sums_kernel<A>, dim3(blocks_for(sizes.num_finals)), merging, stream, partials, grad, loss, finals,
           sizes.num_finals, sizes.chunks, maps.log2e_over_t, args.loss_scale, args.grad_scale);
  }
  if (args.dstudent == nullptr) return;
  const int64_t blocks_a_map = (args.student_h * args.student_w + kThreads - 1) / kThreads;
  launch(gather_gradient_kernel<T>, dim3(blocks_for(args.n * args.c * blocks_a_map)), block, stream, maps, finals,
         static_cast<T*>(args.dstudent), blocks_a_map);
}

}  // namespace

int64_t resized_kl_cuda_scratch(const ResizedKl& args) {
  const Sizes sizes(args);
  const bool is_double = args.dtype == Dtype::kF64;
  return sizes.num_partials * int64_t(is_double ? sizeof(Stats<double>) : sizeof(Stats<float>)) +
         sizes.num_finals * int64_t(is_double ? sizeof(Final<double>) : sizeof(Final<float>));
}

void resized_kl_cuda(const ResizedKl& args, void* stream) {
  switch (args.dtype) {
    case Dtype::kF32:
      return run<float>(args, stream);
    case Dtype::kF64:
      return run<double>(args, stream);
    case Dtype::kF16:
      return run<__half>(args, stream);
    case Dtype::kBF16:
      return run<__nv_bfloat16>(args, stream);
  }
}

}  // namespace cpd
