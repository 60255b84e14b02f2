// Depthwise convolutions plane by plane: a plane is copied once into a frame with its padding, so that every output is
// the same sum without tests. With stride 1 the frame is one long row: position p of the result needs p + (a constant)
// for every tap, so that planes of 7 x 7 fill vectors as well; what falls between the rows is thrown away. Results do
// not depend on the number of threads.
#include "masked_depthwise.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/row_sums.h"
#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

// A plane inside zeros.
template <class A>
struct Frame {
  int64_t h, w;
  std::vector<A> values;

  Frame(int64_t h_, int64_t w_) : h(std::max<int64_t>(h_, 1)), w(std::max<int64_t>(w_, 1)), values(size_t(h * w)) {}
  A* row(int64_t y) { return values.data() + y * w; }
  const A* row(int64_t y) const { return values.data() + y * w; }
};

// Row y, column x of the plane goes to (y * step_h + top, x * step_w + left) of the frame, where that is inside.
template <class T, class A>
void put(const T* plane, int64_t h, int64_t w, int64_t step_h, int64_t step_w, int64_t top, int64_t left,
         Frame<A>* frame, A* buffer) {
  for (int64_t y = 0; y < h; ++y) {
    const int64_t to = y * step_h + top;
    if (to < 0 || to >= frame->h) continue;
    const A* from = load(plane + y * w, buffer, w);
    A* row = frame->row(to);
    const int64_t begin = left < 0 ? (-left + step_w - 1) / step_w : 0;
    const int64_t end = std::min(w, (frame->w - left + step_w - 1) / step_w);
    if (step_w == 1) {
      if (begin < end) std::copy(from + begin, from + end, row + begin + left);
    } else {
      for (int64_t x = begin; x < end; ++x) row[x * step_w + left] = from[x];
    }
  }
}

constexpr int64_t kBlock = 1024;  // sums wait in L1 where a kernel takes several visits

// out[p] = bias + sum over taps of weight * frame[p + offset of the tap], for `count` positions.
template <int kSize, class A>
void correlate_flat(const A* frame, int64_t width, const A* weight, const MaskedDepthwise& a, A bias, A* out,
                    int64_t count) {
  const int64_t down = a.dilation_h * width, right = a.dilation_w;
  if constexpr (kSize == 3) {
    const A w00 = weight[0], w01 = weight[1], w02 = weight[2], w10 = weight[3], w11 = weight[4], w12 = weight[5];
    const A w20 = weight[6], w21 = weight[7], w22 = weight[8];
    const A *p = frame, *q = frame + down, *r = frame + 2 * down;
#pragma omp simd
    for (int64_t x = 0; x < count; ++x) {
      const A top = w00 * p[x] + w01 * p[x + right] + w02 * p[x + 2 * right];
      const A middle = w10 * q[x] + w11 * q[x + right] + w12 * q[x + 2 * right];
      out[x] = bias + top + middle + (w20 * r[x] + w21 * r[x + right] + w22 * r[x + 2 * right]);
    }
  } else {
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t length = std::min(kBlock, count - begin);
      std::fill_n(out + begin, length, bias);
      for (int64_t i = 0; i < a.kernel_h; ++i) {
        const A* p = frame + begin + i * down;
        A* to = out + begin;
        if constexpr (kSize == 5) {
          const A* k = weight + i * 5;
          const A w0 = k[0], w1 = k[1], w2 = k[2], w3 = k[3], w4 = k[4];
#pragma omp simd
          for (int64_t x = 0; x < length; ++x) {
            to[x] +=
                w0 * p[x] + w1 * p[x + right] + w2 * p[x + 2 * right] + w3 * p[x + 3 * right] + w4 * p[x + 4 * right];
          }
        } else {
          for (int64_t j = 0; j < a.kernel_w; ++j) {
            const A k = weight[i * a.kernel_w + j];
            const A* from = p + j * right;
#pragma omp simd
            for (int64_t x = 0; x < length; ++x) to[x] += k * from[x];
          }
        }
      }
    }
  }
}

// All rows of one plane of outputs, with stride 1.
template <class T, class A>
void correlate(const Frame<A>& frame, const A* weight, const MaskedDepthwise& a, A bias, T* plane, int64_t h, int64_t w,
               A* sums) {
  const int64_t count = (h - 1) * frame.w + w;
  const bool square = a.kernel_h == a.kernel_w;
  const auto function = square && a.kernel_w == 3 ? correlate_flat<3, A>
                        : a.kernel_w == 5         ? correlate_flat<5, A>
                                                  : correlate_flat<0, A>;
  function(frame.row(0), frame.w, weight, a, bias, sums, count);
  for (int64_t y = 0; y < h; ++y) store(plane + y * w, sums + y * frame.w, w);
}

