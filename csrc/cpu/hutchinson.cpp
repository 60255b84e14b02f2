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

#include "cpu/philox.h"
#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kChunk = 2048;                                           // elements: 8 KiB of fp32, with their signs
constexpr int64_t kWords = (kChunk + 2 * kBlock) / 32 + 4 * kPhiloxLanes;  // a chunk may start inside a block
constexpr int64_t kItemElements = 1 << 18, kItemWidth = 1 << 14, kItemRows = 512;  // rows: fp32 columns stay exact
constexpr int64_t kFillElements = 1 << 16;

// The signs of elements [begin, end) of a tensor.
struct Signs {
  uint32_t words[kWords];
  int64_t base = 0;

  void make(int64_t begin, int64_t end, const Counter& counter) {
    base = begin / kBlock * kBlock;
    philox(base / kBlock, (end - base + kBlock - 1) / kBlock, counter, words);
  }
  const char* bytes(int64_t i) const { return reinterpret_cast<const char*>(words) + ((i - base) >> 3); }
  uint32_t bit(int64_t i) const { return words[(i - base) >> 5] >> ((i - base) & 31) & 1u; }
};

// Calls whole(word, i) for i = 0, 32, .. of whole words in [begin, end), single(bit, i) for what is left; i counts from
// begin.
template <class Whole, class Single>
inline void each_sign(const Signs& signs, int64_t begin, int64_t end, Whole whole, Single single) {
  int64_t i = begin;
  const int64_t aligned = std::min(end, (begin + 31) / 32 * 32);
  for (; i < aligned; ++i) single(signs.bit(i), i - begin);
  for (; i + 32 <= end; i += 32) whole(signs.words[(i - signs.base) >> 5], i - begin);
  for (; i < end; ++i) single(signs.bit(i), i - begin);
}

inline float flip(float x, uint32_t sign) {
  return as_float(as_bits(x) ^ sign);
}

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

// Visits logical elements [begin, end) of a channels-last tensor: visit(offset in memory, i), i counts from begin.
template <class Visit>
inline void each_last(int64_t begin, int64_t end, int64_t channels, int64_t inner, Visit visit) {
  const int64_t length = channels * inner;
  for (int64_t f = begin; f < end;) {
    const int64_t row = f / length, e = f - row * length, stop = std::min(end, (row + 1) * length);
    int64_t c = e / inner, k = e - c * inner;
    for (; f < stop; ++f) {
      visit(row * length + k * channels + c, f - begin);
      if (++k == inner) {
        k = 0;
        ++c;
      }
    }
  }
}

// ---- sums ----

template <class A>
struct Room {
  Signs signs;
  A chunk[kChunk], loaded[kChunk];
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

// A vector of 64 bytes, whatever the instruction set makes of it.
template <class A>
struct VectorOf {
  using Bits = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;
  typedef A Values __attribute__((vector_size(64)));
  typedef Bits Lanes __attribute__((vector_size(64)));
  static constexpr int64_t kLanes = 64 / sizeof(A);
  static constexpr int kTop = 8 * sizeof(A) - 1;

  static Values load(const A* x) {
    Values v;
    std::memcpy(&v, x, sizeof(v));
    return v;
  }
  static void store(A* x, Values v) { std::memcpy(x, &v, sizeof(v)); }
  // How far each lane's sign is from the top of a word whose bit `skip` is the first lane's.
  static Lanes shifts(int skip) {
    Lanes s{};
    for (int j = 0; j < kLanes; ++j) s[j] = Bits(kTop - skip - j);
    return s;
  }
  static Values flip(Values x, uint32_t word, Lanes shifts) {
    const Lanes signs = ((Lanes{} + Bits(word)) << shifts) & (Lanes{} + (Bits(1) << kTop));
    return reinterpret_cast<Values>(reinterpret_cast<Lanes>(x) ^ signs);
  }
  static A sum(Values v) {
    A a[kLanes];
    store(a, v);
    for (int64_t n = kLanes / 2; n > 0; n /= 2) {
      for (int64_t j = 0; j < n; ++j) a[j] += a[j + n];
    }
    return a[0];
  }
};

// The sum of v * x, or of x * x, over n values, the first of which is element `first`; with columns, each product is
// also added to its column on the way. Four vectors of sums: one would wait for the adder at every step.
template <bool kSigns, bool kColumns, class A>
inline double sum_of(const A* x, int64_t n, const Signs& signs, int64_t first, A* columns) {
  using V = VectorOf<A>;
  constexpr int64_t kLanes = V::kLanes;
  typename V::Values sums[4] = {};
  // Bytes of signs, and where the first sign lies in the first of them: the same for every vector.
  const char* bytes = signs.bytes(first);
  const typename V::Lanes shifts = V::shifts(int((first - signs.base) & 7));
  const auto step = [&](int64_t i, typename V::Values* sum) {
    typename V::Values y = V::load(x + i);
    if (kSigns) {
      uint32_t word;
      std::memcpy(&word, bytes + i / 8, 4);
      y = V::flip(y, word, shifts);
    } else {
      y *= y;
    }
    *sum += y;
    if (kColumns) V::store(columns + i, V::load(columns + i) + y);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    step(i, sums);
    step(i + kLanes, sums + 1);
    step(i + 2 * kLanes, sums + 2);
    step(i + 3 * kLanes, sums + 3);
  }
  for (; i + kLanes <= n; i += kLanes) step(i, sums);
  A total = n < kLanes ? A(0) : V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) {
    const A y = !kSigns ? x[i] * x[i] : signs.bit(first + i) ? -x[i] : x[i];
    total += y;
    if (kColumns) columns[i] += y;
  }
  return double(total);
}

