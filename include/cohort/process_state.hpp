// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

/// \file
/// Objects that exist once in a process. A static object in a header exists once in each module
/// (the program and its shared libraries) where symbols are hidden, where a library was opened with
/// RTLD_LOCAL, or where the program exports none: an engine and its plugin would each have a log, a
/// scope and a table of memory files.
///
/// The modules find each other without symbols: each carries an ELF note, which no linker drops and
/// the loader keeps in memory, with the distance to its registry. All use the registry of the
/// module that was loaded first.
///
/// Sources: elf(5) for notes, dl_iterate_phdr(3), whose order is that of loading and starts with
/// the program.

namespace cohort::detail {

/// Objects by name. Constant-initialised, so that a module need not have run to be asked.
struct ProcessRegistry {
  struct Entry {
    const char*
        name;  ///< Nothing here comes from a library of which modules may use different ones.
    void* object;
    const Entry* next;
  };

  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  const Entry* first = nullptr;  ///< Never freed: destructors of static objects still use it.
};

/// Changes with the layout of the registry.
inline constexpr std::uint32_t kRegistryVersion = 1;

/// This module's. The name in the assembly is what the note below refers to.
[[gnu::visibility("hidden"),
  gnu::used]] inline constinit ProcessRegistry module_registry asm("cohort_process_registry_1"){};

#if !defined(__CUDA_ARCH__)
// A note by hand: compilers would make its section writable, for the sake of an address in it.
// The owner's name takes 12 bytes, so that the content is aligned for both sizes of words in notes.
asm(R"(
  .pushsection .note.cohort, "a", %note
  .balign 4
  .long 12, 4, 1
  .asciz "Cohort"
  .balign 4
  .long 0
  .long cohort_process_registry_1 - .
  .popsection
)");
#endif

/// The registry that a module's notes lead to, or null.
[[nodiscard]] inline ProcessRegistry* registry_in_notes(const std::byte* notes, std::size_t bytes,
                                                        std::size_t alignment) noexcept {
  constexpr std::array<char, 12> kOwner{"Cohort"};
  const auto padded = [alignment](std::size_t size) {
    return (size + alignment - 1) / alignment * alignment;
  };
  for (std::size_t at = 0; at + sizeof(ElfW(Nhdr)) <= bytes;) {
    ElfW(Nhdr) header;
    std::memcpy(&header, notes + at, sizeof(header));
    const std::size_t content = padded(at + sizeof(header) + header.n_namesz);
    std::int32_t distance = 0;
    if (header.n_type == kRegistryVersion && header.n_namesz == kOwner.size() &&
        header.n_descsz == sizeof(distance) && content + sizeof(distance) <= bytes &&
        std::memcmp(notes + at + sizeof(header), kOwner.data(), kOwner.size()) == 0) {
      std::memcpy(&distance, notes + content, sizeof(distance));
      // NOLINTNEXTLINE(performance-no-int-to-ptr): it lies in another section, at a known distance
      return reinterpret_cast<ProcessRegistry*>(reinterpret_cast<std::uintptr_t>(notes) + content +
                                                static_cast<std::uintptr_t>(distance));
    }
    at = padded(content + header.n_descsz);
  }
  return nullptr;
}

/// The first module with a registry, and this one.
struct RegistrySearch {
  ProcessRegistry* registry = nullptr;
  std::string owner;  ///< Its file; empty for the program itself.
  std::string self;
};

/// For dl_iterate_phdr(3): looks at one module. Hidden, like what else must mean its own module.
[[gnu::visibility("hidden")]] inline int search_module(dl_phdr_info* module, std::size_t,
                                                       void* result) {
  auto& search = *static_cast<RegistrySearch*>(result);
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& part = module->dlpi_phdr[i];
    const std::uintptr_t begin = module->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_NOTE && search.registry == nullptr) {
      // NOLINTNEXTLINE(performance-no-int-to-ptr): the loader tells addresses
      search.registry = registry_in_notes(reinterpret_cast<const std::byte*>(begin), part.p_memsz,
                                          part.p_align == 8 ? 8 : 4);
      if (search.registry != nullptr) {
        search.owner = module->dlpi_name;
      }
    }
    if (part.p_type == PT_LOAD &&
        reinterpret_cast<std::uintptr_t>(&module_registry) - begin < part.p_memsz) {
      search.self = module->dlpi_name;
    }
  }
  return 0;
}

