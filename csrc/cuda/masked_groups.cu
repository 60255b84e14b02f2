// Grouped convolutions with few channels a group, depthwise ones among them; meanings as on the CPU.
//
// Values: a thread owns one position of one group and makes 4 channels at a time, reading each tap once for them.
// Weights wait in shared memory. Neighbouring threads are neighbouring positions, with the channels last neighbouring
// groups. Gradients of weights: a block takes an output, an input of its group, up to 9 taps and a share of all
// positions; a second launch adds the shares in order. No float atomics: the same bits from run to run.
#include <algorithm>

#include "cuda/device.h"
#include "masked_groups.h"

namespace cpd {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 4;     // that a thread makes at once
constexpr int kStaged = 512;     // taps of all groups of a block that are staged at once
constexpr int kMostGroups = 32;  // of a block, with the channels last
constexpr int kTaps = 9;         // of a block of weights' gradients
constexpr int kBlocksWanted = 1024;
constexpr int64_t kShareLeast = 8 * kThreads;  // positions that are worth a block

__device__ inline int least(int a, int b) {
  return a < b ? a : b;
}
__device__ inline int largest(int a, int b) {
  return a > b ? a : b;
}

// What a tensor of images is to a kernel. Offsets are 64-bit, positions of one plane 32-bit.
struct Images {
  int64_t places, pixels;
  int h, w;
  bool last;

  __host__ __device__ int64_t offset(int64_t n, int64_t place, int64_t pixel) const {
    return last ? (n * pixels + pixel) * places + place : (n * places + place) * pixels + pixel;
  }
};

struct Kernel {
  int h, w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// Where tap `k` of a result at `at` reads, or -1.
template <bool kBackward>
__device__ inline int source(int at, int k, int stride, int padding, int dilation, int size) {
  if (kBackward) {
    const int to = at + padding - k * dilation;
    if (to < 0 || to % stride != 0) return -1;
    return to / stride < size ? to / stride : -1;
  }
  const int from = at * stride - padding + k * dilation;
  return 0 <= from && from < size ? from : -1;
}

template <class T>
struct Values {
  const T* from;
  T* to;
  const T* weight;
  const T* bias;
  LiveChannels read, written;
  Images source, result;
  Kernel kernel;
  int64_t n, groups, weight_row, column_step, tap_step;
  int groups_a_block;                         // a power of two
  int64_t tiles, group_tiles, channel_tiles;  // of positions, groups and channels
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads) values_kernel(Values<T> a) {
  using A = compute_t<T>;
  SHARED(A, staged, kStaged * kChannels);
  SHARED(int, most, 2);  // live channels of the block's groups, read and written
  const int q_count = a.groups_a_block, q = threadIdx.x % q_count, p_count = kThreads / q_count;
  const int taps_a_channel = a.kernel.h * a.kernel.w, stage = kStaged / q_count;
  const int64_t jobs = a.n * a.tiles * a.group_tiles * a.channel_tiles;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t o0 = job % a.channel_tiles * kChannels, rest = job / a.channel_tiles;
    const int64_t g0 = rest % a.group_tiles * q_count, tile = rest / a.group_tiles % a.tiles;
    const int64_t n = rest / a.group_tiles / a.tiles, g = g0 + q;
    const int64_t pixel = tile * p_count + threadIdx.x / q_count;
    __syncthreads();  // shared memory may still be read from the job before
    if (threadIdx.x == 0) {
      most[0] = most[1] = 0;
      for (int64_t k = g0; k < g0 + q_count && k < a.groups; ++k) {
        most[0] = largest(most[0], int(a.read.starts[k + 1] - a.read.starts[k]));
        most[1] = largest(most[1], int(a.written.starts[k + 1] - a.written.starts[k]));
      }
    }
    __syncthreads();
    const bool is_inside = g < a.groups && pixel < a.result.pixels;
    if (is_inside && o0 == 0) {
      for (int64_t place = a.written.held[g]; place < a.written.held[g + 1]; ++place) {
        if (a.written.slot[place] < 0) a.to[a.result.offset(n, place, pixel)] = from_compute<T>(A(0));
      }
    }
    if (o0 >= most[1]) continue;  // the whole block
    const int channels = is_inside ? int(a.written.starts[g + 1] - a.written.starts[g] - o0) : 0;
    const int own = is_inside ? int(a.read.starts[g + 1] - a.read.starts[g]) * taps_a_channel : 0;
    const int y = int(pixel) / a.result.w, x = int(pixel) - y * a.result.w;
    A sums[kChannels] = {};
    if (a.bias != nullptr) {
#pragma unroll
      for (int o = 0; o < kChannels; ++o) {
        if (o < channels) sums[o] = to_compute(a.bias[a.written.index[a.written.starts[g] + o0 + o]]);
      }
    }
    const int taps = most[0] * taps_a_channel;
    for (int t0 = 0; t0 < taps; t0 += stage) {
      const int t1 = least(t0 + stage, taps);
      __syncthreads();
      for (int e = threadIdx.x; e < (t1 - t0) * q_count * kChannels; e += kThreads) {
        const int64_t o = o0 + e % kChannels, group = g0 + e / kChannels % q_count;
        const int t = t0 + e / kChannels / q_count, c = t / taps_a_channel, tap = t - c * taps_a_channel;
        A value = 0;
        if (group < a.groups) {
          const int64_t i = a.read.starts[group] + c, k = a.written.starts[group] + o;
          if (i < a.read.starts[group + 1] && k < a.written.starts[group + 1]) {
            const int64_t row = kBackward ? a.read.index[i] : a.written.index[k];
            const int64_t column = kBackward ? a.written.index[k] : a.read.index[i];
            value = to_compute(a.weight[row * a.weight_row + column * a.column_step + tap * a.tap_step]);
          }
        }
        staged[e] = value;
      }
      __syncthreads();
      if (channels <= 0) continue;
      int c = t0 / taps_a_channel, i = (t0 - c * taps_a_channel) / a.kernel.w;
      int j = t0 - c * taps_a_channel - i * a.kernel.w;
      int row = source<kBackward>(y, i, a.kernel.stride_h, a.kernel.padding_h, a.kernel.dilation_h, a.source.h);
      for (int t = t0; t < least(t1, own); ++t) {
        const int column =
            source<kBackward>(x, j, a.kernel.stride_w, a.kernel.padding_w, a.kernel.dilation_w, a.source.w);
        if (row >= 0 && column >= 0) {
          const int64_t place = a.read.at[a.read.starts[g] + c];
          const A v = to_compute(a.from[a.source.offset(n, place, int64_t(row) * a.source.w + column)]);
          const A* w = staged + ((t - t0) * q_count + q) * kChannels;
#pragma unroll
          for (int o = 0; o < kChannels; ++o) sums[o] += w[o] * v;
        }
        if (++j < a.kernel.w) continue;
        j = 0;
        if (++i == a.kernel.h) {
          i = 0;
          ++c;
        }
        row = source<kBackward>(y, i, a.kernel.stride_h, a.kernel.padding_h, a.kernel.dilation_h, a.source.h);
      }
    }
#pragma unroll
    for (int o = 0; o < kChannels; ++o) {
      if (o >= channels) continue;
      const int64_t place = a.written.at[a.written.starts[g] + o0 + o];
      a.to[a.result.offset(n, place, pixel)] = from_compute<T>(sums[o]);
    }
  }
}

template <class A>
__device__ inline A sum_of_warp(A x) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) x += __shfl_down_sync(0xffffffffu, x, by);
  return x;
}

