// Some elements of a tensor, given by lists of rows and columns: taken out, or put back.
#pragma once
#include <cstdint>

namespace cpd {

enum class Move { kTake, kWrite, kPut };  // kPut clears what no list names

// The whole is (full_rows, middle, full_columns, inner), the part (num_rows, middle, num_columns, inner); both are
// contiguous, of elements of `size` bytes (1, 2, 4, 8 or 16). Lists increase; where rows or columns is null it is all.
struct Elements {
  Move move;
  void *whole, *part;
  const int64_t *rows, *columns;
  int64_t num_rows, num_columns, full_rows, middle, full_columns, inner, size;
  int num_threads;
};

void elements(const Elements& args);

}  // namespace cpd