// Weak, because a program without shared libraries needs none and may have none.
[[maybe_unused, gnu::weakref("dlopen")]] static void* open_module(const char*, int);

/// Keeps a module loaded for good: objects of the process hold addresses of its functions. False
/// where it has been unloaded meanwhile.
inline bool keep_loaded(const std::string& module) noexcept {
  return module.empty() || &open_module == nullptr ||
         open_module(module.c_str(), RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE) != nullptr;
}

[[nodiscard, gnu::visibility("hidden")]] inline ProcessRegistry& find_process_registry() {
  while (true) {
    RegistrySearch search;
    dl_iterate_phdr(search_module, &search);
    if (search.registry == nullptr) {
      return module_registry;  // stripped of its notes: this module is on its own
    }
    if (keep_loaded(search.owner)) {
      keep_loaded(search.self);
      return *search.registry;
    }
  }
}

/// The object of the process with this name, or null.
[[nodiscard]] inline void* find_object(ProcessRegistry& registry,
                                       const std::string& name) noexcept {
  for (const auto* entry = registry.first; entry != nullptr; entry = entry->next) {
    if (name == entry->name) {
      return entry->object;
    }
  }
  return nullptr;
}

/// Holds a registry's mutex.
class RegistryLock {
 public:
  explicit RegistryLock(ProcessRegistry& registry) : mutex_(registry.mutex) {
    pthread_mutex_lock(&mutex_);
  }
  RegistryLock(const RegistryLock&) = delete;
  RegistryLock& operator=(const RegistryLock&) = delete;
  ~RegistryLock() { pthread_mutex_unlock(&mutex_); }

 private:
  pthread_mutex_t& mutex_;
};

/// The object with this name; `make` makes one where there is none, outside of the lock, because it
/// may ask for others. Of two that are made at once, one is `drop`ped.
template <class T, class Make>
[[nodiscard]] T& object_of_process(ProcessRegistry& registry, const std::string& name,
                                   const Make& make) {
  {
    const RegistryLock lock(registry);
    if (void* found = find_object(registry, name)) {
      return *static_cast<T*>(found);
    }
  }
  auto made = make();
  const RegistryLock lock(registry);
  if (void* found = find_object(registry, name)) {
    return *static_cast<T*>(found);
  }
  registry.first = new ProcessRegistry::Entry{::strdup(name.c_str()), made.get(), registry.first};
  return *made.release();
}

/// Modules share an object only if they agree on how it lies in memory.
template <class T>
[[nodiscard]] std::string name_with_layout(const char* name) {
#if defined(_LIBCPP_VERSION)
  constexpr const char* kLibrary = " libc++ ";
#elif defined(_GLIBCXX_USE_CXX11_ABI) && _GLIBCXX_USE_CXX11_ABI
  constexpr const char* kLibrary = " libstdc++11 ";
#else
  constexpr const char* kLibrary = " libstdc++ ";
#endif
  return name + (kLibrary + std::to_string(sizeof(T)));
}

/// The process's object of this type: made by `make` (-> `std::unique_ptr<T>`) at the first call in
/// any module, and never destroyed. Thread-safe. What `make` throws comes out, and the next call
/// tries again.
///
/// @param name  One for each type. Ends in a number that changes with the type's layout or meaning.
template <class T, class Make>
[[nodiscard, gnu::visibility("hidden")]] T& process_wide(const char* name, const Make& make) {
  // A pointer: g++ 13 takes the result for a reference into the name that is gone.
  static T* const object =
      &object_of_process<T>(find_process_registry(), name_with_layout<T>(name), make);
  return *object;
}

template <class T>
[[nodiscard]] T& process_wide(const char* name) {
  return process_wide<T>(name, [] { return std::make_unique<T>(); });
}

}  // namespace cohort::detail
