// KL between two softmaxes along one dim, and its gradient; formulas and meanings as in csrc/cpu/channel_kl.cpp.
//
// Three bodies. A row that fits a block's registers (reduce <= 16384) is read once: 3 units of traffic with its
// gradient. Longer rows are shared by several blocks and swept twice: 5 units. Columns (inner > 1) run one to a thread,
// so that neighbours load neighbours. All sums have a fixed order: the same bits from run to run. Exponentials are
// taken to base 2, T folded into the factor.
#include <type_traits>

#include "channel_kl.h"
#include "cuda/softmax_kl.h"

namespace cpd {
namespace {

constexpr int kElementsPerThread = 16;  // 2 x 16 fp32 values: 64 registers, no spills on sm_75 with 1024 threads
constexpr int kColumnLanes = 32;
constexpr int kChunkElements = 16384;  // of a row that several blocks share
// Two fp64 accumulators take as many registers as four of fp32: half the threads, or sm_90 spills.
template <class T>
constexpr int kChunkThreads = std::is_same<T, double>::value ? 256 : 512;
template <class T>
constexpr int kColumnThreads = std::is_same<T, double>::value ? 512 : 1024;

// ---- rows that fit in registers: thread i holds packs i, i + kThreads, ... ----

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    row_kernel(const T* student, const T* teacher, const float* grad, float* loss, T* dstudent, int64_t rows,
               int reduce, bool aligned, Numbers numbers) {
  constexpr int kPack = 16 / sizeof(T), kPacks = kElementsPerThread / kPack;
  SHARED(Stats<float>, room, 32);
  const float c = float(numbers.log2e_over_t), none = neg_inf<float>();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* s_row = student + row * reduce;
    const T* t_row = teacher + row * reduce;
    float s[kElementsPerThread], t[kElementsPerThread];
    Stats<float> x = no_stats<float>();
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int first = (p * kThreads + int(threadIdx.x)) * kPack;
      if (aligned && first < reduce) {  // aligned rows are whole packs
        const Pack<T> sp = *reinterpret_cast<const Pack<T>*>(s_row + first);
        const Pack<T> tp = *reinterpret_cast<const Pack<T>*>(t_row + first);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          s[p * kPack + j] = to_compute(sp.v[j]);
          t[p * kPack + j] = to_compute(tp.v[j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          s[p * kPack + j] = first + j < reduce ? to_compute(s_row[first + j]) : none;
          t[p * kPack + j] = first + j < reduce ? to_compute(t_row[first + j]) : none;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kElementsPerThread; ++j) {
      x.ms = fmaxf(x.ms, s[j]);
      x.mt = fmaxf(x.mt, t[j]);
    }
    const float own_ms = x.ms, own_mt = x.mt;
#pragma unroll
    for (int j = 0; j < kElementsPerThread; ++j) {
      const float ys = difference(s[j], own_ms) * c, yt = difference(t[j], own_mt) * c;
      s[j] = exp2f(ys);
      t[j] = exp2f(yt);
      x.zs += s[j];
      x.zt += t[j];
      x.a += t[j] == 0.0f ? 0.0f : t[j] * (yt - ys);
    }
    x = merge_block(x, c, room);
    if (loss && threadIdx.x == 0) loss[row] = float(numbers.loss_scale * kl_of(x));
    if (dstudent == nullptr) continue;
    // Exponentials are relative to the thread's own maxima: one more factor brings them to the row's.
    Factors<float> f = gradient_factors(x, grad, row, numbers);
    f.student = own_ms == none ? (x.zs == x.zs ? 0.0f : x.zs) : f.student * exp2f((own_ms - x.ms) * c);
    f.teacher = own_mt == none ? (x.zt == x.zt ? 0.0f : x.zt) : f.teacher * exp2f((own_mt - x.mt) * c);
    T* d_row = dstudent + row * reduce;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int first = (p * kThreads + int(threadIdx.x)) * kPack;
      Pack<T> d;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        d.v[j] = from_compute<T>(s[p * kPack + j] * f.student - t[p * kPack + j] * f.teacher);
      }
      if (aligned && first < reduce) {
        *reinterpret_cast<Pack<T>*>(d_row + first) = d;
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (first + j < reduce) d_row[first + j] = d.v[j];
        }
      }
    }
  }
}

