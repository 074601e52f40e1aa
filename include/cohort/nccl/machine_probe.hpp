// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/cuda/card.hpp"
#include "cohort/cuda/descriptor_exchange.hpp"
#include "cohort/cuda/driver.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/process_identity.hpp"
#include "cohort/error.hpp"
#include "cohort/fixed_text.hpp"
#include "cohort/hash.hpp"
#include "cohort/log.hpp"
#include "cohort/nccl/nccl_check.hpp"
#include "cohort/nccl/nccl_window.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/symmetric_policy.hpp"

/// \file
/// What the ranks of a group find out about their machines, cards and NCCL, and agree on: the
/// policy's inputs.

namespace cohort {

/// What one rank knows of itself. A plain value, sent to the other ranks.
struct MachineFacts {
  ProcessIdentity process;
  std::array<char, 16> device_uuid{};
  std::array<char, 32> pci_bus_id{};
  std::uint64_t nccl_host = 0;  ///< Hash of NCCL's host identity.
  std::int32_t nccl_header_version = 0;
  std::int32_t nccl_runtime_version = 0;
  std::int32_t multiprocessors = 0;
  cuda::Capability capability;
  std::uint8_t windows = 0;
  std::uint8_t win_enable = 0;
  std::uint8_t cumem = 0;
};

namespace detail {

/// Whether NCCL allocates by cuMem on the device, as its ncclCuMemEnable decides: the variable
/// where it is 0 or 1, otherwise the driver's attributes.
[[nodiscard]] inline bool cumem_enabled(int device, const NcclEnv& environment) {
  if (environment.cumem_forbidden) {
    return false;
  }
  try {
    const auto& api = driver();
    CUdevice handle = 0;
    int supported = 0;
    driver_check(api.device_get(&handle, device), "cuDeviceGet");
    driver_check(api.device_get_attribute(
                     &supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, handle),
                 "cuDeviceGetAttribute");
    return supported != 0;
  } catch (const TransportError&) {
    return false;
  }
}

/// NVLink between two cards of the machine, one of which this process does not see: asked of the
/// driver's management library, if there is one. Cards are named by their PCI addresses.
[[nodiscard]] inline bool hidden_nvlink(const char* mine, const char* theirs) {
  using Handle = void*;
  void* const library = ::dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return false;
  }
  const auto find = [library](const char* name) { return ::dlsym(library, name); };
  const auto init = reinterpret_cast<int (*)()>(find("nvmlInit_v2"));
  const auto shutdown = reinterpret_cast<int (*)()>(find("nvmlShutdown"));
  const auto by_address =
      reinterpret_cast<int (*)(const char*, Handle*)>(find("nvmlDeviceGetHandleByPciBusId_v2"));
  const auto p2p_status =
      reinterpret_cast<int (*)(Handle, Handle, int, int*)>(find("nvmlDeviceGetP2PStatus"));
  bool linked = false;
  if (init != nullptr && shutdown != nullptr && by_address != nullptr && p2p_status != nullptr &&
      init() == 0) {
    constexpr int kNvlink = 2;  // NVML_P2P_CAPS_INDEX_NVLINK of nvml.h
    Handle a = nullptr;
    Handle b = nullptr;
    int status = -1;
    linked = by_address(mine, &a) == 0 && by_address(theirs, &b) == 0 &&
             p2p_status(a, b, kNvlink, &status) == 0 && status == 0;
    shutdown();
  }
  ::dlclose(library);
  return linked;
}

/// The ordinal of a card in this process, or nothing where the process does not see it.
[[nodiscard]] inline std::optional<int> visible_ordinal(const std::array<char, 16>& uuid) {
  int count = 0;
  cuda_check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    cudaDeviceProp properties{};
    cuda_check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
    if (std::memcmp(properties.uuid.bytes, uuid.data(), uuid.size()) == 0) {
      return ordinal;
    }
  }
  return std::nullopt;
}

/// How this rank's card reaches another rank's.
struct Reach {
  std::uint8_t peer = 0;    ///< Loads and stores are possible; also where only a trial can tell.
  std::uint8_t nvlink = 0;  ///< By NVLink.
  std::uint8_t whole = 0;   ///< By NVLink or on one card, whole lines: see cuda/card.hpp.
};

[[nodiscard]] inline Reach reach(int device, const MachineFacts& me, const MachineFacts& other) {
  if (!me.process.same_machine(other.process)) {
    return {};
  }
  const std::uint8_t whole = cuda::keeps_lines_whole(me.capability, other.capability) ? 1 : 0;
  if (me.device_uuid == other.device_uuid) {
    return {1, 0, whole};  // one card: its own memory, but NCCL takes no windows across its ranks
  }
  const auto ordinal = visible_ordinal(other.device_uuid);
  if (!ordinal) {
    const std::uint8_t linked =
        hidden_nvlink(me.pci_bus_id.data(), other.pci_bus_id.data()) ? 1 : 0;
    return {1, linked, std::min(linked, whole)};
  }
  int access = 0;
  cuda_check(cudaDeviceCanAccessPeer(&access, device, *ordinal), "cudaDeviceCanAccessPeer");
  if (access == 0) {
    return {};
  }
  // Peers over PCIe have no native atomics; over NVLink they do (CUDA C++ Programming Guide, peer
  // attributes).
  int atomics = 0;
  cuda_check(
      cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device, *ordinal),
      "cudaDeviceGetP2PAttribute");
  const std::uint8_t linked = atomics != 0 ? 1 : 0;
  return {1, linked, std::min(linked, whole)};
}

}  // namespace detail

