// SPDX-License-Identifier: Apache-2.0
#include "cohort/error.hpp"
#include "exchange.hpp"

namespace decode_engine {

namespace {

[[noreturn]] void refuse() {
  throw cohort::ConfigError("--backend cuda: decode_engine was built without CUDA");
}

}  // namespace

std::unique_ptr<Device> make_cuda_device() { refuse(); }

std::unique_ptr<Exchange> make_nccl_exchange(cohort::ControlPlane&, Device&, const Sizes&,
                                             const Place&) {
  refuse();
}

}  // namespace decode_engine
