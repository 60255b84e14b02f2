// Rademacher probes, and their sums against Hessian-vector products over the rows and columns of many tensors.
//
// Tensors go by in chunks of logical order: the signs of a chunk are made in L1, applied on the way from memory to L1,
// and what results is added to rows and columns. Work is cut into items by the shapes alone, every item leaves partial
// sums of its own, and these are added in order: the same bits for any number of threads.
#include "hutchinson.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/logical.h"
#include "cpu/philox.h"
#include "cpu/signed_sums.h"
#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kItemElements = 1 << 18, kItemWidth = 1 << 14, kItemRows = 1 << 14;
constexpr int64_t kColumnElements = 1 << 20, kColumnRows = 512;  // with columns, which cost an item a pass; in fp32
constexpr int64_t kShort = 128;                                  // rows up to this long are summed sixteen at a time

// y = v * x for elements [begin, end); x and y start at element begin.
inline void apply(const Signs& signs, int64_t begin, int64_t end, const float* x, float* y) {
  each_sign(
      signs, begin, end,
      [&](uint32_t word, int64_t i) {
#pragma omp simd
        for (int j = 0; j < 32; ++j) y[i + j] = flip(x[i + j], word << (31 - j) & 0x80000000u);
      },
      [&](uint32_t bit, int64_t i) { y[i] = flip(x[i], bit << 31); });
}
inline void apply(const Signs& signs, int64_t begin, int64_t end, const double* x, double* y) {
  each_sign(
      signs, begin, end,
      [&](uint32_t word, int64_t i) {
        for (int j = 0; j < 32; ++j) y[i + j] = word >> j & 1u ? -x[i + j] : x[i + j];
      },
      [&](uint32_t bit, int64_t i) { y[i] = bit ? -x[i] : x[i]; });
}

inline float widen(float x) {
  return x;
}
inline double widen(double x) {
  return x;
}
inline float widen(half_t x) {
  return to_float(x);
}
inline float widen(bfloat_t x) {
  return to_float(x);
}

// ---- sums ----

template <class A>
struct Room {
  Signs signs;
  A chunk[kChunk + VectorOf<A>::kLanes], loaded[kChunk];
  std::vector<A> columns;
};

// One item: rows [r0, r1), elements [e0, e1) of each, of one entry; where its partial sums lie.
struct Item {
  int64_t entry, r0, r1, e0, e1, row_sums, column_sums;
};

inline int64_t first_channel(const ReduceEntry& entry, const Item& item) {
  return item.e0 / entry.inner;
}
inline int64_t num_channels(const ReduceEntry& entry, const Item& item) {
  return (item.e1 - 1) / entry.inner + 1 - first_channel(entry, item);
}

// Adds alpha times n sums to the result, from out[start] on.
template <class O>
void finish_as(const HutchinsonReduce& args, const ReduceEntry& entry, int64_t start, int64_t n, const double* sums) {
  O* out = static_cast<O*>(args.out) + start;
  const O alpha = O(args.alpha);
  O worst = 0;  // NaN where a sum is not finite
  for (int64_t i = 0; i < n; ++i) {
    const O sum = O(sums[i]);
    worst += sum * 0;
    out[i] += alpha * sum;
  }
  if (!std::isfinite(worst)) __atomic_store_n(args.bad + entry.tensor, 1, __ATOMIC_RELAXED);  // maybe by two items
}
void finish(const HutchinsonReduce& args, const ReduceEntry& entry, int64_t start, int64_t n, const double* sums) {
  args.is_double ? finish_as<double>(args, entry, start, n, sums) : finish_as<float>(args, entry, start, n, sums);
}

template <class T>
class ItemSum {
  using A = compute_t<T>;
  static constexpr int64_t kLanes = VectorOf<A>::kLanes;

 public:
  ItemSum(const HutchinsonReduce& args, const Item& item, Room<A>* room, double* partials)
      : args_(args),
        entry_(args.entries[item.entry]),
        item_(item),
        room_(*room),
        partials_(partials),
        x_(static_cast<const T*>(args.data[entry_.tensor])),
        length_(entry_.channels * entry_.inner) {}

