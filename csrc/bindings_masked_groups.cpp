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

cpd::LiveChannels channels_at(const int64_t*& table, int64_t groups, int64_t live, int64_t held) {
  cpd::LiveChannels c{};
  c.num_live = live;
  c.num_held = held;
  const int64_t** const fields[] = {&c.starts, &c.held, &c.at, &c.index, &c.slot};
  const int64_t lengths[] = {groups + 1, groups + 1, live, live, held};
  for (size_t i = 0; i < 5; ++i) {
    *fields[i] = table;
    table += lengths[i];
  }
  return c;
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
  const auto* entry = reinterpret_cast<const int64_t*>(table);
  const auto inputs = channels_at(entry, s[2], s[3], s[4]), outputs = channels_at(entry, s[2], s[5], s[6]);
  const auto in = [&](size_t i) { return reinterpret_cast<const void*>(p[i]); };
  const auto out = [&](size_t i) { return reinterpret_cast<void*>(p[i]); };
  return {cpd::Dtype(s[0]),
          s[1] != 0,
          in(0),
          in(1),
          in(2),
          in(3),
          out(4),
          out(5),
          out(6),
          out(7),
          inputs,
          outputs,
          s[2],
          s[7],
          s[8],
          s[9],
          s[10],
          s[11],
          s[12],
          s[13],
          s[14],
          s[15],
          s[16],
          s[17],
          s[18],
          s[19],
          s[20],
          s[21],
          s[22],
          s[23],
          num_threads};
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

cpd::MaskedGroups checked(const Pointers& p, std::initializer_list<size_t> needed, uintptr_t table, const Numbers& s,
                          int num_threads) {
  for (const size_t i : needed) require(p[i] != 0, "pointers must not be null");
  const auto args = groups_args(p, table, s, num_threads);
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
        cpd::masked_groups(checked(p, {0, 1, 4}, table, s, num_threads));
      },
      no_gil);
  m.def(
      "masked_groups_input",
      [](const Pointers& p, uintptr_t table, const Numbers& s, int num_threads) {
        cpd::masked_groups_input(checked(p, {1, 3, 5}, table, s, num_threads));
      },
      no_gil);
  m.def(
      "masked_groups_weight",
      [](const Pointers& p, uintptr_t table, const Numbers& s, int num_threads) {
        cpd::masked_groups_weight(checked(p, {0, 3, 6}, table, s, num_threads));
      },
      no_gil);
}
