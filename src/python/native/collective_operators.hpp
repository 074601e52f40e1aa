// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/torch.hpp"
#include "engines.hpp"
#include "operands.hpp"

/// \file
/// The collectives that every group has, and the messages between pairs.

namespace cohort::python {

inline void all_gather_into(const at::Tensor& out, const at::Tensor& x, std::int64_t dim,
                            Name group) {
  const GroupUse<> use(group);
  use->all_gather_into(view_of(out), const_view_of(x), as_int(dim), use.stream());
}

inline at::Tensor all_gather(const at::Tensor& x, std::int64_t dim, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const at::Tensor out =
      use.result(scaled(x, dim, use->size(), "all_gather x dim"), x.scalar_type());
  use->all_gather_into(view_of(out), in, as_int(dim), use.stream());
  return out;
}

inline void reduce_scatter_into(const at::Tensor& out, const at::Tensor& x, std::int64_t dim,
                                Name op, Name group) {
  const GroupUse<> use(group);
  use->reduce_scatter_into(view_of(out), const_view_of(x), as_int(dim), use.stream(), op_of(op));
}

inline at::Tensor reduce_scatter(const at::Tensor& x, std::int64_t dim, Name op, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const at::Tensor out =
      use.result(scaled(x, dim, -use->size(), "reduce_scatter x dim"), x.scalar_type());
  use->reduce_scatter_into(view_of(out), in, as_int(dim), use.stream(), op_of(op));
  return out;
}

inline void all_reduce_into(const at::Tensor& out, const at::Tensor& x, Name op, Name group) {
  const GroupUse<> use(group);
  use->all_reduce_into(view_of(out), const_view_of(x), use.stream(), op_of(op));
}

inline void all_reduce_(const at::Tensor& x, Name op, Name group) {
  const GroupUse<> use(group);
  use->all_reduce(view_of(x), use.stream(), op_of(op));
}

inline at::Tensor all_reduce(const at::Tensor& x, Name op, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const at::Tensor out = use.result(x.sizes().vec(), x.scalar_type());
  use->all_reduce_into(view_of(out), in, use.stream(), op_of(op));
  return out;
}

inline void broadcast_(const at::Tensor& x, std::int64_t root, Name group) {
  const GroupUse<> use(group);
  use->broadcast(view_of(x), as_int(root), use.stream());
}

inline at::Tensor all_to_all(const at::Tensor& x, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const at::Tensor out = use.result(x.sizes().vec(), x.scalar_type());
  use->all_to_all_into(view_of(out), in, use.stream());
  return out;
}

inline void send(const at::Tensor& x, std::int64_t to, Name group) {
  const GroupUse<> use(group);
  use->send(const_view_of(x), as_int(to), use.stream());
}

inline void recv_(const at::Tensor& x, std::int64_t from, Name group) {
  const GroupUse<> use(group);
  use->recv(view_of(x), as_int(from), use.stream());
}

inline void send_tensors(Names names, const std::vector<at::Tensor>& tensors, Name group) {
  const PpUse use(group);
  std::vector<NamedView> views;
  for (std::size_t i = 0; i < names.size(); ++i) {
    views.push_back({names[i], view_of(tensors.at(i))});
  }
  use->send_tensors(views, use.stream());
}

inline std::tuple<Names, std::vector<at::Tensor>> recv_tensors(Name group) {
  const PpUse use(group);
  std::tuple<Names, std::vector<at::Tensor>> received;
  for (NamedTensor& entry : use->recv_tensors(use.stream())) {
    std::get<0>(received).push_back(std::move(entry.name));
    std::get<1>(received).push_back(to_torch(std::move(entry.tensor), use.engine().backend));
  }
  return received;
}

}  // namespace cohort::python
