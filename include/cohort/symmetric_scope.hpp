// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <utility>

#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/process_state.hpp"
#include "cohort/symmetric_arena.hpp"

/// \file
/// The RAII context in which `cohort::empty` allocates symmetric memory.

namespace cohort {

/// What a scope allocates from: an arena, or the backend's ordinary memory where the arena is null.
/// Groups and audiences convert to it.
struct ScopeTarget {
  SymmetricArena* arena = nullptr;  ///< Where `empty` allocates; null under a null scope.
  Backend* backend = nullptr;       ///< Whose ordinary memory a null scope gives.
};

/// Whether a scope takes effect; `disabled` makes it a null scope.
enum class ScopeMode : std::uint8_t { enabled, disabled };

class SymmetricScope;

namespace detail {
/// Where each thread keeps its innermost scope: in memory of the module that was asked first.
struct ScopePlaces {
  inline static constinit thread_local SymmetricScope* own = nullptr;

  SymmetricScope** (*of_this_thread)() noexcept = []() noexcept { return &own; };
};

/// This thread's innermost scope, whichever module opened it.
[[nodiscard]] inline SymmetricScope*& current_scope() noexcept {
  static constinit thread_local SymmetricScope** place = nullptr;
  if (place == nullptr) [[unlikely]] {
    place = process_wide<ScopePlaces>("scopes 1").of_this_thread();
  }
  return *place;
}
}  // namespace detail

/// While it lives, `cohort::empty` on this thread allocates from its arena, in the order of its
/// stream. Scopes nest; the innermost counts. Entering and leaving touch nothing but thread-local
/// memory. A scope of a group without symmetric memory is a null scope. It stays on its thread and
/// in its block: it can be neither copied nor moved.
///
///     {
///       SymmetricScope scope(dcp, stream);
///       Tensor q = empty({batch, heads, dim}, DType::bf16);
///     }
class SymmetricScope {
 public:
  /// Opens the scope on this thread; its tensors are used and freed on `stream`.
  explicit SymmetricScope(const ScopeTarget& target, StreamRef stream = {},
                          ScopeMode mode = ScopeMode::enabled) noexcept
      : arena_(mode == ScopeMode::enabled ? target.arena : nullptr),
        backend_(target.backend),
        stream_(stream),
        outer_(std::exchange(detail::current_scope(), this)) {}
  SymmetricScope(const SymmetricScope&) = delete;
  SymmetricScope& operator=(const SymmetricScope&) = delete;
  /// Scopes may end in any order: what is open still counts, innermost first.
  ~SymmetricScope() {
    SymmetricScope** place = &detail::current_scope();
    while (*place != nullptr && *place != this) {
      place = &(*place)->outer_;
    }
    if (*place == nullptr) {
      log(LogLevel::error, "a SymmetricScope ended on another thread than it began on");
      return;
    }
    *place = outer_;
  }

  /// The innermost scope of this thread, or null.
  [[nodiscard]] static const SymmetricScope* current() noexcept { return detail::current_scope(); }

  /// Whether allocations are ordinary memory.
  [[nodiscard]] bool is_null() const noexcept { return arena_ == nullptr; }
  /// The scope's stream.
  [[nodiscard]] StreamRef stream() const noexcept { return stream_; }

  /// Allocates as `cohort::empty` does. Throws as `SymmetricArena::empty` and `Backend::allocate`,
  /// and `UsageError` where the target has neither.
  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype) const {
    if (arena_ != nullptr) {
      return arena_->empty(shape, dtype, stream_);
    }
    if (backend_ == nullptr) {
      throw UsageError("SymmetricScope target: expected an arena or a backend, got neither");
    }
    return backend_->allocate(shape, dtype, stream_);
  }

 private:
  SymmetricArena* arena_;
  Backend* backend_;
  StreamRef stream_;
  SymmetricScope* outer_;
};

/// An uninitialised contiguous tensor from the innermost scope of this thread: symmetric memory, or
/// ordinary memory under a null scope. Collective over the scope's audience.
/// Throws `UsageError` where no scope is open, and as `SymmetricArena::empty`.
[[nodiscard]] inline Tensor empty(const Dims& shape, DType dtype) {
  const SymmetricScope* scope = SymmetricScope::current();
  if (scope == nullptr) {
    throw UsageError("cohort::empty: no SymmetricScope is open on this thread");
  }
  return scope->empty(shape, dtype);
}

}  // namespace cohort