template <class T>
struct WeightGradient {
  const T* input;
  const T* doutput;
  T* dweight;
  T* dbias;
  compute_t<T>* partials;  // shares, then taps, of every pair of an output and an input
  LiveChannels inputs, outputs;
  Images x, d;
  Kernel kernel;
  int64_t n, per_in, per_out, weight_row, column_step, tap_step;
  int64_t chunks, shares, share;  // of taps; of positions, and how many a share has
};

// Job (output, input, chunk, share); input per_in stands for the bias.
template <class T>
__global__ void __launch_bounds__(kThreads) partial_weights_kernel(WeightGradient<T> a) {
  using A = compute_t<T>;
  SHARED(A, room, (kThreads / 32) * kTaps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, taps = a.kernel.h * a.kernel.w;
  const int64_t columns = a.per_in + 1, jobs = a.outputs.num_live * columns * a.chunks * a.shares;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t share = job % a.shares, chunk = job / a.shares % a.chunks, pair = job / a.shares / a.chunks;
    const int64_t o = pair / columns, c = pair % columns, g = a.outputs.index[o] / a.per_out;
    const bool is_bias = c == a.per_in;
    if (is_bias ? chunk > 0 || a.dbias == nullptr : c >= a.inputs.starts[g + 1] - a.inputs.starts[g]) continue;
    const int64_t own = a.outputs.at[o], place = is_bias ? 0 : a.inputs.at[a.inputs.starts[g] + c];
    const int first = int(chunk) * kTaps, count = is_bias ? 0 : least(kTaps, taps - first);
    A sums[kTaps] = {};
    const int64_t begin = share * a.share, all = a.n * a.d.pixels, end = begin + a.share < all ? begin + a.share : all;
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      const int64_t n = at / a.d.pixels;
      const int pixel = int(at - n * a.d.pixels), y = pixel / a.d.w, x = pixel - y * a.d.w;
      const A d = to_compute(a.doutput[a.d.offset(n, own, pixel)]);
      if (is_bias) sums[0] += d;
      int i = first / a.kernel.w, j = first - i * a.kernel.w;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (t >= count) continue;
        const int row = source<false>(y, i, a.kernel.stride_h, a.kernel.padding_h, a.kernel.dilation_h, a.x.h);
        const int column = source<false>(x, j, a.kernel.stride_w, a.kernel.padding_w, a.kernel.dilation_w, a.x.w);
        if (row >= 0 && column >= 0) {
          sums[t] += d * to_compute(a.input[a.x.offset(n, place, int64_t(row) * a.x.w + column)]);
        }
        if (++j == a.kernel.w) {
          j = 0;
          ++i;
        }
      }
    }
    __syncthreads();  // room may still be read from the job before
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const A sum = sum_of_warp(sums[t]);
      if (lane == 0) room[warp * kTaps + t] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kTaps) {
      A sum = 0;
      for (int w = 0; w < kThreads / 32; ++w) sum += room[w * kTaps + threadIdx.x];
      a.partials[job * kTaps + threadIdx.x] = sum;
    }
  }
}

