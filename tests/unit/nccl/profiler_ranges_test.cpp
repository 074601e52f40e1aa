// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/profiler_ranges.hpp"

// The types that a tool needs, without NVTX itself, which is in the library.
#define NVTX_NO_IMPL
#include <nvtx3/nvToolsExt.h>

#include <string>
#include <vector>

#include "support/catch.hpp"

// This program is its own tool: it writes down what a profiler would show.

namespace {

bool attached = false;
std::vector<std::string> shown;

nvtxDomainHandle_t create(const char* name) {
  return reinterpret_cast<nvtxDomainHandle_t>(new std::string(name));
}
nvtxStringHandle_t add(nvtxDomainHandle_t, const char* text) {
  return reinterpret_cast<nvtxStringHandle_t>(new std::string(text));
}
int push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* range) {
  shown.push_back(*reinterpret_cast<const std::string*>(domain) + ": " +
                  *reinterpret_cast<const std::string*>(range->message.registered));
  return 0;
}
int pop(nvtxDomainHandle_t) {
  shown.emplace_back("end");
  return 0;
}

int attach(NvtxGetExportTableFunc_t get_table) {
  const auto* const callbacks =
      static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0) {
    return 0;
  }
  *table[NVTX_CBID_CORE2_DomainCreateA] = reinterpret_cast<NvtxFunctionPointer>(create);
  *table[NVTX_CBID_CORE2_DomainRegisterStringA] = reinterpret_cast<NvtxFunctionPointer>(add);
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = reinterpret_cast<NvtxFunctionPointer>(push);
  *table[NVTX_CBID_CORE2_DomainRangePop] = reinterpret_cast<NvtxFunctionPointer>(pop);
  attached = true;
  return 1;
}

}  // namespace

extern "C" {
NvtxInitializeInjectionNvtxFunc_t InitializeInjectionNvtx2_fnptr = attach;
}

TEST_CASE("a profiler shows calls by name and group", "[profiler_ranges]") {
  const cohort::ProfilerRanges tp("tp[0]");
  const cohort::ProfilerRanges dcp("dcp[1]");
  tp.begin(cohort::TraceCall::all_gather);
  tp.end();
  dcp.begin(cohort::TraceCall::merge_attention);
  dcp.end();
  if (cohort::test::skip_if(!attached, "the NVTX of this CUDA takes no tool that is linked in")) {
    return;
  }
  CHECK(shown == std::vector<std::string>{"cohort: all_gather tp[0]", "end",
                                          "cohort: merge_attention dcp[1]", "end"});
}