template <class T>
class ItemSum {
  using A = compute_t<T>;

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
    const int64_t width = item_.e1 - item_.e0;
    if (wants_columns()) room_.columns.assign(size_t(width), A(0));
    if (wants_rows()) std::fill_n(partials_ + item_.row_sums, item_.r1 - item_.r0, 0.0);
    if (width == length_) {
      range(item_.r0 * length_, item_.r1 * length_);
    } else {
      for (int64_t r = item_.r0; r < item_.r1; ++r) range(r * length_ + item_.e0, r * length_ + item_.e1);
    }
    if (wants_columns()) fold_columns();
  }

 private:
  bool wants_rows() const { return entry_.row_start >= 0; }
  bool wants_columns() const { return entry_.column_start >= 0; }

  void range(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t stop = std::min(end, (begin / kChunk + 1) * kChunk);
      add(values(begin, stop), begin, stop);
      begin = stop;
    }
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
    // Hardware prefetchers stop at the end of a page.
    for (int64_t i = 0; i < end - begin; i += int64_t(64 / sizeof(T))) __builtin_prefetch(x_ + end + i, 0, 3);
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
    for (int64_t at = begin; at < end; ++r, e = 0) {
      const int64_t n = std::min(length_ - e, end - at);
      A* columns = kColumns ? room_.columns.data() + (e - item_.e0) : nullptr;
      const double sum = sum_of<kSigns, kColumns>(x + (at - begin), n, room_.signs, at, columns);
      if (wants_rows()) rows[r - item_.r0] += sum;
      at += n;
    }
  }

  void fold_columns() {
    double* to = partials_ + item_.column_sums;
    const A* from = room_.columns.data();
    if (entry_.inner == 1) {
      for (int64_t e = item_.e0; e < item_.e1; ++e) *to++ = double(*from++);
      return;
    }
    for (int64_t e = item_.e0; e < item_.e1;) {
      const int64_t stop = std::min(item_.e1, (e / entry_.inner + 1) * entry_.inner);
      double sum = 0;
      for (; e < stop; ++e) sum += double(*from++);
      *to++ = sum;
    }
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
    int64_t rows = std::max<int64_t>(1, kItemElements / width);
    if (entry.column_start >= 0) rows = std::min(rows, kItemRows);
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

// The partial sums of one entry's items, in order, to the result.
template <class O>
void combine(const HutchinsonReduce& args, const Item* first, const Item* last, const double* partials,
             std::vector<double>* room) {
  const ReduceEntry& entry = args.entries[first->entry];
  O* out = static_cast<O*>(args.out);
  bool is_finite = true;
  const auto finish = [&](int64_t start, int64_t n, const double* sums) {
    for (int64_t i = 0; i < n; ++i) {
      const O sum = O(sums[i]);
      is_finite &= bool(std::isfinite(sum));
      out[start + i] += O(args.alpha) * sum;
    }
  };
  if (entry.row_start >= 0) {
    room->assign(size_t(entry.rows), 0.0);
    for (const Item* item = first; item < last; ++item) {
      for (int64_t r = item->r0; r < item->r1; ++r) (*room)[size_t(r)] += partials[item->row_sums + r - item->r0];
    }
    finish(entry.row_start, entry.rows, room->data());
  }
  if (entry.column_start >= 0) {
    room->assign(size_t(entry.channels), 0.0);
    for (const Item* item = first; item < last; ++item) {
      double* to = room->data() + first_channel(entry, *item);
      const int64_t n = num_channels(entry, *item);
      for (int64_t c = 0; c < n; ++c) to[c] += partials[item->column_sums + c];
    }
    finish(entry.column_start, entry.channels, room->data());
  }
  if (!is_finite) __atomic_store_n(args.bad + entry.tensor, 1, __ATOMIC_RELAXED);  // maybe by two entries
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
  struct Part {
    int64_t tensor, begin;
  };
  std::vector<Part> parts;
  for (int64_t i = 0; i < args.count; ++i) {
    for (int64_t begin = 0; begin < args.tensors[i].numel; begin += kFillElements) parts.push_back({i, begin});
  }
  const int64_t count = int64_t(parts.size());
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1 && count > 1)
  {
    Room<float> room;
    Room<double> wide;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const SignTensor& tensor = args.tensors[parts[size_t(i)].tensor];
      const int64_t begin = parts[size_t(i)].begin;
      fill_part(args, tensor, begin, std::min(tensor.numel, begin + kFillElements), &room, &wide);
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
      const Item *first = all + firsts[size_t(i)], *last = all + firsts[size_t(i) + 1];
      if (args.is_double) {
        combine<double>(args, first, last, sums, &totals);
      } else {
        combine<float>(args, first, last, sums, &totals);
      }
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
