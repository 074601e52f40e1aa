// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cohort/group_coordinator.hpp"

/// \file
/// The pipeline-parallel group: every rank holds a stage of consecutive layers.

namespace cohort {

/// A tensor with the name under which the other stage knows it.
struct NamedView {
  std::string name;   ///< By which the receiver finds it.
  TensorView tensor;  ///< What is sent.
};
/// A tensor that came, with its name.
struct NamedTensor {
  std::string name;  ///< What the sender called it.
  Tensor tensor;     ///< What came, in memory of its own.
};

/// Besides the collectives, the hand-over between neighbouring stages. Stages are ranks in the
/// group, from 0.
class PipelineParallelGroup : public GroupCoordinator {
 public:
  /// Made by `ParallelState::create`.
  using GroupCoordinator::GroupCoordinator;

  /// Whether this is the first stage.
  [[nodiscard]] bool is_first() const noexcept { return rank() == 0; }
  /// Whether this is the last stage.
  [[nodiscard]] bool is_last() const noexcept { return rank() == size() - 1; }
  /// The stage before, as a rank in the group; none at the first.
  [[nodiscard]] std::optional<int> prev() const noexcept {
    return is_first() ? std::nullopt : std::optional(rank() - 1);
  }
  /// The stage behind, as a rank in the group; none at the last.
  [[nodiscard]] std::optional<int> next() const noexcept {
    return is_last() ? std::nullopt : std::optional(rank() + 1);
  }

  /// Hands a named set of tensors to the next stage. Matched by one receive there. Names, dtypes
  /// and shapes travel over the control plane at the call, so a captured hand-over is checked once.
  /// Throws `UsageError` on the last stage.
  void send_tensors(std::span<const NamedView> tensors, StreamRef stream = {}) {
    throw_if_closed();
    const int to = neighbour("send_tensors", next(), "last");
    Bytes description;
    for (const auto& [name, tensor] : tensors) {
      check_device(fmt::format("send_tensors {}", name), tensor);
      append(description, name, tensor);
    }
    const detail::CallTime time;
    const std::uint64_t length = description.size();
    Bytes header(sizeof(length));
    std::memcpy(header.data(), &length, sizeof(length));
    std::vector<ControlPlane::Outgoing> outgoing;
    outgoing.push_back({to, std::move(header)});
    outgoing.push_back({to, std::move(description)});
    control().exchange(std::move(outgoing), {});
    for (const auto& entry : tensors) {
      send(entry.tensor, to, stream);
    }
  }

  /// Receives the previous stage's set into these tensors. Throws `SymmetryError` naming the first
  /// name, dtype or shape that differs, before any byte is received; the bytes of that hand-over
  /// are then received and dropped, so the group works on. `UsageError` on the first stage, and for
  /// tensors that overlap.
  void recv_tensors_into(std::span<const NamedView> tensors, StreamRef stream = {}) {
    const int from = neighbour("recv_tensors", prev(), "first");
    for (const auto& [name, tensor] : tensors) {
      const std::string argument = fmt::format("recv_tensors {}", name);
      check_device(argument, tensor);
      check_distinct(argument, tensor);
    }
    for (std::size_t i = 1; i < tensors.size(); ++i) {
      for (std::size_t other = 0; other < i; ++other) {
        if (overlap(tensors[i].tensor, tensors[other].tensor)) {
          throw UsageError(fmt::format("recv_tensors {}: must not overlap {}", tensors[i].name,
                                       tensors[other].name));
        }
      }
    }
    const detail::CallTime time;
    const auto described = receive_description(from);
    std::string difference;
    if (described.size() != tensors.size()) {
      difference = fmt::format("{} tensors instead of {}", described.size(), tensors.size());
    }
    for (std::size_t i = 0; difference.empty() && i < tensors.size(); ++i) {
      const auto& [name, dtype, shape] = described[i];
      const auto& mine = tensors[i];
      if (name != mine.name || dtype != mine.tensor.dtype() || shape != mine.tensor.shape()) {
        difference = fmt::format("{} {}{} where {} {}{} was expected", name, to_string(dtype),
                                 to_string(shape), mine.name, to_string(mine.tensor.dtype()),
                                 to_string(mine.tensor.shape()));
      }
    }
    if (!difference.empty()) {
      receive_described(described, from, stream);
      throw SymmetryError(
          fmt::format("recv_tensors in group {}: stage {} sent {}", name(), from, difference),
          {from});
    }
    for (const auto& entry : tensors) {
      recv(entry.tensor, from, stream);
    }
  }

