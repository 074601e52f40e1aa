// SPDX-License-Identifier: Apache-2.0
// A process whose modules (the program and the plugins named as arguments) each bring the library:
// what exists once in a process is the same for all. The plugins ask first, in threads of their
// own.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <thread>
#include <vector>

#include "modules/state.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

void check(bool condition, const char* text) {
  if (!condition) {
    std::printf("check failed: %s\n", text);
    std::exit(1);
  }
}

struct Plugin {
  void* module;
  ModuleState state;
};

void ask(Plugin& plugin) {
  auto* function =
      reinterpret_cast<void (*)(ModuleState*)>(dlsym(plugin.module, "cohort_test_state"));
  check(function != nullptr, "the plugin has its function");
  function(&plugin.state);
}

void check_scopes(const ModuleState& a, const ModuleState& b) {
  static const ModuleState* inner = nullptr;
  inner = &b;
  check(b.current_scope() == nullptr, "no scope yet");
  a.with_scope([](const SymmetricScope* outer_scope) {
    check(inner->current_scope() == outer_scope, "the other module sees the scope");
    std::thread([] { check(inner->current_scope() == nullptr, "scopes stay in a thread"); }).join();
    static const SymmetricScope* outer = nullptr;
    outer = outer_scope;
    inner->with_scope([](const SymmetricScope* scope) {
      check(scope != outer && inner->current_scope() == scope, "scopes nest across modules");
    });
    check(inner->current_scope() == outer_scope, "and the outer one counts again");
  });
  check(b.current_scope() == nullptr, "no scope any more");
}

void check_same(const ModuleState& a, const ModuleState& b) {
  check(a.own_registry != b.own_registry, "the modules have copies of their own");
  check(a.log == b.log, "one log");
  check(a.memory_files == b.memory_files, "one table of memory files");
  check(a.streams == b.streams, "one driver of host streams");
  check(a.settings == b.settings, "one reading of the environment");
  check(a.process_key == b.process_key, "one process");
  check(a.capture() != b.capture(), "captures have numbers of their own");
  check_scopes(a, b);
  check_scopes(b, a);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Plugin> plugins;
  for (int i = 1; i < argc; ++i) {
    void* module = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);
    if (module == nullptr) {
      std::printf("%s\n", dlerror());
      return 1;
    }
    plugins.push_back({module, {}});
  }
  std::vector<std::thread> threads;
  for (auto& plugin : plugins) {
    threads.emplace_back([&plugin] { ask(plugin); });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& plugin : plugins) {
    dlclose(plugin.module);  // what they made stays, and their code with it
  }
  const ModuleState own = module_state();
  for (const auto& plugin : plugins) {
    check_same(own, plugin.state);
    for (const auto& other : plugins) {
      if (&other != &plugin) {
        check_same(plugin.state, other.state);
      }
    }
  }
  std::printf("process state: %zu plugins ok\n", plugins.size());
  return 0;
}