// ---- longer rows: several blocks a row, two sweeps ----

// Packs of both tensors at `first`, scalar where rows are not aligned; -inf past the end.
template <class T, class A>
__device__ inline void load_pack(const T* s_row, const T* t_row, int64_t first, int64_t end, bool aligned, A* s, A* t) {
  constexpr int kPack = 16 / sizeof(T);
  if (aligned) {
    const Pack<T> sp = *reinterpret_cast<const Pack<T>*>(s_row + first);
    const Pack<T> tp = *reinterpret_cast<const Pack<T>*>(t_row + first);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      s[j] = to_compute(sp.v[j]);
      t[j] = to_compute(tp.v[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      s[j] = first + j < end ? to_compute(s_row[first + j]) : neg_inf<A>();
      t[j] = first + j < end ? to_compute(t_row[first + j]) : neg_inf<A>();
    }
  }
}

// Sweep 1: block (row, chunk) leaves the sums of its chunk.
template <class T>
__global__ void __launch_bounds__(kChunkThreads<T>, 1)
    chunk_kernel(const T* student, const T* teacher, Stats<compute_t<T>>* partials, int64_t rows, int64_t reduce,
                 int64_t chunks, bool aligned, Numbers numbers) {
  using A = compute_t<T>;
  constexpr int kPack = 16 / sizeof(T);
  SHARED(Stats<A>, room, 32);
  const A c = A(numbers.log2e_over_t);
  for (int64_t block = blockIdx.x; block < rows * chunks; block += gridDim.x) {
    const int64_t row = block / chunks, begin = block % chunks * kChunkElements;
    const int64_t end = begin + kChunkElements < reduce ? begin + kChunkElements : reduce;
    Stats<A> x = no_stats<A>();
    for (int64_t i = begin + int64_t(threadIdx.x) * kPack; i < end; i += int64_t(blockDim.x) * kPack) {
      A s[kPack], t[kPack];
      load_pack(student + row * reduce, teacher + row * reduce, i, end, aligned, s, t);
#pragma unroll
      for (int j = 0; j < kPack; ++j) add(x, s[j], t[j], c);
    }
    x = merge_block(x, c, room);
    if (threadIdx.x == 0) partials[block] = x;
  }
}

// Sweep 2: every block merges its row's partial sums, in the same order, and writes its chunk of the gradient.
template <class T>
__global__ void __launch_bounds__(kChunkThreads<T>, 1)
    finish_kernel(const T* student, const T* teacher, const Stats<compute_t<T>>* partials, const compute_t<T>* grad,
                  compute_t<T>* loss, T* dstudent, int64_t rows, int64_t reduce, int64_t chunks, bool aligned,
                  Numbers numbers) {
  using A = compute_t<T>;
  constexpr int kPack = 16 / sizeof(T);
  SHARED(Stats<A>, room, 32);
  const A c = A(numbers.log2e_over_t);
  for (int64_t block = blockIdx.x; block < rows * chunks; block += gridDim.x) {
    const int64_t row = block / chunks, begin = block % chunks * kChunkElements;
    const int64_t end = begin + kChunkElements < reduce ? begin + kChunkElements : reduce;
    Stats<A> x = no_stats<A>();
    for (int64_t k = threadIdx.x; k < chunks; k += blockDim.x) x = merge(x, partials[row * chunks + k], c);
    x = merge_block(x, c, room);
    if (loss && begin == 0 && threadIdx.x == 0) loss[row] = A(numbers.loss_scale * kl_of(x));
    if (dstudent == nullptr) continue;
    const Factors<A> f = gradient_factors(x, grad, row, numbers);
    T* d_row = dstudent + row * reduce;
    for (int64_t i = begin + int64_t(threadIdx.x) * kPack; i < end; i += int64_t(blockDim.x) * kPack) {
      A s[kPack], t[kPack];
      load_pack(student + row * reduce, teacher + row * reduce, i, end, aligned, s, t);
      Pack<T> d;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const A es = exp2_of(difference(s[j], x.ms) * c), et = exp2_of(difference(t[j], x.mt) * c);
        d.v[j] = from_compute<T>(es * f.student - et * f.teacher);
      }
      if (aligned) {
        *reinterpret_cast<Pack<T>*>(d_row + i) = d;
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (i + j < end) d_row[i + j] = d.v[j];
        }
      }
    }
  }
}