/// This rank's facts. Local. Throws `TransportError`.
[[nodiscard]] inline MachineFacts machine_facts(int device, const EnvLookup& lookup = process_env) {
  const DeviceGuard guard(device);
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  MachineFacts facts;
  facts.process = this_process();
  std::memcpy(facts.device_uuid.data(), properties.uuid.bytes, facts.device_uuid.size());
  cuda_check(cudaDeviceGetPCIBusId(facts.pci_bus_id.data(),
                                   static_cast<int>(facts.pci_bus_id.size()), device),
             "cudaDeviceGetPCIBusId");
  facts.nccl_runtime_version = nccl_runtime_version();
  const NcclEnv environment = read_nccl_env(lookup);
  facts.nccl_host = detail::hash_text(
      nccl_host_identity(environment.host_id ? environment.host_id->c_str() : nullptr));
  facts.nccl_header_version = NCCL_VERSION_CODE;
  facts.multiprocessors = properties.multiProcessorCount;
  facts.capability = {properties.major, properties.minor};
  facts.windows = nccl_has_windows() ? 1 : 0;
  facts.win_enable = environment.win_enable ? 1 : 0;
  facts.cumem = detail::cumem_enabled(device, environment) ? 1 : 0;
  return facts;
}

/// The group's machines and cards, equal on all ranks.
struct GroupProbe {
  std::vector<MachineFacts> ranks;
  SymmetricCapabilities capabilities;  ///< `peer_import` is for a trial to fill in.
  int ranks_per_device = 1;            ///< On the card that most ranks share.
  int multiprocessors = 0;             ///< Of the smallest card.
  bool whole_lines = false;            ///< Between all cards; see `cuda::PeerPath::flag_line`.
};

/// Collective. Throws `ConfigError` on every rank where NCCL would refuse the group, otherwise what
/// the control plane throws.
[[nodiscard]] inline GroupProbe probe_group(ControlPlane& group, int device) {
  GroupProbe probe;
  const MachineFacts mine = machine_facts(device);
  probe.ranks = detail::gather_values(group, mine);
  const auto& ranks = probe.ranks;

  std::vector<detail::Reach> row(ranks.size(), {1, 1, 1});
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    if (static_cast<int>(r) != group.rank()) {
      row[r] = detail::reach(device, mine, ranks[r]);
    }
  }
  const auto weakest = [](const auto& reaches) {
    detail::Reach all{1, 1, 1};
    for (const auto& one : reaches) {
      all = {std::min(all.peer, one.peer), std::min(all.nvlink, one.nvlink),
             std::min(all.whole, one.whole)};
    }
    return all;
  };
  const detail::Reach all = weakest(detail::gather_values(group, weakest(row)));

  const auto smallest = [&](auto field) {
    const auto found =
        std::min_element(ranks.begin(), ranks.end(),
                         [field](const auto& a, const auto& b) { return a.*field < b.*field; });
    return (*found).*field;
  };
  std::set<std::uint64_t> hosts;
  std::set<std::string> machines;
  std::string obstacle;
  for (std::size_t a = 0; a < ranks.size(); ++a) {
    hosts.insert(ranks[a].nccl_host);
    if (ranks[a].process.boot_id_error == 0) {
      machines.emplace(detail::text_of(ranks[a].process.boot_id));
    } else if (obstacle.empty()) {
      obstacle = fmt::format("rank {}: {}", a,
                             os::error_text("the boot id could not be read",
                                            static_cast<int>(ranks[a].process.boot_id_error)));
    }
    int sharing = 1;
    for (std::size_t b = 0; b < ranks.size(); ++b) {
      const bool same_card = a != b && ranks[a].device_uuid == ranks[b].device_uuid &&
                             ranks[a].process.same_machine(ranks[b].process);
      sharing += same_card ? 1 : 0;
      if (same_card && a < b && ranks[a].nccl_host == ranks[b].nccl_host) {
        throw ConfigError(fmt::format(
            "group {}: ranks {} and {} use the same card, {}; NCCL refuses that on one host. Give "
            "each rank a card, or, for functional tests over sockets, an NCCL_HOSTID of its own",
            group.name(), a, b, detail::text_of(ranks[a].pci_bus_id)));
      }
    }
    probe.ranks_per_device = std::max(probe.ranks_per_device, sharing);
  }
  probe.multiprocessors = smallest(&MachineFacts::multiprocessors);
  probe.whole_lines = all.whole != 0;
  probe.capabilities = {.backend = BackendKind::cuda,
                        .transport_windows = smallest(&MachineFacts::windows) != 0,
                        .nccl_header_version = smallest(&MachineFacts::nccl_header_version),
                        .nccl_runtime_version = smallest(&MachineFacts::nccl_runtime_version),
                        .nccl_win_enable = smallest(&MachineFacts::win_enable) != 0,
                        .nccl_cumem_enabled = smallest(&MachineFacts::cumem) != 0,
                        .nccl_hosts = static_cast<int>(hosts.size()),
                        .nvlink_reach = all.nvlink != 0,
                        .machines = std::max(1, static_cast<int>(machines.size())),
                        .peer_access = all.peer != 0,
                        .peer_import = false,
                        .obstacle = obstacle};
  return probe;
}

}  // namespace cohort
