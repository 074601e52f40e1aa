// SPDX-License-Identifier: Apache-2.0
#include <cohort/topology.hpp>

int main() {
  try {
    cohort::validate({.tp = 3, .pp = 1, .dcp = 2}, 3);
  } catch (const cohort::ConfigError& error) {
    return error.what()[0] == '\0';
  }
  return 1;
}
