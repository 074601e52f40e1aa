// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "cohort/cuda/driver.hpp"
#include "cohort/cuda/handles.hpp"

/// \file
/// Names of the kernels that a captured graph launches: what proves which path a call took.

namespace cohort::test {

/// In the order in which CUDA lists the nodes; kernels only. The driver is asked, because NCCL's
/// kernels are not the runtime's.
[[nodiscard]] inline std::vector<std::string> kernel_names(cudaGraph_t graph) {
  static const auto functions = [] {
    struct {
      decltype(&::cuGraphKernelNodeGetParams) params = nullptr;
      decltype(&::cuFuncGetName) function_name = nullptr;
      decltype(&::cuKernelGetName) kernel_name = nullptr;
    } found;
    void* params = nullptr;
    cudaDriverEntryPointQueryResult result{};
    // The struct of this function grew with CUDA 12.0, under the name that cuda.h maps to.
    cuda_check(cudaGetDriverEntryPointByVersion("cuGraphKernelNodeGetParams", &params, 12000,
                                                cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
    found.params = reinterpret_cast<decltype(found.params)>(params);
    void* name = nullptr;
    cuda_check(
        cudaGetDriverEntryPointByVersion("cuFuncGetName", &name, 12030, cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion");
    found.function_name = reinterpret_cast<decltype(found.function_name)>(name);
    cuda_check(cudaGetDriverEntryPointByVersion("cuKernelGetName", &name, 12030, cudaEnableDefault,
                                                &result),
               "cudaGetDriverEntryPointByVersion");
    found.kernel_name = reinterpret_cast<decltype(found.kernel_name)>(name);
    return found;
  }();

  std::size_t count = 0;
  cuda_check(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes");
  std::vector<cudaGraphNode_t> nodes(count);
  cuda_check(cudaGraphGetNodes(graph, nodes.data(), &count), "cudaGraphGetNodes");
  std::vector<std::string> names;
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    cuda_check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    if (type != cudaGraphNodeTypeKernel) {
      continue;
    }
    CUDA_KERNEL_NODE_PARAMS params{};
    detail::driver_check(functions.params(node, &params), "cuGraphKernelNodeGetParams");
    const char* name = nullptr;
    const CUresult code = params.func != nullptr ? functions.function_name(&name, params.func)
                                                 : functions.kernel_name(&name, params.kern);
    detail::driver_check(code, "cuFuncGetName");
    names.emplace_back(name);
  }
  return names;
}

/// Number of names that contain `part`.
[[nodiscard]] inline int count_with(const std::vector<std::string>& names,
                                    const std::string& part) {
  int count = 0;
  for (const auto& name : names) {
    count += name.find(part) != std::string::npos ? 1 : 0;
  }
  return count;
}

}  // namespace cohort::test
