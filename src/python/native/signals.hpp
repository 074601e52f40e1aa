// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "cohort/wait_look.hpp"
#include "interpreter.hpp"

/// \file
/// Signals that come while a call waits. Python calls their handlers on its main thread alone,
/// which is in the call.

namespace cohort::python {

/// What a handler has thrown that a wait of this thread called: the operator throws it at its end.
class Interruption {
 public:
  [[nodiscard]] static bool has_come() noexcept { return of_thread().has_value(); }

  /// Throws it.
  static void raise() {
    if (auto& kept = of_thread()) {
      python_error error(std::move(*kept));
      kept.reset();
      throw error;
    }
  }

  /// What `body` gives or throws, unless there is an interruption in the end.
  template <class Body>
  static std::invoke_result_t<const Body&> or_result_of(const Body& body) {
    try {
      if constexpr (std::is_void_v<std::invoke_result_t<const Body&>>) {
        body();
        raise();
      } else {
        auto result = body();
        raise();
        return result;
      }
    } catch (const python_error&) {
      throw;
    } catch (const std::exception&) {
      raise();
      throw;
    }
  }

  /// Has Python call the handlers of signals that have come. True where one has thrown.
  static bool look() noexcept {
    const Interpreter* const python = Interpreter::of_process();
    if (python == nullptr || getpid() != gettid()) {
      return false;
    }
    const int state = python->ensure();
    if (python->check_signals() != 0) {
      _object *type = nullptr, *value = nullptr, *traceback = nullptr;
      python->fetch(&type, &value, &traceback);
      of_thread().emplace(type, value, traceback);
    }
    python->release(state);
    return has_come();
  }

 private:
  static std::optional<python_error>& of_thread() noexcept {
    static thread_local std::optional<python_error> kept;
    return kept;
  }
};

/// While it lives, waits of this thread have handlers called, and leave their groups where one
/// throws: a call that was left half way has no ranks in step any more.
template <class Waiting>
class SignalLook {
 public:
  /// `waiting`: `handlers_run(bool)` before and behind them, `give_up(reason)`.
  explicit SignalLook(Waiting& waiting, bool looks = true) noexcept
      : look_(looks ? &look : nullptr, &waiting) {}

 private:
  static void look(void* context) noexcept {
    auto& waiting = *static_cast<Waiting*>(context);
    if (Interruption::has_come()) {
      return;  // the wait is about to end
    }
    waiting.handlers_run(true);
    const bool interrupted = Interruption::look();
    waiting.handlers_run(false);
    if (interrupted) {
      waiting.give_up("interrupted by a signal");
    }
  }

  WaitLook look_;
};

}  // namespace cohort::python
