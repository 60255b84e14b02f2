// The CUDA bodies of rademacher, hutchinson_reduce and channel_sums behind a C interface, for
// tests/ops/test_hutchinson_bodies.py.
#include <vector>

#include "../../csrc/cuda/hutchinson.cu"
#include "cases.h"
#include "guarded.h"

// numbers: dtype, address, numel, channels, inner, id of each tensor.
extern "C" const char* rademacher(const int64_t* numbers, int64_t count, uint64_t seed, unsigned probe, int add,
                                  double alpha) {
  return host_model::guarded([&] {
    std::vector<cpd::SignTensor> tensors;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t* n = numbers + 6 * i;
      tensors.push_back({cpd::Dtype(n[0]), reinterpret_cast<void*>(n[1]), n[2], n[3], n[4], uint32_t(n[5])});
    }
    cpd::rademacher_cuda({tensors.data(), count, seed, probe, add != 0, alpha, 1}, nullptr);
  });
}

// table: entries, items, entry_starts, item_tensors, first_item, num_items, partials, arrived.
extern "C" const char* hutchinson_reduce(const int64_t* table, const void* const* data, int64_t num_tensors,
                                         int has_signs, uint64_t seed, unsigned probe, double alpha, void* out,
                                         int is_double, int* bad) {
  return host_model::guarded([&] {
    cpd::HutchinsonReduce args{};
    args.data = data;
    args.num_tensors = num_tensors;
    args.has_signs = has_signs != 0;
    args.seed = seed;
    args.probe = probe;
    args.alpha = alpha;
    args.out = out;
    args.is_double = is_double != 0;
    args.bad = bad;
    cpd::hutchinson_reduce_cuda(
        args,
        {reinterpret_cast<const cpd::ReduceEntry*>(table[0]), reinterpret_cast<const cpd::ReduceItem*>(table[1]),
         reinterpret_cast<const int64_t*>(table[2]), reinterpret_cast<const int64_t*>(table[3]), table[4], table[5],
         reinterpret_cast<void*>(table[6]), reinterpret_cast<int*>(table[7])},
        nullptr);
  });
}

extern "C" const char* channel_sums(const int64_t* channel_starts, const int64_t* cell_ids, const int64_t* cell_starts,
                                    const int64_t* index, int64_t num_channels, const void* x, const void* scale,
                                    void* out, int is_double) {
  return host_model::guarded([&] {
    cpd::channel_sums_cuda(
        {channel_starts, cell_ids, cell_starts, index, num_channels, x, scale, out, is_double != 0, 1}, nullptr);
  });
}

namespace {

// One fp32 tensor as the table that Python would make of it, with blocks of `block_rows` rows and ranges of `width`
// elements, and no partial sum more than needed. `missing`: that many elements short of the result.
void reduce(int64_t rows, int64_t channels, int64_t inner, bool has_columns, int64_t block_rows, int64_t width,
            size_t missing = 0) {
  const int64_t length = channels * inner;
  std::vector<float> data(size_t(rows * length), 1.0f);
  const std::vector<cpd::ReduceEntry> entries{{0, 3, rows, channels, inner, 0, has_columns ? rows : -1, 0, 0, 0}};
  std::vector<cpd::ReduceItem> items;
  int64_t partials = 0;
  for (int64_t r = 0; r < rows; r += block_rows) {
    for (int64_t e = 0; e < length; e += width) {
      cpd::ReduceItem item{0, r, std::min(rows, r + block_rows), e, std::min(length, e + width), -1, -1};
      if (width < length) {
        item.row_sums = partials;
        partials += item.r1 - item.r0;
      }
      if (has_columns && (block_rows < rows || width < length)) {
        item.column_sums = partials;
        partials += (item.e1 - 1) / inner + 1 - item.e0 / inner;
      }
      items.push_back(item);
    }
  }
  const std::vector<int64_t> starts{0, int64_t(items.size())}, tensors(items.size(), 0);
  std::vector<float> sums(static_cast<size_t>(partials)), out(size_t(rows + (has_columns ? channels : 0)) - missing);
  std::vector<int> arrived(1), bad(1);
  const void* address = data.data();
  const int64_t table[] = {
      int64_t(entries.data()), int64_t(items.data()), int64_t(starts.data()), int64_t(tensors.data()), 0,
      int64_t(items.size()),   int64_t(sums.data()),  int64_t(arrived.data())};
  host_model::stop_on(hutchinson_reduce(table, &address, 1, 1, 5, 6, 1.0, out.data(), 0, bad.data()));
  host_model::stop_on(arrived[0] ? "the counter is not zero again" : nullptr);
}

void fill(int64_t numel, int64_t channels, int64_t inner, int add) {
  std::vector<float> data(size_t(numel), 1.0f);
  const int64_t numbers[] = {0, int64_t(data.data()), numel, channels, inner, 1};
  host_model::stop_on(rademacher(numbers, 1, 7, 8, add, 0.5));
}

}  // namespace

CASE(short_rows) {
  reduce(300, 1, 9, false, 200, 9);
}
CASE(warp_rows) {
  reduce(20, 37, 1, true, 20, 37);
  reduce(20, 12, 4, true, 8, 48);  // two blocks share the columns
}
CASE(ranges) {
  reduce(9, 3, 431, true, 9, 1024);
}
CASE(block_rows) {
  reduce(2, 1, 1500, false, 1, 1500);
  reduce(1, 1, 9001, false, 1, 8192);
}
CASE(fill) {
  fill(300, 0, 0, 0);
  fill(4 * 30, 10, 3, 1);
}
CASE(channels) {
  const int64_t channel_starts[] = {0, 2, 2, 3}, cell_ids[] = {0, 2, 1}, cell_starts[] = {0, 2, 3, 4};
  const int64_t index[] = {0, 1, 2, 3};
  const float x[] = {1, 2, 3, 4}, scale[] = {1, 10, 100};
  std::vector<float> out(3);
  host_model::stop_on(channel_sums(channel_starts, cell_ids, cell_starts, index, 3, x, scale, out.data(), 0));
  host_model::stop_on(out[0] == 403 && out[1] == 0 && out[2] == 30 ? nullptr : "wrong sums");
}
FAULT(short_result) {
  reduce(20, 37, 1, true, 20, 37, 1);
}