// A thread a weight, live or not: zero, or the shares in their order. Biases come after the weights.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_weights_kernel(WeightGradient<T> a) {
  using A = compute_t<T>;
  const int taps = a.kernel.h * a.kernel.w;
  const int64_t columns = a.per_in + 1, results = a.outputs.num_live * (a.per_in * taps + 1);
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < results; at += int64_t(gridDim.x) * kThreads) {
    const int64_t o = at / (a.per_in * taps + 1), rest = at - o * (a.per_in * taps + 1), c = rest / taps;
    const int tap = int(rest - c * taps);
    const int64_t row = a.outputs.index[o], g = row / a.per_out;
    const bool is_bias = c == a.per_in;
    if (is_bias ? a.dbias == nullptr : c >= a.inputs.starts[g + 1] - a.inputs.starts[g]) continue;
    const int64_t first = ((o * columns + c) * a.chunks + tap / kTaps) * a.shares;
    A sum = 0;
    for (int64_t s = 0; s < a.shares; ++s) sum += a.partials[(first + s) * kTaps + tap % kTaps];
    if (is_bias) {
      a.dbias[row] = from_compute<T>(sum);
    } else {
      const int64_t column = a.inputs.index[a.inputs.starts[g] + c];
      a.dweight[row * a.weight_row + column * a.column_step + tap * a.tap_step] = from_compute<T>(sum);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) zero_kernel(T* x, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    x[i] = from_compute<T>(compute_t<T>(0));
  }
}

Images images(const LiveChannels& c, int64_t h, int64_t w, bool last) {
  if (h * w > int64_t(1) << 30 || std::max(h, w) > 1 << 24) {
    throw std::invalid_argument("masked_groups_cuda: planes have at most 2^30 pixels, and 2^24 a side");
  }
  return {c.num_held, h * w, int(h), int(w), last};
}

Kernel kernel_of(const MaskedGroups& a) {
  const int64_t sizes[] = {a.kernel_h,  a.kernel_w,  a.stride_h,   a.stride_w,
                           a.padding_h, a.padding_w, a.dilation_h, a.dilation_w};
  if (*std::max_element(std::begin(sizes), std::end(sizes)) > 1 << 15) {
    throw std::invalid_argument("masked_groups_cuda: kernel, stride, padding and dilation are at most 32768");
  }
  return {int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]),
          int(sizes[4]), int(sizes[5]), int(sizes[6]), int(sizes[7])};
}

template <class T, bool kBackward>
void run_values(const MaskedGroups& a, void* stream) {
  const Images input = images(a.inputs, a.input_h, a.input_w, a.channels_last);
  const Images output = images(a.outputs, a.output_h, a.output_w, a.channels_last);
  const int64_t per_out = a.weight_rows / a.groups, per_in = a.weight_row / (a.kernel_h * a.kernel_w);
  int groups_a_block = 1;
  while (a.channels_last && groups_a_block < kMostGroups && 2 * groups_a_block <= a.groups) groups_a_block *= 2;
  const Images& result = kBackward ? input : output;
  const int64_t positions = kThreads / groups_a_block;
  const Values<T> values{static_cast<const T*>(kBackward ? a.doutput : a.input),
                         static_cast<T*>(kBackward ? a.dinput : a.output),
                         static_cast<const T*>(a.weight),
                         static_cast<const T*>(kBackward ? nullptr : a.bias),
                         kBackward ? a.outputs : a.inputs,
                         kBackward ? a.inputs : a.outputs,
                         kBackward ? output : input,
                         result,
                         kernel_of(a),
                         a.n,
                         a.groups,
                         a.weight_row,
                         a.column_step,
                         a.tap_step,
                         groups_a_block,
                         (result.pixels + positions - 1) / positions,
                         (a.groups + groups_a_block - 1) / groups_a_block,
                         ((kBackward ? per_in : per_out) + kChannels - 1) / kChannels};
  const int64_t jobs = values.n * values.tiles * values.group_tiles * values.channel_tiles;
  if (jobs > 0) launch(values_kernel<T, kBackward>, dim3(blocks_for(jobs)), dim3(kThreads), stream, values);
}

