// Which instruction set the CPU kernels run with.
#pragma once
#include <string>
#include <vector>

namespace cpd {

std::vector<std::string> supported_isas();  // worst first
std::string current_isa();
void set_isa(const std::string& name);  // for tests; throws std::invalid_argument

}  // namespace cpd