// The same for other strides, tap by tap.
template <class T, class A>
void correlate_strided(const Frame<A>& frame, const A* weight, const MaskedDepthwise& a, A bias, T* plane, A* sums) {
  const int64_t w = a.output_w, stride = a.stride_w;
  for (int64_t y = 0; y < a.output_h; ++y) {
    std::fill_n(sums, w, bias);
    for (int64_t i = 0; i < a.kernel_h; ++i) {
      const A* row = frame.row(y * a.stride_h + i * a.dilation_h);
      for (int64_t j = 0; j < a.kernel_w; ++j) {
        const A k = weight[i * a.kernel_w + j];
        const A* from = row + j * a.dilation_w;
        if (stride == 2) {  // a constant: shuffles, not gathers
#pragma omp simd
          for (int64_t x = 0; x < w; ++x) sums[x] += k * from[2 * x];
        } else {
          for (int64_t x = 0; x < w; ++x) sums[x] += k * from[x * stride];
        }
      }
    }
    store(plane + y * w, sums, w);
  }
}

// Planes of one image that no live channel writes.
template <class T>
void clear_others(void* to, const int64_t* at, int64_t num_live, int64_t n, int64_t channels, int64_t size) {
  std::vector<char> is_live(size_t(channels), 0);
  for (int64_t i = 0; i < num_live; ++i) is_live[size_t(at[i])] = 1;
  for (int64_t p = 0; p < n * channels; ++p) {
    if (!is_live[size_t(p % channels)]) std::memset(static_cast<T*>(to) + p * size, 0, size_t(size) * sizeof(T));
  }
}

template <class T, class A>
void read_weight(const MaskedDepthwise& a, int64_t channel, bool turned, A* buffer, A* k) {
  const int64_t size = a.kernel_h * a.kernel_w;
  const A* from = load(static_cast<const T*>(a.weight) + channel * size, buffer, size);
  for (int64_t i = 0; i < size; ++i) k[i] = from[turned ? size - 1 - i : i];
}

template <class T>
compute_t<T> value_of(const void* from, int64_t at) {
  compute_t<T> buffer;
  return *load(static_cast<const T*>(from) + at, &buffer, 1);
}

template <class T>
Frame<compute_t<T>> input_frame(const MaskedDepthwise& a) {
  return {std::max(a.input_h + 2 * a.padding_h, (a.output_h - 1) * a.stride_h + (a.kernel_h - 1) * a.dilation_h + 1),
          std::max(a.input_w + 2 * a.padding_w, (a.output_w - 1) * a.stride_w + (a.kernel_w - 1) * a.dilation_w + 1)};
}

// What a thread works with.
template <class A>
struct Room {
  Frame<A> frame;
  std::vector<A> buffer, sums, weight;

  Room(const MaskedDepthwise& a, Frame<A> f)
      : frame(std::move(f)),
        buffer(size_t(std::max({a.input_w, a.output_w, a.kernel_h * a.kernel_w}))),
        sums(frame.values.size()),
        weight(size_t(a.kernel_h * a.kernel_w)) {}
};

template <class T>
void forward(const MaskedDepthwise& a) {
  using A = compute_t<T>;
  const int64_t in_size = a.input_h * a.input_w, out_size = a.output_h * a.output_w;
  clear_others<T>(a.output, a.output_at, a.num_live, a.n, a.output_channels, out_size);
#pragma omp parallel num_threads(a.num_threads)
  {
    Room<A> room(a, input_frame<T>(a));
#pragma omp for schedule(static)
    for (int64_t p = 0; p < a.n * a.num_live; ++p) {
      const int64_t n = p / a.num_live, i = p % a.num_live;
      read_weight<T>(a, a.weight_at[i], false, room.buffer.data(), room.weight.data());
      const A bias = a.bias ? value_of<T>(a.bias, a.weight_at[i]) : A(0);
      put(static_cast<const T*>(a.input) + (n * a.input_channels + a.input_at[i]) * in_size, a.input_h, a.input_w, 1, 1,
          a.padding_h, a.padding_w, &room.frame, room.buffer.data());
      T* plane = static_cast<T*>(a.output) + (n * a.output_channels + a.output_at[i]) * out_size;
      if (a.stride_h == 1 && a.stride_w == 1) {
        correlate(room.frame, room.weight.data(), a, bias, plane, a.output_h, a.output_w, room.sums.data());
      } else {
        correlate_strided(room.frame, room.weight.data(), a, bias, plane, room.sums.data());
      }
    }
  }
}

