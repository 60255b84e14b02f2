// The binding of csrc/elements.h: addresses and sizes in, as cpd_fast/ops/elements.py makes them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "elements.h"

namespace py = pybind11;

namespace {

// What Python has checked already; here only what would read or write wild memory.
void elements(int move, const std::array<uintptr_t, 4>& p, const std::array<int64_t, 7>& s, int num_threads) {
  const auto require = [](bool is_right, const char* what) {
    if (!is_right) throw std::invalid_argument(std::string("elements: ") + what);
  };
  require(0 <= move && move <= 2, "move must be 0, 1 or 2");
  require(num_threads >= 1, "num_threads must be >= 1");
  require(s[6] == 1 || s[6] == 2 || s[6] == 4 || s[6] == 8 || s[6] == 16, "elements must have 1, 2, 4, 8 or 16 bytes");
  require(*std::min_element(s.begin(), s.end()) >= 0, "sizes must be >= 0");
  require(s[4] < (int64_t(1) << 31), "full_columns must be below 2^31");
  const auto is_right = [](uintptr_t list, int64_t count, int64_t full) {
    const auto* i = reinterpret_cast<const int64_t*>(list);
    if (!i) return count == full;
    for (int64_t k = 0; k < count; ++k) {
      if (i[k] < (k ? i[k - 1] + 1 : 0) || i[k] >= full) return false;
    }
    return true;
  };
  require(is_right(p[2], s[0], s[2]) && is_right(p[3], s[1], s[4]), "indices must increase and be in range");
  const bool has_part = std::min({s[0], s[1], s[3], s[5]}) > 0, has_whole = std::min({s[2], s[3], s[4], s[5]}) > 0;
  require((p[1] || !has_part) && (p[0] || !has_whole), "tensors must not be null");
  cpd::elements({cpd::Move(move), reinterpret_cast<void*>(p[0]), reinterpret_cast<void*>(p[1]),
                 reinterpret_cast<const int64_t*>(p[2]), reinterpret_cast<const int64_t*>(p[3]), s[0], s[1], s[2], s[3],
                 s[4], s[5], s[6], num_threads});
}

}  // namespace

void bind_elements(py::module_& m) {
  m.def("elements", &elements, py::call_guard<py::gil_scoped_release>());
}