struct Shares {
  int64_t chunks, pairs, count, size;

  explicit Shares(const MaskedGroups& a)
      : chunks((a.kernel_h * a.kernel_w + kTaps - 1) / kTaps),
        pairs(a.outputs.num_live * (a.weight_row / (a.kernel_h * a.kernel_w) + 1)) {
    const int64_t positions = a.n * a.output_h * a.output_w;
    const int64_t wanted = (kBlocksWanted + pairs * chunks - 1) / std::max<int64_t>(pairs * chunks, 1);
    count = std::max<int64_t>(1, std::min(wanted, positions / kShareLeast));
    size = (positions + count - 1) / count;
  }
};

template <class T>
void run_weight(const MaskedGroups& a, void* scratch, void* stream) {
  const Shares shares(a);
  const WeightGradient<T> gradient{static_cast<const T*>(a.input),
                                   static_cast<const T*>(a.doutput),
                                   static_cast<T*>(a.dweight),
                                   static_cast<T*>(a.dbias),
                                   static_cast<compute_t<T>*>(scratch),
                                   a.inputs,
                                   a.outputs,
                                   images(a.inputs, a.input_h, a.input_w, a.channels_last),
                                   images(a.outputs, a.output_h, a.output_w, a.channels_last),
                                   kernel_of(a),
                                   a.n,
                                   a.weight_row / (a.kernel_h * a.kernel_w),
                                   a.weight_rows / a.groups,
                                   a.weight_row,
                                   a.column_step,
                                   a.tap_step,
                                   shares.chunks,
                                   shares.count,
                                   shares.size};
  const dim3 block(kThreads);
  const auto blocks = [](int64_t work) { return dim3(blocks_for((work + kThreads - 1) / kThreads)); };
  const int64_t weights = a.weight_rows * a.weight_row;
  launch(zero_kernel<T>, blocks(weights), block, stream, gradient.dweight, weights);
  if (a.dbias) launch(zero_kernel<T>, blocks(a.weight_rows), block, stream, gradient.dbias, a.weight_rows);
  if (a.outputs.num_live == 0) return;
  if (scratch == nullptr) throw std::invalid_argument("masked_groups_weight_cuda: needs scratch");
  const int64_t jobs = shares.pairs * shares.chunks * shares.count;
  launch(partial_weights_kernel<T>, dim3(blocks_for(jobs)), block, stream, gradient);
  launch(finish_weights_kernel<T>, blocks(a.outputs.num_live * (a.weight_row + 1)), block, stream, gradient);
}

}  // namespace

int64_t masked_groups_weight_cuda_scratch(const MaskedGroups& a) {
  const Shares shares(a);
  const int64_t size = a.dtype == Dtype::kF64 ? sizeof(double) : sizeof(float);
  return shares.pairs * shares.chunks * shares.count * kTaps * size;
}

#define CPD_FOR_DTYPE(call)    \
  switch (args.dtype) {        \
    case Dtype::kF32: {        \
      using T = float;         \
      return call;             \
    }                          \
    case Dtype::kF64: {        \
      using T = double;        \
      return call;             \
    }                          \
    case Dtype::kF16: {        \
      using T = __half;        \
      return call;             \
    }                          \
    case Dtype::kBF16: {       \
      using T = __nv_bfloat16; \
      return call;             \
    }                          \
  }

void masked_groups_cuda(const MaskedGroups& args, void* stream) {
  CPD_FOR_DTYPE((run_values<T, false>(args, stream)))
}
void masked_groups_input_cuda(const MaskedGroups& args, void* stream) {
  CPD_FOR_DTYPE((run_values<T, true>(args, stream)))
}
void masked_groups_weight_cuda(const MaskedGroups& args, void* scratch, void* stream) {
  CPD_FOR_DTYPE((run_weight<T>(args, scratch, stream)))
}

}  // namespace cpd
