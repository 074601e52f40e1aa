// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/cuda/process_identity.hpp>
#include <cohort/host/host_stream.hpp>
#include <cohort/host/shared_memory.hpp>
#include <cohort/log.hpp>
#include <cohort/runtime_env.hpp>
#include <cohort/symmetric_scope.hpp>
#include <cstdint>

/// \file
/// What exists once in a process, as one module sees it.

namespace cohort::test {

struct ModuleState {
  const void* log;
  const void* memory_files;
  const void* streams;
  const void* settings;
  std::uint64_t process_key;
  const void* own_registry;
  const SymmetricScope* (*current_scope)();
  /// Opens a scope, and calls `body` with it.
  void (*with_scope)(void (*body)(const SymmetricScope*));
  CaptureId (*capture)();
};

/// Hidden, so that it is the module's own.
[[gnu::visibility("hidden")]] inline ModuleState module_state() {
  return {.log = &detail::log_state(),
          .memory_files = &host::detail::MemoryRegistry::instance(),
          .streams = &host_stream_driver(),
          .settings = &runtime_settings(),
          .process_key = detail::process_key(),
          .own_registry = &detail::module_registry,
          .current_scope = [] { return SymmetricScope::current(); },
          .with_scope =
              [](void (*body)(const SymmetricScope*)) {
                const SymmetricScope scope(ScopeTarget{});
                body(&scope);
              },
          .capture =
              [] {
                HostStream stream;
                stream.begin_capture();
                const CaptureId id = stream.ref().capture_id();
                static_cast<void>(stream.end_capture());
                return id;
              }};
}

}  // namespace cohort::test
