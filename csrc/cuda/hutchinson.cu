// Rademacher probes, their sums against Hessian-vector products, and the sums of channels; meanings and the layout of
// signs as on the CPU.
//
// One launch reduces all parameters: a block an item of the table (hutchinson.h). What one item sums alone it adds to
// the result; other sums wait as partial sums, and the last block of an entry, known by an integer counter, adds them
// in order. No float atomics: the same bits from run to run.
#include <algorithm>
#include <type_traits>

#include "cuda/device.h"
#include "hutchinson.h"

namespace cpd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Elements that a warp takes at once, in runs of 4 a lane; half as many in fp64, whose columns would not fit registers.
template <class A>
constexpr int kStrip = std::is_same<A, double>::value ? 512 : 1024;
template <class A>
constexpr int kQuads = kStrip<A> / 128;
constexpr int kStripBlocks = kStrip<float> / 128 + 1;  // of signs: a strip may start inside one
constexpr int kShortRow = 32;                          // a thread each, where no columns are wanted
constexpr int kBlockElements = 4096;                   // of a probe, a warp's turn: a Philox call a lane

struct Counter {
  uint32_t key0, key1, tensor, probe;
};
struct Words {
  uint32_t w[4];
};

__device__ inline Words philox(uint32_t block, const Counter& c) {
  uint32_t c0 = block, c1 = c.tensor, c2 = c.probe, c3 = 0, k0 = c.key0, k1 = c.key1;
#pragma unroll
  for (int r = 0; r < 10; ++r) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Quad {
  T v[4];
};

// Where logical element f lies in a tensor that is (rows, inner, channels) in memory.
__device__ inline int64_t last_offset(int64_t f, int64_t channels, int64_t inner) {
  const int64_t length = channels * inner, row = f / length, e = f - row * length, c = e / inner;
  return row * length + (e - c * inner) * channels + c;
}

// ---- sums ----

// What a block knows of its item. O is the type of the result and of partial sums.
template <class O>
struct Job {
  const ReduceEntry& entry;
  const ReduceItem& item;
  const void* data;
  Counter counter;
  bool has_signs, is_aligned;
  O alpha;
  O* out;
  O* partials;
  int* bad;
};

// The tensor's type is looked at here and nowhere else: kernels for each would be four times the code. A is the type
// that is computed in.
template <class A>
__device__ inline A element_at(const void* data, int dtype, int64_t offset) {
  if constexpr (std::is_same<A, double>::value) {
    return static_cast<const double*>(data)[offset];
  } else {
    if (dtype == int(Dtype::kF16)) return to_compute(static_cast<const __half*>(data)[offset]);
    if (dtype == int(Dtype::kBF16)) return to_compute(static_cast<const __nv_bfloat16*>(data)[offset]);
    return static_cast<const float*>(data)[offset];
  }
}
// Not inlined: the divisions of channels-last tensors would fill the loops that unroll around it.
template <class A>
__device__ __attribute__((noinline)) A element(const void* data, int dtype, int64_t f, int64_t channels, int inner) {
  return element_at<A>(data, dtype, channels > 0 ? last_offset(f, channels, inner) : f);
}
template <class A, class O>
__device__ inline A element(const Job<O>& job, int64_t f) {
  return element<A>(job.data, int(job.entry.dtype), f, job.entry.last_channels, int(job.entry.last_inner));
}

template <class T, class A>
__device__ inline void load_quad(const void* data, int64_t f, A (&values)[4]) {
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(static_cast<const T*>(data) + f);
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = to_compute(quad.v[i]);
}
template <class A>
__device__ inline void load_quad_of(int dtype, const void* data, int64_t f, A (&values)[4]) {
  if constexpr (std::is_same<A, double>::value) {
    load_quad<double>(data, f, values);
  } else {
    if (dtype == int(Dtype::kF16)) return load_quad<__half>(data, f, values);
    if (dtype == int(Dtype::kBF16)) return load_quad<__nv_bfloat16>(data, f, values);
    load_quad<float>(data, f, values);
  }
}

template <class A>
__device__ inline A product(A x, bool has_signs, uint32_t bit) {
  return !has_signs ? x * x : bit ? -x : x;
}

// Every finished sum comes by here, in one thread.
template <class O>
__device__ inline void add_to_result(const Job<O>& job, int64_t at, O sum) {
  if (!(fabs(double(sum)) <= 1.7976931348623157e308)) atomicOr(job.bad, 1);
  job.out[at] += job.alpha * sum;
}
template <class O>
__device__ inline void finish_row(const Job<O>& job, int64_t r, O sum) {
  if (job.item.row_sums < 0) {
    add_to_result(job, job.entry.row_start + r, sum);
  } else {
    job.partials[job.item.row_sums + r - job.item.r0] = sum;
  }
}

template <class A>
__device__ inline A sum_of_warp(A x) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) x += __shfl_down_sync(0xffffffffu, x, by);
  return x;
}

