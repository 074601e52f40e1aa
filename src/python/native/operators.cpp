// SPDX-License-Identifier: Apache-2.0

// The operators of the Python package: what torch.ops.cohort has. Built without Python's headers,
// so that one library serves every interpreter that the installed torch serves.

#include <torch/library.h>

#include <string>
#include <string_view>
#include <utility>

#include "autograd.hpp"
#include "cohort/torch.hpp"
#include "collective_operators.hpp"
#include "decode_operators.hpp"
#include "group_operators.hpp"
#include "meeting.hpp"
#include "norm_operators.hpp"
#include "process_end.hpp"
#include "signals.hpp"
#include "state_operators.hpp"

namespace cohort::python {
namespace {

/// `Function` with the library's errors as torch's, and what a signal's handler has thrown.
template <auto Function>
struct Operator;
template <class Result, class... Arguments, Result (*Function)(Arguments...)>
struct Operator<Function> {
  static Result call(Arguments... arguments) {
    const ProcessEnd::Return last;
    return Interruption::or_result_of([&]() -> Result {
      return with_torch_errors(
          [&]() -> Result { return Function(std::forward<Arguments>(arguments)...); });
    });
  }
};

template <auto Function>
inline constexpr auto* as_operator = &Operator<Function>::call;

/// Calls `visit` with the schema and the implementation of each operator that a compiler may have
/// in its graphs: what has a fake implementation.
template <class Visit>
void for_each_graph_operator(const Visit& visit) {
  visit("all_gather(Tensor x, int dim, str group) -> Tensor", as_operator<&all_gather>);
  visit("all_gather_into(Tensor(a!) out, Tensor x, int dim, str group) -> ()",
        as_operator<&all_gather_into>);
  visit("reduce_scatter(Tensor x, int dim, str op, str group) -> Tensor",
        as_operator<&reduce_scatter>);
  visit("reduce_scatter_into(Tensor(a!) out, Tensor x, int dim, str op, str group) -> ()",
        as_operator<&reduce_scatter_into>);
  visit("all_reduce(Tensor x, str op, str group) -> Tensor", as_operator<&all_reduce>);
  visit("all_reduce_(Tensor(a!) x, str op, str group) -> ()", as_operator<&all_reduce_>);
  visit("all_reduce_into(Tensor(a!) out, Tensor x, str op, str group) -> ()",
        as_operator<&all_reduce_into>);
  visit("broadcast_(Tensor(a!) x, int src, str group) -> ()", as_operator<&broadcast_>);
  visit("all_to_all(Tensor x, str group) -> Tensor", as_operator<&all_to_all>);
  visit("send(Tensor x, int dst, str group) -> ()", as_operator<&send>);
  visit("recv_(Tensor(a!) x, int src, str group) -> ()", as_operator<&recv_>);
  visit("send_tensors(str[] names, Tensor[] tensors, str group) -> ()", as_operator<&send_tensors>);
  visit("gather_query(Tensor q_nope, Tensor q_pe, str group) -> Tensor",
        as_operator<&gather_query>);
  visit("gather_query_into(Tensor(a!) q, Tensor q_nope, Tensor q_pe, str group) -> ()",
        as_operator<&gather_query_into>);
  visit(
      "merge_attention(Tensor out, Tensor lse, bool base2, bool replicated, Tensor? sink, "
      "Tensor? local_tokens, str group) -> Tensor",
      as_operator<&merge_attention>);
  visit(
      "merge_attention_lse(Tensor out, Tensor lse, bool base2, bool replicated, Tensor? sink, "
      "Tensor? local_tokens, str group) -> (Tensor, Tensor)",
      as_operator<&merge_attention_lse>);
  visit(
      "merge_attention_into(Tensor(a!) merged, Tensor out, Tensor lse, bool base2, "
      "bool replicated, Tensor? sink, Tensor? local_tokens, Tensor(b!)? merged_lse, str group) "
      "-> ()",
      as_operator<&merge_attention_into>);
  visit(
      "all_reduce_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, Tensor? scale, "
      "str group) -> Tensor",
      as_operator<&all_reduce_rms_norm>);
  visit(
      "all_reduce_rms_norm_into(Tensor(a!) out, Tensor x, Tensor(b!) residual, Tensor weight, "
      "float eps, Tensor? scale, str group) -> ()",
      as_operator<&all_reduce_rms_norm_into>);
  visit("barrier(str group) -> ()", as_operator<&barrier>);
}

[[nodiscard]] std::string name_in(std::string_view schema) {
  return std::string(schema.substr(0, schema.find('(')));
}

TORCH_LIBRARY(cohort, m) {
  for_each_graph_operator([&](const char* schema, auto) { m.def(schema); });
  m.def(
      "parallel_state(str control, int[] meeting, int[] layout, int device, str[] symmetric, "
      "str merge_plan, bool peer_mapping, bool debug_checks, int limit_ms, int growth_bytes) "
      "-> int",
      as_operator<&parallel_state>);
  m.def("shutdown(int state) -> ()", as_operator<&shutdown>);
  m.def("drop(int state) -> ()", as_operator<&drop>);
  m.def("groups(int state) -> str[]", as_operator<&groups>);
  m.def("describe(int state) -> str[]", as_operator<&describe>);
  m.def("synchronize(int state, int limit_ms) -> ()", as_operator<&synchronize>);
  m.def("order(int state) -> ()", as_operator<&order>);
  m.def("launched(int state) -> ()", as_operator<&launched>);
  m.def("reclaim_graphs(int state) -> ()", as_operator<&reclaim_graphs>);
  m.def("begin_graphs(int state, bool pooled) -> ()", as_operator<&begin_graphs>);
  m.def("end_graphs(int state) -> ()", as_operator<&end_graphs>);
  m.def("interpreter_ends() -> ()", as_operator<&interpreter_ends>);
  m.def("finalize_mpi(bool in_order) -> ()", as_operator<&finalize_mpi>);
  m.def("finalize_mpi_by_status() -> ()", as_operator<&finalize_mpi_by_status>);
  m.def("nccl_version() -> int", as_operator<&nccl_version>);
  m.def("built_for() -> str", as_operator<&built_for>);
  m.def("parts() -> str[]", as_operator<&parts>);
  m.def("members(str group) -> int[]", as_operator<&members>);
  m.def("reserve(str group, int size) -> ()", as_operator<&reserve>);
  m.def(
      "reserve_for(str group, int[] shape, ScalarType dtype, ScalarType? query_dtype, "
      "ScalarType? rope_dtype) -> ()",
      as_operator<&reserve_for>);
  m.def("freeze(str group) -> ()", as_operator<&freeze>);
  m.def("arena(str group) -> int[]", as_operator<&arena>);
  m.def("arena_offset(Tensor x, str group) -> int", as_operator<&arena_offset>);
  m.def("path(str collective, Tensor x, Tensor out, int dim, str group) -> str",
        as_operator<&path>);
  m.def("last_merge(str group) -> str[]", as_operator<&last_merge>);
  m.def("enter_symmetric(str group, bool disabled) -> ()", as_operator<&enter_symmetric>);
  m.def("leave_symmetric() -> ()", as_operator<&leave_symmetric>);
  m.def("enter_pools(str group) -> int[]", as_operator<&enter_pools>);
  m.def("has_symmetric_memory(str group) -> bool", as_operator<&has_symmetric_memory>);
  m.def("capture(str group) -> int", as_operator<&capture>);
  m.def("empty(int[] size, ScalarType dtype, str group) -> Tensor", as_operator<&empty>);
  m.def("empty_in_scope(int[] size, ScalarType dtype) -> Tensor", as_operator<&empty_in_scope>);
  m.def("recv_tensors(str group) -> (str[], Tensor[])", as_operator<&recv_tensors>);
  m.def("record_stream(Tensor x, int state) -> ()", as_operator<&record_stream>);
}

void implement(torch::Library& m) {
  for_each_graph_operator(
      [&](const char* schema, auto function) { m.impl(name_in(schema).c_str(), function); });
}

/// For every backend, and for calls without a tensor: which tensors it takes the library says
/// itself.
TORCH_LIBRARY_IMPL(cohort, CompositeExplicitAutograd, m) { implement(m); }
TORCH_LIBRARY_IMPL(cohort, NestedTensorCPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(cohort, NestedTensorCUDA, m) { implement(m); }

TORCH_LIBRARY_IMPL(cohort, FuncTorchBatched, m) {
  for_each_graph_operator([&](const char* schema, auto) {
    m.impl(name_in(schema).c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
  });
}

TORCH_LIBRARY_IMPL(cohort, ADInplaceOrView, m) {
  for_each_graph_operator([&](const char* schema, auto) {
    if (std::string_view(schema).find("!)") != std::string_view::npos) {
      m.impl(name_in(schema).c_str(), torch::CppFunction::makeFromBoxedFunction<&count_writes>());
    }
  });
}

TORCH_LIBRARY_IMPL(cohort, Autograd, m) {
  for_each_graph_operator([&](const char* schema, auto) {
    m.impl(name_in(schema).c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_backward>());
  });
}

}  // namespace
}  // namespace cohort::python
