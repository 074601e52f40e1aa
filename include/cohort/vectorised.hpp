// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// Loops over tensors, compiled a second time for processors with 256-bit vectors. A library of
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
#endif

/// Calls `Loop::run(arguments...)`, which is `[[gnu::always_inline]]`, as is what it calls. What it
/// writes through one pointer, it does not read or write through another.
///
/// Both forms give the same bits: AVX2 alone has no fused multiply-add, so neither form contracts
/// what the other does not. The forms are not inlined, so that a loop has the same instructions
/// wherever it is called.
template <class Loop, class... Arguments>
void vectorised(Arguments... arguments) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    return run_for_avx2<Loop, Arguments...>(arguments...);
  }
#endif
  run_for_target<Loop, Arguments...>(arguments...);
}

}  // namespace cohort::detail