// The 4 signs from the element that lies `offset` after the first one of `words`.
__device__ inline uint32_t four_signs(const uint32_t* words, int offset) {
  const uint64_t two = uint64_t(words[offset >> 5]) | uint64_t(words[(offset >> 5) + 1]) << 32;
  return uint32_t(two >> (offset & 31));
}

// Elements [begin, begin + n) of the tensor in logical order, n <= kStrip<A>: this lane's part of their sum; columns
// are added to one by one. `words` is this warp's.
template <bool kColumns, class A, class O>
__device__ inline A add_strip(const Job<O>& job, int64_t begin, int n, uint32_t* words, A (&columns)[kQuads<A>][4]) {
  const int lane = threadIdx.x % 32;
  const int64_t first_block = begin / 128;
  if (job.has_signs) {
    __syncwarp();  // the words of the strip before may still be read
    if (lane <= int((begin + n - 1) / 128 - first_block)) {
      const Words made = philox(uint32_t(first_block + lane), job.counter);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[4 * lane + i] = made.w[i];
    }
    __syncwarp();
  }
  const int shift = int(begin - first_block * 128);
  A sum = 0;
#pragma unroll
  for (int j = 0; j < kQuads<A>; ++j) {
    const int at = 128 * j + 4 * lane;
    if (at >= n) continue;
    const uint32_t signs = job.has_signs ? four_signs(words, shift + at) : 0u;
    A values[4];
    if (job.is_aligned) {
      load_quad_of(int(job.entry.dtype), job.data, begin + at, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = at + i < n ? element<A>(job, begin + at + i) : A(0);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const A y = product(values[i], job.has_signs, signs >> i & 1u);
      sum += y;
      if (kColumns) columns[j][i] += y;
    }
  }
  return sum;
}

// A row is a thread's.
template <class A, class O>
__device__ inline void short_rows(const Job<O>& job) {
  const int64_t length = job.item.e1;
  for (int64_t r = job.item.r0 + threadIdx.x; r < job.item.r1; r += kThreads) {
    A sum = 0;
    int64_t block = -1;
    Words words{};
    for (int64_t f = r * length; f < (r + 1) * length; ++f) {
      if (job.has_signs && f / 128 != block) {
        block = f / 128;
        words = philox(uint32_t(block), job.counter);
      }
      const int word = int(f % 128) / 32;  // chosen by comparison: an index would put the words into memory
      const uint32_t bits = word == 0 ? words.w[0] : word == 1 ? words.w[1] : word == 2 ? words.w[2] : words.w[3];
      sum += product(element<A>(job, f), job.has_signs, bits >> (f % 32) & 1u);
    }
    finish_row(job, r, O(sum));
  }
}

// A row, or 1024 elements of it, is a warp's; columns stay in registers until the item is through.
template <class A, class O>
__device__ inline void warp_rows(const Job<O>& job, uint32_t* words, O* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t length = job.entry.channels * job.entry.inner;
  const int width = int(job.item.e1 - job.item.e0);
  A columns[kQuads<A>][4] = {};
  for (int64_t r = job.item.r0 + warp; r < job.item.r1; r += kWarps) {
    const A sum = sum_of_warp(add_strip<true>(job, r * length + job.item.e0, width, words, columns));
    if (lane == 0 && job.entry.row_start >= 0) finish_row(job, r, O(sum));
  }
  if (job.entry.column_start < 0) return;
  for (int turn = 0; turn < kWarps; ++turn) {  // the warps' sums, one warp after another
    if (turn == warp) {
#pragma unroll
      for (int j = 0; j < kQuads<A>; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 128 * j + 4 * lane + i;
          room[at] = (turn == 0 ? O(0) : room[at]) + O(columns[j][i]);
        }
      }
    }
    __syncthreads();
  }
  const int64_t inner = job.entry.inner, first = job.item.e0 / inner, last = (job.item.e1 - 1) / inner;
  for (int64_t c = first + threadIdx.x; c <= last; c += kThreads) {
    const int64_t begin = c * inner > job.item.e0 ? c * inner : job.item.e0;
    const int64_t end = (c + 1) * inner < job.item.e1 ? (c + 1) * inner : job.item.e1;
    O sum = 0;
    for (int64_t e = begin; e < end; ++e) sum += room[e - job.item.e0];
    if (job.item.column_sums < 0) {
      add_to_result(job, job.entry.column_start + c, sum);
    } else {
      job.partials[job.item.column_sums + c - first] = sum;
    }
  }
}

