// SPDX-License-Identifier: Apache-2.0
// A program without shared libraries: it has a loader's list of one module, and no dlopen.

#include <cohort/process_state.hpp>
#include <cstdio>

int main() {
  int& one = cohort::detail::process_wide<int>("test 1");
  int& same = cohort::detail::process_wide<int>("test 1", [] { return std::make_unique<int>(7); });
  int& other = cohort::detail::process_wide<int>("test 2", [] { return std::make_unique<int>(7); });
  const bool right = &one == &same && one == 0 && &other != &one && other == 7 &&
                     &cohort::detail::find_process_registry() == &cohort::detail::module_registry;
  std::puts(right ? "process state: ok" : "process state: wrong");
  return right ? 0 : 1;
}
