// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/stream.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// Where the tensors live. The example does its attention and its model on the host, so that it
/// needs no kernels of its own; on a device the tensors go to and fro in stream order.

namespace example {

enum class BackendChoice : std::uint8_t { automatic, host, cuda };

/// A backend with one stream.
class Machine {
 public:
  Machine() = default;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  virtual ~Machine() = default;

  [[nodiscard]] virtual std::shared_ptr<cohort::Backend> backend() = 0;
  [[nodiscard]] virtual cohort::StreamRef stream() = 0;

  /// Host memory for the elements of a tensor: the tensor's own where that is on the host.
  [[nodiscard]] virtual std::shared_ptr<void> mirror(const cohort::TensorView& tensor) = 0;
  /// Copy a contiguous tensor's elements from and to its mirror, in stream order.
  virtual void upload(const void* mirror, const cohort::TensorView& tensor) = 0;
  virtual void download(const cohort::TensorView& tensor, void* mirror) = 0;
};

/// A tensor with its mirror.
template <class T>
class Mirrored {
 public:
  Mirrored(Machine& machine, cohort::Tensor tensor)
      : machine_(&machine), tensor_(std::move(tensor)), mirror_(machine.mirror(tensor_)) {}

  [[nodiscard]] const cohort::TensorView& view() const { return tensor_.view(); }
  [[nodiscard]] T* host() const { return static_cast<T*>(mirror_.get()); }
  [[nodiscard]] T& operator[](std::size_t i) const { return host()[i]; }
  [[nodiscard]] std::size_t size() const { return static_cast<std::size_t>(tensor_.numel()); }
  void upload() const { machine_->upload(mirror_.get(), tensor_); }
  void download() const { machine_->download(tensor_, mirror_.get()); }

 private:
  Machine* machine_;
  cohort::Tensor tensor_;
  std::shared_ptr<void> mirror_;
};

/// Why this process cannot use a CUDA device, or nothing where it can.
[[nodiscard]] std::string cuda_obstacle();

/// What the command line of an example says.
struct Arguments {
  std::vector<int> numbers;
  BackendChoice backend = BackendChoice::host;  ///< Of --backend.
};

/// Reads it before MPI starts. Ends the program for --help, which prints `help`, and for what
/// cannot be understood: other options, or more than `most` numbers.
[[nodiscard]] Arguments arguments(int argc, char** argv, std::string_view help,
                                  std::size_t most = 0);

/// The machine for `host` or `cuda`; `automatic` is `cuda` where that can be used. @throw
/// cohort::ConfigError where cuda cannot be had.
[[nodiscard]] std::unique_ptr<Machine> make_machine(BackendChoice choice);

}  // namespace example
