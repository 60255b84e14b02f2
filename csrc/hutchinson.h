// Rademacher probes and their sums against Hessian-vector products; the frozen layout of signs is in
// cpd_fast/ops/_philox.py.
#pragma once
#include <cstdint>
#include <vector>

#include "channel_kl.h"

namespace cpd {

// One tensor of a probe. In memory it is contiguous, or (rows, inner, channels) where channels > 0: channels last.
struct SignTensor {
  Dtype dtype;
  void* data;
  int64_t numel;
  int64_t channels, inner;
  uint32_t id;
};

// data = v, or data += alpha * v.
struct Rademacher {
  const SignTensor* tensors;
  int64_t count;
  uint64_t seed;
  uint32_t probe;
  bool add;
  double alpha;
  int num_threads;
};

// fp32 tensors move by step * v, and back to the bits they had: lost has a byte an element, of all tensors one after
// the other. Every x must be +0 or have |x| >= step / 16: then x and (x + step * v) - step * v are within 35 of each
// other as integers. is_away = 1 once all have moved, 0 once all are back.
struct ReversibleStep {
  const SignTensor* tensors;
  int64_t count;
  uint64_t seed;
  uint32_t probe;
  float step;
  bool back;
  int8_t* lost;
  int32_t* is_away;
  int num_threads;
};

// Which of x are neither +0 nor as large as ReversibleStep needs; ends soon after there are more than `most`.
struct SmallElements {
  const float* x;
  int64_t numel;
  float step;
  int64_t most;
  std::vector<int64_t>* found;
};

// A tensor seen as (rows, channels, inner), row-major, and where its sums go: -1 where they are not wanted. Exactly
// what cpd_fast/ops/hutchinson.py writes. last_channels > 0: the tensor itself is (n, last_inner, last_channels) in
// memory.
struct ReduceEntry {
  int64_t tensor, id, rows, channels, inner, row_start, column_start, dtype, last_channels, last_inner;
};

// out[row_start + r] += alpha * sum over channels and inner, out[column_start + c] += alpha * sum over rows and inner,
// of v * data, or of data * data without signs. bad[tensor] = 1 where a sum is not finite.
struct HutchinsonReduce {
  const ReduceEntry* entries;
  int64_t num_entries;
  const void* const* data;  // one a tensor, null where absent
  int64_t num_tensors;
  bool has_signs;
  uint64_t seed;
  uint32_t probe;
  double alpha;
  void* out;  // fp64 if is_double, else fp32
  bool is_double;
  int32_t* bad;
  int num_threads;
};

// out[c] = sum over the cells of channel c, in their order, of scale[cell] * sum of x[index] over the cell's entries.
// CSR twice: channel c has cell_ids[channel_starts[c] : channel_starts[c + 1]], cell i has
// index[cell_starts[i] : cell_starts[i + 1]].
struct ChannelSums {
  const int64_t* channel_starts;
  const int64_t* cell_ids;
  const int64_t* cell_starts;
  const int64_t* index;
  int64_t num_channels;
  const void* x;      // fp64 if is_double, else fp32
  const void* scale;  // null: ones
  void* out;
  bool is_double;
  int num_threads;
};

// What a block of the GPU takes: rows [r0, r1), elements [e0, e1) of each, of one entry; where its partial sums of rows
// and columns lie, -1 where they are not wanted or go straight to the result.
struct ReduceItem {
  int64_t entry, r0, r1, e0, e1, row_sums, column_sums;
};

// Made once by cpd_fast/ops/_gpu_table.py, and kept on the GPU (but for item_tensors). Items are in the order of
// entries; those of one entry are a grid: blocks of rows times ranges of elements.
struct ReduceTable {
  const ReduceEntry* entries;
  const ReduceItem* items;
  const int64_t* entry_starts;  // items of entry i: [entry_starts[i], entry_starts[i + 1])
  const int64_t* item_tensors;  // on the host: which tensor each item is of
  int64_t first_item, num_items;
  void* partials;    // fp64 if is_double, else fp32
  int32_t* arrived;  // one an entry, zero; zero again after every launch
};

constexpr int kMostTensors = 440;  // of one launch: a kernel's parameters hold 4096 bytes
struct ReduceAddresses {
  int64_t first_tensor;
  const void* data[kMostTensors];
};

void rademacher(const Rademacher& args);
void reversible_step(const ReversibleStep& args);
void small_elements(const SmallElements& args);
void hutchinson_reduce(const HutchinsonReduce& args);
void channel_sums(const ChannelSums& args);

// The same on a GPU: pointers are the device's (args.entries is not used), stream is a cudaStream_t.
void rademacher_cuda(const Rademacher& args, void* stream);
void hutchinson_reduce_cuda(const HutchinsonReduce& args, const ReduceTable& table, void* stream);
void channel_sums_cuda(const ChannelSums& args, void* stream);

}  // namespace cpd