  void run() {
    const int64_t width = item_.e1 - item_.e0, rows = item_.r1 - item_.r0;
    if (wants_columns()) room_.columns.assign(size_t(width) + kLanes, A(0));
    if (wants_rows()) std::fill_n(partials_ + item_.row_sums, rows, 0.0);
    if (width == length_) {
      range(item_.r0 * length_, item_.r1 * length_);
    } else {
      for (int64_t r = item_.r0; r < item_.r1; ++r) range(r * length_ + item_.e0, r * length_ + item_.e1);
    }
    if (wants_columns()) fold_columns();
    if (wants_rows() && width == length_) {
      finish(args_, entry_, entry_.row_start + item_.r0, rows, partials_ + item_.row_sums);
    }
  }

 private:
  bool wants_rows() const { return entry_.row_start >= 0; }
  bool wants_columns() const { return entry_.column_start >= 0; }

  bool is_short() const { return length_ <= kShort; }

  void range(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t stop = std::min(end, chunk_end(begin));
      add(values(begin, stop), begin, stop);
      begin = stop;
    }
  }
  int64_t chunk_end(int64_t begin) const {
    if (is_short()) return (begin / kBlock * kBlock + kChunk) / length_ * length_;  // whole rows
    return (begin / kChunk + 1) * kChunk;
  }

  // Elements [begin, end) in logical order, in the type that is computed in; and their signs.
  const A* values(int64_t begin, int64_t end) {
    if (args_.has_signs) {
      room_.signs.make(begin, end,
                       {uint32_t(args_.seed), uint32_t(args_.seed >> 32), uint32_t(entry_.id), args_.probe});
    }
    if (entry_.last_channels > 0) {
      each_last(begin, end, entry_.last_channels, entry_.last_inner,
                [&](int64_t offset, int64_t i) { room_.loaded[i] = widen(x_[offset]); });
      return room_.loaded;
    }
    return load(x_ + begin, room_.loaded, end - begin);
  }

  void add(const A* x, int64_t begin, int64_t end) {
    if (wants_columns()) {
      args_.has_signs ? add<true, true>(x, begin, end) : add<false, true>(x, begin, end);
    } else {
      args_.has_signs ? add<true, false>(x, begin, end) : add<false, false>(x, begin, end);
    }
  }

  template <bool kSigns, bool kColumns>
  void add(const A* x, int64_t begin, int64_t end) {
    double* rows = partials_ + item_.row_sums;
    int64_t r = begin / length_, e = begin - r * length_;
    if (is_short()) {
      const int64_t count = (end - begin) / length_;
      write_products(Products<kSigns, A>(x, room_.signs, begin), end - begin, room_.chunk);
      if (wants_rows()) add_row_sums(room_.chunk, count, length_, rows + (r - item_.r0));
      if (kColumns) add_columns(count);
      return;
    }
    for (int64_t at = begin; at < end; ++r, e = 0) {
      const int64_t n = std::min(length_ - e, end - at);
      A* columns = kColumns ? room_.columns.data() + (e - item_.e0) : nullptr;
      const double sum = sum_of<kColumns>(Products<kSigns, A>(x + (at - begin), room_.signs, at), n, columns);
      if (wants_rows()) rows[r - item_.r0] += sum;
      at += n;
    }
  }

  void add_columns(int64_t rows) {
    A* columns = room_.columns.data();
    for (int64_t r = 0; r < rows; ++r) {
      const A* y = room_.chunk + r * length_;
      for (int64_t e = 0; e < length_; ++e) columns[e] += y[e];
    }
  }

  void fold_columns() {
    double* to = partials_ + item_.column_sums;
    const A* from = room_.columns.data();
    const int64_t inner = entry_.inner;
    std::fill_n(to, num_channels(entry_, item_), 0.0);
    int64_t e = item_.e0;
    for (; e < item_.e1 && e % inner != 0; ++e) *to += double(*from++);  // of a channel that began in another item
    if (e > item_.e0) ++to;
    const int64_t whole = (item_.e1 - e) / inner;
    add_row_sums(from, whole, inner, to);
    for (e += whole * inner, from += whole * inner, to += whole; e < item_.e1; ++e) *to += double(*from++);
  }

  const HutchinsonReduce& args_;
  const ReduceEntry& entry_;
  const Item& item_;
  Room<A>& room_;
  double* partials_;
  const T* x_;
  const int64_t length_;
};

