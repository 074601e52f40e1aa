// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/profiler_ranges.hpp"

#include <cstdint>
#include <string>
#include <string_view>

// NVTX finds a tool by itself, at its first call; without one its functions return at once.
// Toolkits that are put together from packages may lack it: then there are no ranges.
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>

namespace cohort {
namespace {

nvtxDomainHandle_t domain() noexcept {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("cohort");
  return handle;
}

}  // namespace

ProfilerRanges::ProfilerRanges(const std::string& group) {
  if (domain() == nullptr) {
    return;  // no tool
  }
  for (std::size_t call = 0; call < kCalls; ++call) {
    const std::string_view name = to_string(static_cast<TraceCall>(call));
    names_[call] = nvtxDomainRegisterStringA(domain(), (std::string(name) + " " + group).c_str());
  }
}

void ProfilerRanges::push(TraceCall call) const noexcept {
  nvtxStringHandle_t const name =
      static_cast<nvtxStringHandle_t>(names_[static_cast<std::size_t>(call)]);
  if (name == nullptr) {
    return;
  }
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = static_cast<std::uint16_t>(sizeof(attributes));
  attributes.messageType = NVTX_MESSAGE_TYPE_REGISTERED;
  attributes.message.registered = name;
  static_cast<void>(nvtxDomainRangePushEx(domain(), &attributes));
}

void ProfilerRanges::pop() noexcept { static_cast<void>(nvtxDomainRangePop(domain())); }

}  // namespace cohort

#else

namespace cohort {

ProfilerRanges::ProfilerRanges(const std::string&) {}
void ProfilerRanges::push(TraceCall) const noexcept {}
void ProfilerRanges::pop() noexcept {}

}  // namespace cohort

#endif