// ---- columns: threadIdx.x is the column, threadIdx.y shares its length ----

template <class T>
__global__ void __launch_bounds__(kColumnThreads<T>, 1)
    column_kernel(const T* student, const T* teacher, const compute_t<T>* grad, compute_t<T>* loss, T* dstudent,
                  int64_t outer, int64_t reduce, int64_t inner, Numbers numbers) {
  using A = compute_t<T>;
  SHARED(Stats<A>, room, kColumnThreads<T>);
  const A c = A(numbers.log2e_over_t);
  const int64_t tiles = (inner + kColumnLanes - 1) / kColumnLanes;
  const int slot = threadIdx.y * kColumnLanes + threadIdx.x;
  for (int64_t tile = blockIdx.x; tile < outer * tiles; tile += gridDim.x) {
    const int64_t i = tile % tiles * kColumnLanes + threadIdx.x, o = tile / tiles;
    const int64_t begin = o * reduce * inner + i;
    Stats<A> x = no_stats<A>();
    if (i < inner) {
      for (int64_t r = threadIdx.y; r < reduce; r += blockDim.y) {
        add(x, to_compute(student[begin + r * inner]), to_compute(teacher[begin + r * inner]), c);
      }
    }
    __syncthreads();  // room may still be read from the tile before
    room[slot] = x;
    __syncthreads();
    for (int by = blockDim.y / 2; by > 0; by /= 2) {
      if (int(threadIdx.y) < by) room[slot] = merge(room[slot], room[slot + by * kColumnLanes], c);
      __syncthreads();
    }
    x = room[threadIdx.x];
    if (i >= inner) continue;
    const int64_t column = o * inner + i;
    if (loss && threadIdx.y == 0) loss[column] = A(numbers.loss_scale * kl_of(x));
    if (dstudent == nullptr) continue;
    const Factors<A> f = gradient_factors(x, grad, column, numbers);
    for (int64_t r = threadIdx.y; r < reduce; r += blockDim.y) {
      const int64_t at = begin + r * inner;
      const A es = exp2_of(difference(to_compute(student[at]), x.ms) * c);
      const A et = exp2_of(difference(to_compute(teacher[at]), x.mt) * c);
      dstudent[at] = from_compute<T>(es * f.student - et * f.teacher);
    }
  }
}

// Incoming gradients of 1 are common (the loss was scaled ahead): such a row costs one read of its factor.
template <class T>
__global__ void scale_kernel(const T* grad, T* dstudent, int64_t outer, int64_t reduce, int64_t inner) {
  for (int64_t row = blockIdx.x; row < outer * reduce; row += gridDim.x) {
    const T* g = grad + row / reduce * inner;
    for (int64_t i = threadIdx.x; i < inner; i += blockDim.x) {
      if (g[i] != T(1)) dstudent[row * inner + i] = g[i] == T(0) ? T(0) : dstudent[row * inner + i] * g[i];
    }
  }
}

template <class T>
__global__ void scale_row_kernel(const T* grad, T* dstudent, int64_t rows, int64_t reduce) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T g = grad[row];
    if (g == T(1)) continue;
    for (int64_t j = threadIdx.x; j < reduce; j += blockDim.x) {
      dstudent[row * reduce + j] = g == T(0) ? T(0) : dstudent[row * reduce + j] * g;
    }
  }
}