  /// Receives whatever set the previous stage hands over, in new tensors of ordinary memory: a
  /// symmetric arena cannot hold what one stage alone allocates. Throws `UsageError` on the first
  /// stage.
  [[nodiscard]] std::vector<NamedTensor> recv_tensors(StreamRef stream = {}) {
    const int from = neighbour("recv_tensors", prev(), "first");
    const detail::CallTime time;
    return receive_described(receive_description(from), from, stream);
  }

 private:
  struct Description {
    std::string name;
    DType dtype = DType::u8;
    Dims shape;
  };

  int neighbour(std::string_view call, std::optional<int> peer, std::string_view end) const {
    throw_if_closed();
    if (!peer) {
      throw UsageError(fmt::format("{}: this is the {} stage of group {}", call, end, name()));
    }
    return *peer;
  }

  /// Appends: length of the name, dtype, dimensions, extents, the name.
  static void append(Bytes& out, const std::string& name, const TensorView& tensor) {
    std::array<std::int64_t, 3 + kMaxDims> words{};
    words[0] = static_cast<std::int64_t>(name.size());
    words[1] = static_cast<std::int64_t>(tensor.dtype());
    words[2] = tensor.ndim();
    std::copy(tensor.shape().begin(), tensor.shape().end(), words.begin() + 3);
    const auto bytes = std::as_bytes(std::span(words));
    out.insert(out.end(), bytes.begin(), bytes.end());
    const auto text = std::as_bytes(std::span(name));
    out.insert(out.end(), text.begin(), text.end());
  }

  [[nodiscard]] std::vector<Description> receive_description(int from) {
    const ControlPlane::Incoming header{from, sizeof(std::uint64_t)};
    std::uint64_t length = 0;
    std::memcpy(&length, control().exchange({}, std::span(&header, 1))[0].data(), sizeof(length));
    const ControlPlane::Incoming body{from, static_cast<std::size_t>(length)};
    const Bytes bytes = std::move(control().exchange({}, std::span(&body, 1))[0]);

    std::vector<Description> described;
    std::span<const std::byte> rest(bytes);
    std::array<std::int64_t, 3 + kMaxDims> words{};
    while (rest.size() >= sizeof(words)) {
      std::memcpy(words.data(), rest.data(), sizeof(words));
      rest = rest.subspan(sizeof(words));
      const auto length_of_name =
          std::min<std::size_t>(static_cast<std::size_t>(words[0]), rest.size());
      const auto dims = static_cast<std::size_t>(std::clamp<std::int64_t>(words[2], 0, kMaxDims));
      described.push_back(
          {.name = std::string(reinterpret_cast<const char*>(rest.data()), length_of_name),
           .dtype = static_cast<DType>(words[1]),
           .shape = Dims(std::span<const std::int64_t>(words).subspan(3, dims))});
      rest = rest.subspan(length_of_name);
    }
    return described;
  }

  std::vector<NamedTensor> receive_described(const std::vector<Description>& described, int from,
                                             StreamRef stream) {
    std::vector<NamedTensor> tensors;
    for (const auto& [name, dtype, shape] : described) {
      tensors.push_back({name, backend().allocate(shape, dtype, stream)});
      recv(tensors.back().tensor, from, stream);
    }
    return tensors;
  }
};

}  // namespace cohort
