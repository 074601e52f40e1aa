// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace decode_engine {

/// What the hardware could reach at best, of memory and of products in bf16, a second; zeros where
/// nobody knows.
struct Peak {
  double bytes = 0, flops = 0;
};

}  // namespace decode_engine