inline bool is_packed(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T>
void run(const ChannelKl& args, void* stream) {
  using A = compute_t<T>;
  const T* student = static_cast<const T*>(args.student);
  const T* teacher = static_cast<const T*>(args.teacher);
  const A* grad = static_cast<const A*>(args.grad);
  A* loss = static_cast<A*>(args.loss);
  T* dstudent = static_cast<T*>(args.dstudent);
  const Numbers numbers{args.inv_temperature * kLog2E, args.loss_scale, args.grad_scale};
  if (args.inner > 1) {
    const int64_t tiles = (args.inner + kColumnLanes - 1) / kColumnLanes;
    const dim3 block(kColumnLanes, args.reduce >= 1024 ? kColumnThreads<T> / kColumnLanes : 8);
    return launch(column_kernel<T>, dim3(blocks_for(args.outer * tiles)), block, stream, student, teacher, grad, loss,
                  dstudent, args.outer, args.reduce, args.inner, numbers);
  }
  const bool aligned = is_packed(student) && is_packed(teacher) && is_packed(dstudent) &&
                       args.reduce * sizeof(T) % 16 == 0;  // a null dstudent is aligned
  if constexpr (!std::is_same<T, double>::value) {
    const auto in_registers = [&](auto kernel, int threads) {
      launch(kernel, dim3(blocks_for(args.outer)), dim3(threads), stream, student, teacher, grad, loss, dstudent,
             args.outer, int(args.reduce), aligned, numbers);
    };
    if (args.reduce <= 128 * kElementsPerThread) return in_registers(row_kernel<T, 128>, 128);
    if (args.reduce <= 512 * kElementsPerThread) return in_registers(row_kernel<T, 512>, 512);
    if (args.reduce <= 1024 * kElementsPerThread) return in_registers(row_kernel<T, 1024>, 1024);
  }
  if (args.scratch == nullptr) throw std::invalid_argument("channel_kl_cuda: long rows need scratch");
  const int64_t chunks = (args.reduce + kChunkElements - 1) / kChunkElements;
  auto* partials = static_cast<Stats<A>*>(args.scratch);
  const dim3 grid(blocks_for(args.outer * chunks)), block(kChunkThreads<T>);
  launch(chunk_kernel<T>, grid, block, stream, student, teacher, partials, args.outer, args.reduce, chunks, aligned,
         numbers);
  launch(finish_kernel<T>, grid, block, stream, student, teacher, partials, grad, loss, dstudent, args.outer,
         args.reduce, chunks, aligned, numbers);
}

template <class T>
void scale(const ScaleRows& args, void* stream) {
  const T* grad = static_cast<const T*>(args.grad);
  T* dstudent = static_cast<T*>(args.dstudent);
  if (args.inner == 1) {
    return launch(scale_row_kernel<T>, dim3(blocks_for(args.outer)), dim3(256), stream, grad, dstudent, args.outer,
                  args.reduce);
  }
  launch(scale_kernel<T>, dim3(blocks_for(args.outer * args.reduce)), dim3(256), stream, grad, dstudent, args.outer,
         args.reduce, args.inner);
}

}  // namespace

int64_t channel_kl_cuda_scratch(Dtype dtype, int64_t outer, int64_t reduce, int64_t inner) {
  const bool is_double = dtype == Dtype::kF64;
  if (inner > 1 || (!is_double && reduce <= 1024 * kElementsPerThread)) return 0;
  const int64_t chunks = (reduce + kChunkElements - 1) / kChunkElements;
  return outer * chunks * int64_t(is_double ? sizeof(Stats<double>) : sizeof(Stats<float>));
}

void channel_kl_cuda(const ChannelKl& args, void* stream) {
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

void scale_rows_cuda(const ScaleRows& args, void* stream) {
  if (args.dtype == Dtype::kF32) scale<float>(args, stream);
  if (args.dtype == Dtype::kF64) scale<double>(args, stream);
}

}  // namespace cpd