// A row, or 32768 elements of it, is the block's.
template <class A, class O>
__device__ inline void block_rows(const Job<O>& job, uint32_t* words, O* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t length = job.entry.channels * job.entry.inner;
  A unused[kQuads<A>][4];
  for (int64_t r = job.item.r0; r < job.item.r1; ++r) {
    A sum = 0;
    for (int64_t e = job.item.e0 + warp * kStrip<A>; e < job.item.e1; e += kWarps * kStrip<A>) {
      const int n = int(job.item.e1 - e < kStrip<A> ? job.item.e1 - e : kStrip<A>);
      sum += add_strip<false>(job, r * length + e, n, words, unused);
    }
    sum = sum_of_warp(sum);
    __syncthreads();  // room may still be read from the row before
    if (lane == 0) room[warp] = O(sum);
    __syncthreads();
    if (threadIdx.x == 0) {
      O total = 0;
      for (int w = 0; w < kWarps; ++w) total += room[w];
      finish_row(job, r, total);
    }
  }
}

template <class A, class O>
__device__ inline void run_item(const Job<O>& job, uint32_t* words, O* room) {
  const int64_t length = job.entry.channels * job.entry.inner;
  const bool has_columns = job.entry.column_start >= 0;
  if (!has_columns && length <= kShortRow) return short_rows<A>(job);
  if (!has_columns && length > kStrip<A>) return block_rows<A>(job, words, room);
  warp_rows<A>(job, words, room);
}

// The partial sums of one entry, in the order of its items: row blocks, each a run of element ranges.
template <class O>
__device__ inline void combine(const Job<O>& job, const ReduceItem* first, const ReduceItem* last) {
  const volatile O* partials = job.partials;  // written by other blocks: never from a cache of this one
  const int64_t length = job.entry.channels * job.entry.inner, width = first->e1 - first->e0;
  const int64_t ranges = (length + width - 1) / width, blocks = (last - first) / ranges;
  if (first->row_sums >= 0) {
    const int64_t rows = first->r1 - first->r0;
    for (int64_t r = threadIdx.x; r < job.entry.rows; r += kThreads) {
      O sum = 0;
      const ReduceItem* item = first + r / rows * ranges;
      for (int64_t i = 0; i < ranges; ++i, ++item) sum += partials[item->row_sums + r - item->r0];
      add_to_result(job, job.entry.row_start + r, sum);
    }
  }
  if (first->column_sums >= 0) {
    const int64_t inner = job.entry.inner;
    for (int64_t c = threadIdx.x; c < job.entry.channels; c += kThreads) {
      const int64_t from = c * inner / width, to = ((c + 1) * inner - 1) / width;
      O sum = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t i = from; i <= to; ++i) {
          const ReduceItem& item = first[b * ranges + i];
          sum += partials[item.column_sums + c - item.e0 / inner];
        }
      }
      add_to_result(job, job.entry.column_start + c, sum);
    }
  }
}

