// SPDX-License-Identifier: Apache-2.0
#include "modules/state.hpp"

extern "C" [[gnu::visibility("default")]] void cohort_test_state(cohort::test::ModuleState* state) {
  *state = cohort::test::module_state();
}