// Items of all entries whose tensor is there: a grid of row blocks times ranges of elements each; returns the number of
// partial sums.
int64_t plan(const HutchinsonReduce& args, std::vector<Item>* items) {
  int64_t partials = 0;
  for (int64_t i = 0; i < args.num_entries; ++i) {
    const ReduceEntry& entry = args.entries[i];
    if (args.data[entry.tensor] == nullptr) continue;
    const int64_t length = entry.channels * entry.inner, width = std::min(length, kItemWidth);
    const bool columns = entry.column_start >= 0;
    const int64_t most = columns ? kColumnRows : kItemRows;
    const int64_t rows = std::clamp<int64_t>((columns ? kColumnElements : kItemElements) / width, 1, most);
    for (int64_t r0 = 0; r0 < entry.rows; r0 += rows) {
      for (int64_t e0 = 0; e0 < length; e0 += width) {
        Item item{i, r0, std::min(entry.rows, r0 + rows), e0, std::min(length, e0 + width), partials, 0};
        if (entry.row_start >= 0) partials += item.r1 - r0;
        item.column_sums = partials;
        if (entry.column_start >= 0) partials += num_channels(entry, item);
        items->push_back(item);
      }
    }
  }
  return partials;
}

// The partial sums of one entry's items, in order, to the result: of columns, and of rows that items share.
void combine(const HutchinsonReduce& args, const Item* first, const Item* last, const double* partials,
             std::vector<double>* room) {
  const ReduceEntry& entry = args.entries[first->entry];
  if (entry.row_start >= 0 && first->e1 < entry.channels * entry.inner) {
    room->assign(size_t(entry.rows), 0.0);
    for (const Item* item = first; item < last; ++item) {
      for (int64_t r = item->r0; r < item->r1; ++r) (*room)[size_t(r)] += partials[item->row_sums + r - item->r0];
    }
    finish(args, entry, entry.row_start, entry.rows, room->data());
  }
  if (entry.column_start >= 0) {
    room->assign(size_t(entry.channels), 0.0);
    for (const Item* item = first; item < last; ++item) {
      double* to = room->data() + first_channel(entry, *item);
      const int64_t n = num_channels(entry, *item);
      for (int64_t c = 0; c < n; ++c) to[c] += partials[item->column_sums + c];
    }
    finish(args, entry, entry.column_start, entry.channels, room->data());
  }
}

void run_item(const HutchinsonReduce& args, const Item& item, Room<float>* room, Room<double>* wide, double* partials) {
  switch (Dtype(args.entries[item.entry].dtype)) {
    case Dtype::kF32:
      return ItemSum<float>(args, item, room, partials).run();
    case Dtype::kF64:
      return ItemSum<double>(args, item, wide, partials).run();
    case Dtype::kF16:
      return ItemSum<half_t>(args, item, room, partials).run();
    case Dtype::kBF16:
      return ItemSum<bfloat_t>(args, item, room, partials).run();
  }
}

// ---- probes ----

template <class T>
struct SignBits;  // 1.0 as an integer
template <>
struct SignBits<float> {
  using type = uint32_t;
  static constexpr type one = 0x3f800000u;
};
template <>
struct SignBits<double> {
  using type = uint64_t;
  static constexpr type one = 0x3ff0000000000000u;
};
template <>
struct SignBits<half_t> {
  using type = uint16_t;
  static constexpr type one = 0x3c00u;
};
template <>
struct SignBits<bfloat_t> {
  using type = uint16_t;
  static constexpr type one = 0x3f80u;
};

template <class T>
inline T sign_of(uint32_t bit) {
  using U = typename SignBits<T>::type;
  const U u = U(SignBits<T>::one | U(U(bit) << (8 * sizeof(U) - 1)));
  T x;
  std::memcpy(&x, &u, sizeof(T));
  return x;
}

template <class T>
inline void write_signs(const Signs& signs, int64_t begin, int64_t end, T* x) {
  each_sign(
      signs, begin, end,
      [&](uint32_t word, int64_t i) {
#pragma omp simd
        for (int j = 0; j < 32; ++j) x[i + j] = sign_of<T>(word >> j & 1u);
      },
      [&](uint32_t bit, int64_t i) { x[i] = sign_of<T>(bit); });
}

template <class T, class A>
inline T rounded(A x) {
  if constexpr (std::is_same_v<T, A>) {
    return x;
  } else {
    T y;
    from_float(x, &y);
    return y;
  }
}