template <class O>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(ReduceTable table, ReduceAddresses addresses, bool has_signs, uint64_t seed, uint32_t probe, O alpha,
                  O* out, O* partials, int* bad) {
  SHARED(uint32_t, words, kWarps * (4 * kStripBlocks + 1));  // one past: four_signs reads two words
  SHARED(O, room, kStrip<float>);
  SHARED(int, is_last, 1);
  const ReduceItem& item = table.items[table.first_item + blockIdx.x];
  const ReduceEntry& entry = table.entries[item.entry];
  const void* data = addresses.data[entry.tensor - addresses.first_tensor];
  if (data == nullptr) return;  // the whole block
  const bool is_double = entry.dtype == int(Dtype::kF64), is_half = entry.dtype >= int(Dtype::kF16);
  const int quad_bytes = is_half ? alignof(Quad<__half>) : alignof(Quad<float>);
  const bool is_aligned = entry.last_channels == 0 && entry.channels * entry.inner % 4 == 0 &&
                          reinterpret_cast<uintptr_t>(data) % quad_bytes == 0;
  const Counter counter{uint32_t(seed), uint32_t(seed >> 32), uint32_t(entry.id), probe};
  const Job<O> job{entry, item, data, counter, has_signs, is_aligned, alpha, out, partials, bad + entry.tensor};
  uint32_t* own_words = words + (threadIdx.x / 32) * (4 * kStripBlocks + 1);
  if constexpr (std::is_same<O, double>::value) {
    if (is_double) {
      run_item<double>(job, own_words, room);
    } else {
      run_item<float>(job, own_words, room);
    }
  } else {
    run_item<float>(job, own_words, room);
  }
  const int64_t first = table.entry_starts[item.entry], last = table.entry_starts[item.entry + 1];
  if (item.row_sums < 0 && item.column_sums < 0) return;  // nothing waits, in no item of this entry
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last[0] = atomicAdd(table.arrived + item.entry, 1) == int(last - first) - 1;
    if (is_last[0]) table.arrived[item.entry] = 0;  // for the next launch
  }
  __syncthreads();
  if (!is_last[0]) return;
  __threadfence();
  combine(job, table.items + first, table.items + last);
}

// ---- probes ----

template <class T>
__device__ inline void fill(const SignTensor& tensor, int64_t begin, bool add, double alpha, const uint32_t* words,
                            bool aligned) {
  using A = compute_t<T>;
  T* x = static_cast<T*>(tensor.data);
  const int lane = threadIdx.x % 32;
  for (int j = 0; j < kBlockElements / 128; ++j) {
    const int64_t f = begin + 128 * j + 4 * lane;
    const uint32_t signs = words[4 * j + lane / 8] >> 4 * (lane % 8);
    if (aligned && f + 4 <= tensor.numel) {
      Quad<T>* at = reinterpret_cast<Quad<T>*>(x + f);
      Quad<T> quad{};
      if (add) quad = *at;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const A step = signs >> i & 1u ? -A(alpha) : A(alpha);
        quad.v[i] = from_compute<T>(add ? to_compute(quad.v[i]) + step : step);
      }
      *at = quad;
      continue;
    }
    for (int i = 0; i < 4; ++i) {
      if (f + i >= tensor.numel) break;
      T* at = x + (tensor.channels > 0 ? last_offset(f + i, tensor.channels, tensor.inner) : f + i);
      const A step = signs >> i & 1u ? -A(alpha) : A(alpha);
      *at = from_compute<T>(add ? to_compute(*at) + step : step);
    }
  }
}

constexpr int kMostSignTensors = 64;
struct SignTensors {  // a kernel's parameters may hold 4096 bytes
  SignTensor tensors[kMostSignTensors];
  int first_blocks[kMostSignTensors + 1];
  int count;
};

// A block takes 8 * 4096 elements of one tensor.
__global__ void __launch_bounds__(kThreads)
    rademacher_kernel(SignTensors all, uint64_t seed, uint32_t probe, bool add, double alpha) {
  SHARED(uint32_t, words, kWarps * 128);
  int which = 0;
  while (int(blockIdx.x) >= all.first_blocks[which + 1]) ++which;
  const SignTensor& tensor = all.tensors[which];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t turn = int64_t(int(blockIdx.x) - all.first_blocks[which]) * kWarps + warp;
  const int64_t begin = turn * kBlockElements;
  if (begin >= tensor.numel) return;  // the whole warp, and no barrier of the block follows
  uint32_t* own = words + warp * 128;
  const Words made = philox(uint32_t(begin / 128 + lane), {uint32_t(seed), uint32_t(seed >> 32), tensor.id, probe});
#pragma unroll
  for (int i = 0; i < 4; ++i) own[4 * lane + i] = made.w[i];
  __syncwarp();
  const auto address = reinterpret_cast<uintptr_t>(tensor.data);
  const bool is_plain = tensor.channels == 0;
  switch (tensor.dtype) {
    case Dtype::kF32:
      return fill<float>(tensor, begin, add, alpha, own, is_plain && address % alignof(Quad<float>) == 0);
    case Dtype::kF64:
      return fill<double>(tensor, begin, add, alpha, own, is_plain && address % alignof(Quad<double>) == 0);
    case Dtype::kF16:
      return fill<__half>(tensor, begin, add, alpha, own, is_plain && address % alignof(Quad<__half>) == 0);
    case Dtype::kBF16:
      return fill<__nv_bfloat16>(tensor, begin, add, alpha, own, is_plain && address % alignof(Quad<__half>) == 0);
  }
}

