// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>

#include <exception>
#include <string>
#include <utility>

/// \file
/// The few functions of Python's that the operators need, without its headers: those of the stable
/// ABI, found in the process. A program without an interpreter has none of them.

struct _object;  // Python's

namespace cohort::python {

/// Source: Python 3.10, the C API's stable ABI.
struct Interpreter {
  int (*ensure)() = nullptr;  ///< Takes its lock on this thread.
  void (*release)(int) = nullptr;
  int (*check_signals)() =
      nullptr;  ///< Calls the handlers of signals that have come, on its main thread.
  void (*fetch)(_object**, _object**, _object**) = nullptr;
  void (*take)(_object*) = nullptr;
  void (*drop)(_object*) = nullptr;

  /// Null where the process has none.
  static const Interpreter* of_process() {
    static const Interpreter found = find();
    return found.drop != nullptr ? &found : nullptr;
  }

 private:
  static Interpreter find() {
    Interpreter python;
    const auto get = [](auto& function, const char* name) {
      void* const address = dlsym(RTLD_DEFAULT, name);
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
      return address != nullptr;
    };
    const bool all =
        get(python.ensure, "PyGILState_Ensure") && get(python.release, "PyGILState_Release") &&
        get(python.check_signals, "PyErr_CheckSignals") && get(python.fetch, "PyErr_Fetch") &&
        get(python.take, "Py_IncRef") && get(python.drop, "Py_DecRef");
    return all ? python : Interpreter{};
  }
};

}  // namespace cohort::python

/// An exception of Python's, which torch puts back as it is where an operator throws it: torch's
/// own type by this name, whose header needs Python's. The runtime knows types by their names.
/// Source: torch 2.11, torch/csrc/Exceptions.h.
struct python_error : public std::exception {
  python_error(_object* its_type, _object* its_value, _object* its_traceback)
      : type(its_type), value(its_value), traceback(its_traceback), message("python_error") {}
  python_error(const python_error& other)
      : std::exception(other),
        type(other.type),
        value(other.value),
        traceback(other.traceback),
        message(other.message) {
    each(cohort::python::Interpreter::of_process()->take);
  }
  python_error(python_error&& other) noexcept
      : type(std::exchange(other.type, nullptr)),
        value(std::exchange(other.value, nullptr)),
        traceback(std::exchange(other.traceback, nullptr)),
        message(std::move(other.message)) {}
  python_error& operator=(const python_error&) = delete;
  python_error& operator=(python_error&&) = delete;
  ~python_error() override { each(cohort::python::Interpreter::of_process()->drop); }

  const char* what() const noexcept override { return message.c_str(); }

  // In this order: torch reads them.
  _object* type;
  _object* value;
  _object* traceback;
  std::string message;

 private:
  void each(void (*change)(_object*)) const noexcept {
    if (type == nullptr && value == nullptr && traceback == nullptr) {
      return;
    }
    const int state = cohort::python::Interpreter::of_process()->ensure();
    change(type);
    change(value);
    change(traceback);
    cohort::python::Interpreter::of_process()->release(state);
  }
};
