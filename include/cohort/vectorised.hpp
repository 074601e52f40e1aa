// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// Loops over tensors, compiled again for processors with 256-bit and 512-bit vectors. A library of
/// headers is compiled with its user's flags, often those of the oldest processor that a
/// distribution supports; its loops take the wider form where the processor they run on has it.

namespace cohort::detail {

/// Pointers of a loop are restrict-qualified in the function that the loop is inlined into: that of
/// the inlined parameters alone does not let g++ 12 vectorise at -O2.
template <class T>
struct LoopParameter {
  using Type = T;
};
template <class T>
struct LoopParameter<T*> {
  using Type = T* __restrict;
};

template <class Loop, class... Arguments>
[[gnu::noinline]] void run_for_target(typename LoopParameter<Arguments>::Type... arguments) {
  Loop::run(arguments...);
}

#if defined(__x86_64__)
template <class Loop, class... Arguments>
[[gnu::noinline, gnu::target("avx2")]] void run_for_avx2(
    typename LoopParameter<Arguments>::Type... arguments) {
  Loop::run(arguments...);
}

template <class Loop, class... Arguments>
[[gnu::noinline, gnu::target("avx512f,avx512bw,avx512dq,avx512vl")]] void run_for_avx512(
    typename LoopParameter<Arguments>::Type... arguments) {
  Loop::run(arguments...);
}

/// Ice Lake, Zen 4 and later, which the last of these tells: 512-bit vectors lower the clock of
/// what came before.
[[nodiscard]] inline bool has_avx512() noexcept {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2");
}
#endif

/// Calls `Loop::run(arguments...)`, which is `[[gnu::always_inline]]`, as is what it calls. What it
/// writes through one pointer, it does not read or write through another.
///
/// Both forms give the same bits, but for which of two NaNs their sum is: AVX2 alone has no fused
/// multiply-add, so neither form contracts what the other does not. The forms are not inlined, so
/// that a loop has the same instructions wherever it is called.
template <class Loop, class... Arguments>
void vectorised(Arguments... arguments) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    return run_for_avx2<Loop, Arguments...>(arguments...);
  }
#endif
  run_for_target<Loop, Arguments...>(arguments...);
}

/// The same for a loop that adds no product to anything, also with 512-bit vectors. Those come with
/// a fused multiply-add, with which a sum of products would have other bits.
template <class Loop, class... Arguments>
void vectorised_widest(Arguments... arguments) {
#if defined(__x86_64__)
  if (has_avx512()) {
    return run_for_avx512<Loop, Arguments...>(arguments...);
  }
#endif
  vectorised<Loop, Arguments...>(arguments...);
}

}  // namespace cohort::detail
