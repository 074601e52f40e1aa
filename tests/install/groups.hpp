// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

// Runs a few groups on ranks that are threads of this process and says what came out.
std::string groups_of_threads();
