// SPDX-License-Identifier: Apache-2.0
// The engine's own source: its standard is the parent's, and nothing of Cohort's reaches it.
static_assert(__cplusplus < 202002L, "the engine's CUDA sources are C++17");
#if defined(FMT_CONSTEVAL) || defined(FMT_USE_CONSTEXPR)
#error "definitions for Cohort's sources reached the engine's"
#endif
__global__ void kernel() {}
void launch_kernel() { kernel<<<1, 1>>>(); }
