// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/cuda/descriptor_exchange.hpp"
#include "cohort/cuda/exportable_memory.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/process_identity.hpp"
#include "cohort/error.hpp"

/// \file
/// A table of pointers to every rank's copy of one allocation, for kernels that load from and
/// store to peers' memory themselves. Works between cards that reach each other and between
/// processes, or threads, that share one card. NCCL has no part in it.

namespace cohort {

/// Every rank's copy, mapped here. The own memory belongs to the mapping. Teardown is local; the
/// peers' mappings of this rank's memory stay valid until they let go of them.
class PeerMapping {
 public:
  /// A mapping, or why there is none; equal on all ranks.
  struct Outcome {
    std::unique_ptr<PeerMapping> mapping;  ///< Null where there is none.
    std::string refusal;                   ///< Why there is none.
  };

  /// Allocates `bytes` on `device` on every rank and maps them everywhere. Collective; bounded by
  /// the group's time limit. What the machine does not permit is a refusal. Each mapping is proved:
  /// every rank reads through it a word that only the owner could have written.
  /// Throws what the control plane throws.
  [[nodiscard]] static Outcome create(ControlPlane& group, int device, std::size_t bytes,
                                      DescriptorRoute route = DescriptorRoute::automatic) {
    std::unique_ptr<PeerMapping> mapping(new PeerMapping);
    UniqueFd descriptor;
    Offer offer;
    std::string problem;
    try {
      mapping->mine_ = DeviceMapping::allocate(device, bytes);
      descriptor = DeviceMapping::export_descriptor(mapping->mine_.data());
      offer = {.bytes = mapping->mine_.bytes(), .proof = detail::random_word()};
      write_word(device, mapping->mine_.data(), offer.proof);
    } catch (const Error& error) {
      problem = error.what();
      descriptor.reset();
    }

    const auto offers = detail::gather_values(group, offer);
    const auto received = exchange_descriptors(group, descriptor.get(), route);
    if (problem.empty()) {
      problem = received.refusal.empty() ? mapping->import(group.rank(), offers, received)
                                         : received.refusal;
    }
    // Also keeps every descriptor and every proof in place until all ranks have looked.
    const auto problems = detail::gather_texts(group, problem);
    for (std::size_t r = 0; r < problems.size(); ++r) {
      if (!problems[r].empty()) {
        return {nullptr, fmt::format("rank {}: {}", r, problems[r])};
      }
    }
    return {std::move(mapping), {}};
  }

  PeerMapping(const PeerMapping&) = delete;
  PeerMapping& operator=(const PeerMapping&) = delete;

  /// By rank, the own copy included.
  [[nodiscard]] std::span<void* const> peers() const noexcept { return peers_; }
  /// The own copy.
  [[nodiscard]] void* data() const noexcept { return mine_.data(); }
  /// Of one rank's copy.
  [[nodiscard]] std::size_t bytes() const noexcept { return mine_.bytes(); }

  /// Leaves everything mapped for good: for kernels that never end.
  void abandon() noexcept {
    mine_.abandon();
    for (DeviceMapping& mapping : imported_) {
      mapping.abandon();
    }
  }

 private:
  struct Offer {
    std::uint64_t bytes = 0;
    std::uint64_t proof = 0;
  };

  PeerMapping() = default;

  static void write_word(int device, void* to, std::uint64_t word) {
    const DeviceGuard guard(device);
    cuda_check(cudaMemcpy(to, &word, sizeof(word), cudaMemcpyHostToDevice), "cudaMemcpy");
    // From pageable memory it may return before the word has arrived (CUDA Runtime API, "API
    // synchronization behavior"), and the peers are told to look right after.
    cuda_check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
  }
  [[nodiscard]] static std::uint64_t read_word(int device, const void* from) {
    const DeviceGuard guard(device);
    std::uint64_t word = 0;
    cuda_check(cudaMemcpy(&word, from, sizeof(word), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return word;
  }

  /// Maps every rank's memory; what went wrong, or "".
  [[nodiscard]] std::string import(int rank, std::span<const Offer> offers,
                                   const ReceivedDescriptors& received) {
    const int device = mine_.device();
    try {
      for (std::size_t r = 0; r < offers.size(); ++r) {
        const auto& theirs = offers[r];
        if (static_cast<int>(r) == rank) {
          peers_.push_back(mine_.data());
        } else {  // also of ranks that are threads on one card: each may go when it likes
          imported_.push_back(DeviceMapping::import(device, static_cast<std::size_t>(theirs.bytes),
                                                    received.descriptors[r].get()));
          peers_.push_back(imported_.back().data());
        }
        if (read_word(device, peers_.back()) != theirs.proof) {
          return fmt::format("the memory mapped for rank {} is not rank {}'s", r, r);
        }
      }
    } catch (const Error& error) {
      return error.what();
    }
    return {};
  }

  DeviceMapping mine_;
  std::vector<DeviceMapping> imported_;
  std::vector<void*> peers_;
};

}  // namespace cohort
