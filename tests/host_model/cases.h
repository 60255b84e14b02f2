// Small problems for the sanitizers: a right kernel must be clean, a planted fault must be reported.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace host_model {

struct Case {
  const char* name;
  bool is_fault;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registered {
  Registered(const char* name, bool is_fault, void (*run)()) { cases().push_back({name, is_fault, run}); }
};

// The message of a body that failed ends the program.
inline void stop_on(const char* message) {
  if (message == nullptr) return;
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

}  // namespace host_model

#define HM_CASE(name, is_fault)                                                        \
  static void case_##name();                                                           \
  static const host_model::Registered registered_##name(#name, is_fault, case_##name); \
  static void case_##name()
#define CASE(name) HM_CASE(name, false)
#define FAULT(name) HM_CASE(name, true)