template <class T>
void fill(const Rademacher& args, const SignTensor& tensor, int64_t begin, int64_t end, Room<compute_t<T>>* room) {
  using A = compute_t<T>;
  const Counter counter{uint32_t(args.seed), uint32_t(args.seed >> 32), tensor.id, args.probe};
  T* x = static_cast<T*>(tensor.data);
  const A alpha = A(args.alpha);
  for (; begin < end; begin = std::min(end, (begin / kChunk + 1) * kChunk)) {
    const int64_t stop = std::min(end, (begin / kChunk + 1) * kChunk), n = stop - begin;
    Signs& signs = room->signs;
    signs.make(begin, stop, counter);
    if (tensor.channels > 0) {
      each_last(begin, stop, tensor.channels, tensor.inner, [&](int64_t offset, int64_t i) {
        const uint32_t bit = signs.bit(begin + i);
        x[offset] = args.add ? rounded<T>(A(widen(x[offset]) + (bit ? -alpha : alpha))) : sign_of<T>(bit);
      });
    } else if (args.add) {
      std::fill_n(room->chunk, n, alpha);
      apply(signs, begin, stop, room->chunk, room->chunk);
      const A* before = load(x + begin, room->loaded, n);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) room->chunk[i] += before[i];
      store(x + begin, room->chunk, n);
    } else {
      write_signs(signs, begin, stop, x + begin);
    }
  }
}

void fill_part(const Rademacher& args, const SignTensor& tensor, int64_t begin, int64_t end, Room<float>* room,
               Room<double>* wide) {
  switch (tensor.dtype) {
    case Dtype::kF32:
      return fill<float>(args, tensor, begin, end, room);
    case Dtype::kF64:
      return fill<double>(args, tensor, begin, end, wide);
    case Dtype::kF16:
      return fill<half_t>(args, tensor, begin, end, room);
    case Dtype::kBF16:
      return fill<bfloat_t>(args, tensor, begin, end, room);
  }
}

template <class A>
void sum_channels(const ChannelSums& args) {
  const A* x = static_cast<const A*>(args.x);
  const A* scale = static_cast<const A*>(args.scale);
  A* out = static_cast<A*>(args.out);
#pragma omp parallel for num_threads(args.num_threads) if (args.num_threads > 1 && args.num_channels > 4096)
  for (int64_t c = 0; c < args.num_channels; ++c) {
    A total = 0;
    for (int64_t j = args.channel_starts[c]; j < args.channel_starts[c + 1]; ++j) {
      const int64_t cell = args.cell_ids[j];
      A sum = 0;
      for (int64_t i = args.cell_starts[cell]; i < args.cell_starts[cell + 1]; ++i) sum += x[args.index[i]];
      total += scale == nullptr ? sum : scale[cell] * sum;
    }
    out[c] = total;
  }
}

}  // namespace

void rademacher(const Rademacher& args) {
  const std::vector<Part> parts = parts_of(args.tensors, args.count);
  const int64_t count = int64_t(parts.size());
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1 && count > 1)
  {
    Room<float> room;
    Room<double> wide;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const Part& part = parts[size_t(i)];
      fill_part(args, args.tensors[part.tensor], part.begin, part.end, &room, &wide);
    }
  }
}

void hutchinson_reduce(const HutchinsonReduce& args) {
  static thread_local std::vector<Item> items;
  static thread_local std::vector<double> partials;
  items.clear();
  const int64_t size = plan(args, &items);
  if (int64_t(partials.size()) < size) partials.resize(size_t(size));
  std::vector<int64_t> firsts;  // of each entry's items
  const int64_t count = int64_t(items.size());
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || items[size_t(i)].entry != items[size_t(i) - 1].entry) firsts.push_back(i);
  }
  firsts.push_back(count);
  const Item* all = items.data();  // not the vectors: other threads have their own
  double* sums = partials.data();
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1 && count > 1)
  {
    Room<float> room;
    Room<double> wide;
    std::vector<double> totals;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) run_item(args, all[i], &room, &wide, sums);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(firsts.size()) - 1; ++i) {
      combine(args, all + firsts[size_t(i)], all + firsts[size_t(i) + 1], sums, &totals);
    }
  }
}

void channel_sums(const ChannelSums& args) {
  if (args.is_double) {
    sum_channels<double>(args);
  } else {
    sum_channels<float>(args);
  }
}

}  // namespace CPD_ISA
}  // namespace cpd
