// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/hash.hpp"
#include "cohort/machine.hpp"
#include "cohort/system_calls.hpp"
#include "cohort/trace_writer.hpp"
#include "cohort/traced_agreement.hpp"

/// \file
/// The traces of a state while its ranks form it: what they have in common, and how far each came.

namespace cohort::detail {

/// Not 0.
[[nodiscard]] inline std::uint64_t random_number() noexcept {
  std::uint64_t number = 0;
  if (os::random_bytes(std::as_writable_bytes(std::span(&number, 1))) != 0) {
    number =
        static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  }
  return std::max<std::uint64_t>(1, number);
}

/// Equal on ranks of one machine; where it has no name, of this rank alone.
[[nodiscard]] inline std::uint64_t machine_number() {
  const std::string name = boot_id();
  return name.empty() ? random_number() : hash_text(name);
}

/// Collective. What the traces of a state have in common. Throws what the control plane throws.
[[nodiscard]] inline TraceRun agree_on_trace_run(ControlPlane& world) {
  using Said = std::array<std::uint64_t, 2>;  // a number, and the machine
  const Said mine{random_number(), machine_number()};
  TraceRun run;
  std::vector<std::uint64_t> machines;
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(mine)))) {
    Said theirs{};
    if (bytes.size() != sizeof(theirs)) {
      throw SymmetryError(
          fmt::format("group {}: rank {} sent {} bytes where {} were expected for a trace",
                      world.name(), run.hosts.size(), bytes.size(), sizeof(theirs)),
          {static_cast<int>(run.hosts.size())});
    }
    std::memcpy(theirs.data(), bytes.data(), sizeof(theirs));
    run.id = run.id != 0 ? run.id : theirs[0];
    const auto known = std::find(machines.begin(), machines.end(), theirs[1]);
    run.hosts.push_back(static_cast<int>(known - machines.begin()));
    if (known == machines.end()) {
      machines.push_back(theirs[1]);
    }
  }
  return run;
}

/// Records what the ranks agree on while they form a state, as if in a group of all of them.
class TracedFormation {
 public:
  TracedFormation(StateTrace& trace, ControlPlane& world)
      : trace_(trace), world_(world), recorder_(recorder_of(world)) {
    trace_.add(recorder_);
    world_.record_in(recorder_);
  }
  TracedFormation(const TracedFormation&) = delete;
  TracedFormation& operator=(const TracedFormation&) = delete;
  ~TracedFormation() {
    world_.record_in(nullptr);
    recorder_->close();
    trace_.remove(*recorder_);
  }

  /// A part of it in which ranks wait for each other; the name is the same on all of them.
  /// @param others  Whether these are all ranks.
  template <class Body>
  auto part(std::string_view name, const Body& body, bool others) {
    const TracedAgreement traced(recorder_.get(), name, 0);
    return reporting(recorder_.get(), body, others);
  }

 private:
  [[nodiscard]] static std::shared_ptr<FlightRecorder> recorder_of(const ControlPlane& world) {
    std::vector<int> ranks(static_cast<std::size_t>(world.size()));
    std::iota(ranks.begin(), ranks.end(), 0);
    return std::make_shared<FlightRecorder>("the formation of the state", world.rank(),
                                            std::move(ranks), TraceRings{});
  }

  StateTrace& trace_;
  ControlPlane& world_;
  std::shared_ptr<FlightRecorder> recorder_;
};

}  // namespace cohort::detail
