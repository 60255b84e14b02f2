// Runs the cases that are linked in: without arguments every right one, in three thread orders; else those named, in
// the order that the first argument gives.
#include <cstring>

#include "cases.h"
#include "host_model.h"

int main(int count, char** arguments) {
  if (count > 2) {
    host_model::set_order(std::atoi(arguments[1]), 3);
    bool found = false;
    for (const auto& c : host_model::cases()) {
      if (std::strcmp(c.name, arguments[2]) != 0) continue;
      c.run();
      found = true;
    }
    std::puts(found ? "ran" : "no such case");
    return found ? 0 : 2;
  }
  for (int order = 0; order < 3; ++order) {
    host_model::set_order(order, 3);
    for (const auto& c : host_model::cases()) {
      if (!c.is_fault) c.run();
    }
  }
  std::puts("clean");
}