// A correlation of the gradient, its values a stride apart, with the kernel turned round.
template <class T>
void backward_input(const MaskedDepthwise& a) {
  using A = compute_t<T>;
  const int64_t in_size = a.input_h * a.input_w, out_size = a.output_h * a.output_w;
  const int64_t reach_h = (a.kernel_h - 1) * a.dilation_h, reach_w = (a.kernel_w - 1) * a.dilation_w;
  clear_others<T>(a.dinput, a.input_at, a.num_live, a.n, a.input_channels, in_size);
#pragma omp parallel num_threads(a.num_threads)
  {
    Room<A> room(a, {a.input_h + reach_h, a.input_w + reach_w});
#pragma omp for schedule(static)
    for (int64_t p = 0; p < a.n * a.num_live; ++p) {
      const int64_t n = p / a.num_live, i = p % a.num_live;
      read_weight<T>(a, a.weight_at[i], true, room.buffer.data(), room.weight.data());
      put(static_cast<const T*>(a.doutput) + (n * a.output_channels + a.output_at[i]) * out_size, a.output_h,
          a.output_w, a.stride_h, a.stride_w, reach_h - a.padding_h, reach_w - a.padding_w, &room.frame,
          room.buffer.data());
      correlate(room.frame, room.weight.data(), a, A(0),
                static_cast<T*>(a.dinput) + (n * a.input_channels + a.input_at[i]) * in_size, a.input_h, a.input_w,
                room.sums.data());
    }
  }
}

template <class A>
double dot(const A* x, const A* y, int64_t count) {
  double all = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = std::min(kBlock, count - begin);
    const A *p = x + begin, *q = y + begin;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < length; ++i) sum += p[i] * q[i];
    all += double(sum);
  }
  return all;
}

// The gradient lies in a frame as wide as the input's, its values a stride apart: a tap's sum is one long dot product.
// Blocks are summed in their own precision, blocks of blocks in fp64; images one after another.
template <class T>
void backward_weight(const MaskedDepthwise& a) {
  using A = compute_t<T>;
  const int64_t in_size = a.input_h * a.input_w, out_size = a.output_h * a.output_w, size = a.kernel_h * a.kernel_w;
  clear_others<T>(a.dweight, a.weight_at, a.num_live, 1, a.weight_channels, size);
  if (a.dbias) clear_others<T>(a.dbias, a.weight_at, a.num_live, 1, a.weight_channels, 1);
#pragma omp parallel num_threads(a.num_threads)
  {
    Room<A> room(a, input_frame<T>(a));
    Frame<A> gradient((a.output_h - 1) * a.stride_h + 1, room.frame.w);
    const int64_t count = (a.output_h - 1) * a.stride_h * room.frame.w + (a.output_w - 1) * a.stride_w + 1;
    std::vector<double> taps(static_cast<size_t>(size));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.num_live; ++i) {
      std::fill(taps.begin(), taps.end(), 0.0);
      double all = 0;
      for (int64_t n = 0; n < a.n; ++n) {
        put(static_cast<const T*>(a.input) + (n * a.input_channels + a.input_at[i]) * in_size, a.input_h, a.input_w, 1,
            1, a.padding_h, a.padding_w, &room.frame, room.buffer.data());
        put(static_cast<const T*>(a.doutput) + (n * a.output_channels + a.output_at[i]) * out_size, a.output_h,
            a.output_w, a.stride_h, a.stride_w, 0, 0, &gradient, room.buffer.data());
        for (int64_t j = 0; j < size; ++j) {
          const A* row = room.frame.row(j / a.kernel_w * a.dilation_h) + j % a.kernel_w * a.dilation_w;
          taps[size_t(j)] += dot(gradient.row(0), row, count);
        }
        if (a.dbias) {
          for (const A d : gradient.values) all += double(d);
        }
      }
      for (int64_t j = 0; j < size; ++j) room.weight[size_t(j)] = A(taps[size_t(j)]);
      store(static_cast<T*>(a.dweight) + a.weight_at[i] * size, room.weight.data(), size);
      const A total = A(all);
      if (a.dbias) store(static_cast<T*>(a.dbias) + a.weight_at[i], &total, 1);
    }
  }
}

}  // namespace

void masked_depthwise(const MaskedDepthwise& args) {
  CPD_FOR_DTYPE(forward)
}
void masked_depthwise_input(const MaskedDepthwise& args) {
  CPD_FOR_DTYPE(backward_input)
}
void masked_depthwise_weight(const MaskedDepthwise& args) {
  CPD_FOR_DTYPE(backward_weight)
}

}  // namespace CPD_ISA
}  // namespace cpd
