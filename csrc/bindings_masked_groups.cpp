// The bindings of csrc/masked_groups.h: addresses, a table of live channels and sizes in, as
// cpd_fast/ops/_direct.py makes them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "masked_groups.h"

namespace py = pybind11;

namespace {

using Pointers = std::array<uintptr_t, 8>;  // input to dbias of MaskedGroups, in its order
// dtype, channels_last, groups; live and held of inputs, of outputs; weight_rows to dilation_w, in the struct's order.
using Numbers = std::array<int64_t, 24>;

void require(bool is_right, const char* what) {
  if (!is_right) throw std::invalid_argument(std::string("masked_groups: ") + what);
}

cpd::MaskedGroups groups_args(const Pointers& p, uintptr_t table, const Numbers& s, int num_threads) {
  require(0 <= s[0] && s[0] <= 3, "dtype must be 0 to 3");
  require(num_threads >= 1, "num_threads must be >= 1");
  require(table != 0 && s[2] >= 1, "needs a table of one group or more");
  for (size_t i = 3; i < 12; ++i) require(s[i] >= 0, "sizes must be >= 0");
  for (size_t i = 12; i < 20; ++i) require(s[i] >= 1, "spatial sizes, kernel and stride must be >= 1");
  for (size_t d = 0; d < 2; ++d) {
    const int64_t in = s[12 + d], out = s[14 + d], kernel = s[16 + d], stride = s[18 + d], padding = s[20 + d];
    require(padding >= 0 && s[22 + d] >= 1, "padding must be >= 0, dilation >= 1");
    require((out - 1) * stride + (kernel - 1) * s[22 + d] + 1 <= in + 2 * padding, "the output is too large");
  }
  std::array<void*, 8> pointers;
  for (size_t i = 0; i < 8; ++i) pointers[i] = reinterpret_cast<void*>(p[i]);
  return cpd::masked_groups_of(pointers.data(), reinterpret_cast<const int64_t*>(table), s.data(), num_threads);
}

// What Python has checked already; here only what would read or write wild memory.
void check_table(const cpd::LiveChannels& c, int64_t groups, int64_t most) {
  require(c.starts[0] == 0 && c.starts[groups] == c.num_live, "live channels of groups must add up");
  require(c.held[0] == 0 && c.held[groups] == c.num_held, "places of groups must add up");
  for (int64_t g = 0; g < groups; ++g) {
    require(c.starts[g] <= c.starts[g + 1] && c.held[g] <= c.held[g + 1], "groups must be in order");
    for (int64_t i = c.starts[g]; i < c.starts[g + 1]; ++i) {
      require(c.held[g] <= c.at[i] && c.at[i] < c.held[g + 1] && c.slot[c.at[i]] == i, "a place is out of range");
      require(0 <= c.index[i] && c.index[i] < most, "an index is out of range");
    }
    for (int64_t place = c.held[g]; place < c.held[g + 1]; ++place) {
      require(-1 <= c.slot[place] && c.slot[place] < c.starts[g + 1], "a slot is out of range");
    }
  }
}

cpd::MaskedGroups with(std::initializer_list<size_t> needed, const Pointers& p, uintptr_t table, const Numbers& s,
                       int num_threads) {
  for (const size_t i : needed) require(p[i] != 0, "pointers must not be null");
  return groups_args(p, table, s, num_threads);
}

cpd::MaskedGroups checked(std::initializer_list<size_t> needed, const Pointers& p, uintptr_t table, const Numbers& s,
                          int num_threads) {
  const auto args = with(needed, p, table, s, num_threads);
  check_table(args.inputs, args.groups, args.weight_row / (args.kernel_h * args.kernel_w));
  check_table(args.outputs, args.groups, args.weight_rows);
  return args;
}

}  // namespace

void bind_masked_groups(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def(
      "masked_groups",
      [](const Pointers& p, uintptr_t table, const Numbers& s, int num_threads) {
        cpd::masked_groups(checked({0, 1, 4}, p, table, s, num_threads));
      },
      no_gil);
  m.def(
      "masked_groups_input",
      [](const Pointers& p, uintptr_t table, const Numbers& s, int num_threads) {
        cpd::masked_groups_input(checked({1, 3, 5}, p, table, s, num_threads));
      },
      no_gil);
  m.def(
      "masked_groups_weight",
      [](const Pointers& p, uintptr_t table, const Numbers& s, int num_threads) {
        cpd::masked_groups_weight(checked({0, 3, 6}, p, table, s, num_threads));
      },
      no_gil);
#ifdef CPD_WITH_CUDA
  // The table is on the device: its lists are as Python made them.
  m.def(
      "masked_groups_cuda",
      [](const Pointers& p, uintptr_t table, const Numbers& s, uintptr_t stream) {
        cpd::masked_groups_cuda(with({0, 1, 4}, p, table, s, 1), reinterpret_cast<void*>(stream));
      },
      no_gil);
  m.def(
      "masked_groups_input_cuda",
      [](const Pointers& p, uintptr_t table, const Numbers& s, uintptr_t stream) {
        cpd::masked_groups_input_cuda(with({1, 3, 5}, p, table, s, 1), reinterpret_cast<void*>(stream));
      },
      no_gil);
  m.def(
      "masked_groups_weight_cuda",
      [](const Pointers& p, uintptr_t table, const Numbers& s, uintptr_t scratch, uintptr_t stream) {
        cpd::masked_groups_weight_cuda(with({0, 3, 6}, p, table, s, 1), reinterpret_cast<void*>(scratch),
                                       reinterpret_cast<void*>(stream));
      },
      no_gil);
  m.def("masked_groups_weight_cuda_scratch", [](const Numbers& s) {
    int64_t nothing = 0;
    return cpd::masked_groups_weight_cuda_scratch(groups_args({}, reinterpret_cast<uintptr_t>(&nothing), s, 1));
  });
#endif
}