// ---- channels ----

template <class A>
__global__ void channel_sums_kernel(ChannelSums args) {
  const A* x = static_cast<const A*>(args.x);
  const A* scale = static_cast<const A*>(args.scale);
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= args.num_channels) return;
  A total = 0;
  for (int64_t j = args.channel_starts[c]; j < args.channel_starts[c + 1]; ++j) {
    const int64_t cell = args.cell_ids[j];
    A sum = 0;
    for (int64_t i = args.cell_starts[cell]; i < args.cell_starts[cell + 1]; ++i) sum += x[args.index[i]];
    total += scale == nullptr ? sum : scale[cell] * sum;
  }
  static_cast<A*>(args.out)[c] = total;
}

template <class O>
void reduce(const HutchinsonReduce& args, const ReduceTable& table, const ReduceAddresses& addresses, void* stream) {
  launch(reduce_kernel<O>, dim3(unsigned(table.num_items)), dim3(kThreads), stream, table, addresses, args.has_signs,
         args.seed, args.probe, O(args.alpha), static_cast<O*>(args.out), static_cast<O*>(table.partials), args.bad);
}

}  // namespace

void hutchinson_reduce_cuda(const HutchinsonReduce& args, const ReduceTable& whole, void* stream) {
  // Addresses are new for every probe and go as kernel parameters: one launch for kMostTensors tensors.
  for (int64_t i = 0; i < whole.num_items;) {
    ReduceAddresses addresses{};
    ReduceTable part = whole;
    part.first_item = whole.first_item + i;
    const int64_t first = whole.item_tensors[part.first_item];
    while (i < whole.num_items && whole.item_tensors[whole.first_item + i] < first + kMostTensors) ++i;
    part.num_items = whole.first_item + i - part.first_item;
    addresses.first_tensor = first;
    bool is_there = false;
    for (int64_t t = first; t < std::min(first + kMostTensors, args.num_tensors); ++t) {
      addresses.data[t - first] = args.data[t];
      is_there |= args.data[t] != nullptr;
    }
    if (!is_there) continue;
    if (args.is_double) {
      reduce<double>(args, part, addresses, stream);
    } else {
      reduce<float>(args, part, addresses, stream);
    }
  }
}

void rademacher_cuda(const Rademacher& args, void* stream) {
  for (int64_t done = 0; done < args.count; done += kMostSignTensors) {
    SignTensors some{};
    some.count = int(std::min<int64_t>(kMostSignTensors, args.count - done));
    constexpr int64_t kElements = int64_t(kWarps) * kBlockElements;
    for (int i = 0; i < some.count; ++i) {
      some.tensors[i] = args.tensors[done + i];
      some.first_blocks[i + 1] = some.first_blocks[i] + int((some.tensors[i].numel + kElements - 1) / kElements);
    }
    const int blocks = some.first_blocks[some.count];
    if (blocks == 0) continue;
    launch(rademacher_kernel, dim3(unsigned(blocks)), dim3(kThreads), stream, some, args.seed, args.probe, args.add,
           args.add ? args.alpha : 1.0);
  }
}

void channel_sums_cuda(const ChannelSums& args, void* stream) {
  if (args.num_channels == 0) return;
  const dim3 grid(unsigned((args.num_channels + 127) / 128)), block(128);
  if (args.is_double) {
    launch(channel_sums_kernel<double>, grid, block, stream, args);
  } else {
    launch(channel_sums_kernel<float>, grid, block, stream, args);
  }
}

}  // namespace cpd
