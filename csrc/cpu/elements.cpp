// Elements named by lists of rows and columns move between a tensor and a smaller one in one pass.
#include "elements.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace cpd {
namespace CPD_ISA {
namespace {

struct Bytes16 {
  uint64_t low, high;
};

// Listed columns of one row. kInner: elements a column if known, else 0.
template <class T, int kInner, bool kOut>
void move_row(T* whole, T* part, const std::vector<int64_t>& columns, int64_t inner) {
  const int64_t n = kInner ? kInner : inner;
  for (const int64_t column : columns) {
    T* const at = whole + column * n;
    if (kOut) {
      std::copy_n(at, n, part);
    } else {
      std::copy_n(part, n, at);
    }
    part += n;
  }
}

template <class T>
struct Mover {
  const Elements& a;
  int64_t whole_row = a.middle * a.full_columns * a.inner, part_row = a.middle * a.num_columns * a.inner;
  std::vector<int64_t> columns{};
  std::vector<int64_t> slots{};  // kPut: the row of the part for every row of the whole, or -1

  void prepare() {
    if (a.columns) columns.assign(a.columns, a.columns + a.num_columns);
    if (a.move != Move::kPut) return;
    slots.assign(size_t(a.full_rows), -1);
    for (int64_t r = 0; r < a.num_rows; ++r) slots[size_t(a.rows ? a.rows[r] : r)] = r;
  }

  void run() {
    prepare();
    const int64_t count = a.move == Move::kPut ? a.full_rows : a.num_rows;
    const bool is_large = count * part_row > (1 << 17);
#pragma omp parallel for schedule(static) num_threads(a.num_threads) if (is_large && a.num_threads > 1)
    for (int64_t i = 0; i < count; ++i) {
      if (a.move == Move::kPut) {
        put(slots[size_t(i)], i);
      } else {
        row(i, a.rows ? a.rows[i] : i);
      }
    }
  }

  void put(int64_t r, int64_t at) const {
    if (r < 0 || a.columns) {
      std::memset(static_cast<T*>(a.whole) + at * whole_row, 0, sizeof(T) * size_t(whole_row));
    }
    if (r >= 0) row(r, at);
  }

  void row(int64_t r, int64_t at) const {
    T* whole = static_cast<T*>(a.whole) + at * whole_row;
    T* part = static_cast<T*>(a.part) + r * part_row;
    const bool is_out = a.move == Move::kTake;
    if (!a.columns) {
      std::memcpy(is_out ? part : whole, is_out ? whole : part, sizeof(T) * size_t(whole_row));
      return;
    }
    for (int64_t m = 0; m < a.middle; ++m, whole += a.full_columns * a.inner, part += a.num_columns * a.inner) {
      if (is_out) {
        take_row(whole, part);
      } else {
        write_row(whole, part);
      }
    }
  }

  void take_row(T* whole, T* part) const {
    const auto run = a.inner == 1 ? move_row<T, 1, true> : a.inner == 9 ? move_row<T, 9, true> : move_row<T, 0, true>;
    run(whole, part, columns, a.inner);
  }

  void write_row(T* whole, T* part) const {
    const auto run = a.inner == 1   ? move_row<T, 1, false>
                     : a.inner == 9 ? move_row<T, 9, false>
                                    : move_row<T, 0, false>;
    run(whole, part, columns, a.inner);
  }
};

}  // namespace

void elements(const Elements& args) {
  switch (args.size) {
    case 1:
      return Mover<uint8_t>{args}.run();
    case 2:
      return Mover<uint16_t>{args}.run();
    case 4:
      return Mover<uint32_t>{args}.run();
    case 8:
      return Mover<uint64_t>{args}.run();
    default:
      return Mover<Bytes16>{args}.run();
  }
}

}  // namespace CPD_ISA
}  // namespace cpd
