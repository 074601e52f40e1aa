// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cohort/cohort.hpp>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "support/group_tensors.hpp"
#include "support/skip.hpp"

/// \file
/// Every collective of a group against answers computed here from the inputs' formula. Each check
/// is collective and throws where an element is wrong.

namespace cohort::test {

/// [outer, extent, inner] of a shape about a dimension.
struct Around {
  std::int64_t outer = 1;
  std::int64_t extent = 1;
  std::int64_t inner = 1;

  Around(const Dims& shape, int dim) : extent(shape[dim]) {
    for (int d = 0; d < shape.size(); ++d) {
      (d < dim ? outer : inner) *= d == dim ? 1 : shape[d];
    }
  }
};

[[nodiscard]] inline int from_front(int dim, const Dims& shape) {
  return dim < 0 ? dim + shape.size() : dim;
}
[[nodiscard]] inline std::vector<std::int64_t> uneven(std::int64_t total, int n) {
  std::vector<std::int64_t> sizes;
  for (int r = 0; r < n; ++r) {
    sizes.push_back(total * (r + 1) / n - total * r / n);
  }
  return sizes;
}
[[nodiscard]] inline std::int64_t sum_of(const std::vector<std::int64_t>& sizes, int until) {
  return std::accumulate(sizes.begin(), sizes.begin() + until, std::int64_t{0});
}

/// Every rank's part has `sizes[r]` extents of `dim`; `shape` gives the others.
inline void check_all_gather(GroupCoordinator& group, Site& site, Dims shape, int dim,
                             const std::vector<std::int64_t>& sizes, DType dtype, Form form,
                             StreamRef stream = {}) {
  const int d = from_front(dim, shape);
  const bool equal = std::count(sizes.begin(), sizes.end(), sizes[0]) == group.size();
  Dims widest = shape;
  widest[d] = *std::max_element(sizes.begin(), sizes.end());
  shape[d] = sizes[u(group.rank())];
  const auto x = site.tensor(shape, widest, dtype, form);
  fill(x, group.rank());
  Dims whole = shape;
  whole[d] = sum_of(sizes, group.size());
  const Around around(whole, d);
  std::vector<int> owner;
  std::vector<std::int64_t> within;
  for (int r = 0; r < group.size(); ++r) {
    for (std::int64_t i = 0; i < sizes[u(r)]; ++i) {
      owner.push_back(r);
      within.push_back(i);
    }
  }
  const auto expected = [&](std::int64_t flat) {
    const std::int64_t i = flat % around.inner;
    const std::int64_t a = flat / around.inner % around.extent;
    const std::int64_t o = flat / around.inner / around.extent;
    const int r = owner[u(a)];
    return value_at(r, (o * sizes[u(r)] + within[u(a)]) * around.inner + i);
  };
  const auto out = site.tensor(whole, dtype, form);
  if (equal) {
    group.all_gather_into(out, x, dim, stream);
  } else {
    group.all_gatherv_into(out, x, sizes, dim, stream);
  }
  check_values(out, "all_gather_into", expected);
  const Tensor result =
      equal ? group.all_gather(x, dim, stream) : group.all_gatherv(x, sizes, dim, stream);
  check(result.shape() == whole, "shape of all_gather");
  check_values(result, "all_gather", expected);
}

/// The input has `shape` on every rank; rank r gets `sizes[r]` extents of `dim`.
inline void check_reduce_scatter(GroupCoordinator& group, Site& site, const Dims& shape, int dim,
                                 const std::vector<std::int64_t>& sizes, DType dtype, Form form,
                                 StreamRef stream = {}) {
  const int d = from_front(dim, shape);
  const bool equal = std::count(sizes.begin(), sizes.end(), sizes[0]) == group.size();
  const auto x = site.filled(shape, dtype, form);
  Dims part = shape;
  part[d] = sizes[u(group.rank())];
  const Around around(part, d);
  const std::int64_t first = sum_of(sizes, group.rank());
  const auto expected = [&](std::int64_t flat) {
    const std::int64_t i = flat % around.inner;
    const std::int64_t a = flat / around.inner % around.extent;
    const std::int64_t o = flat / around.inner / around.extent;
    const std::int64_t at = (o * shape[d] + first + a) * around.inner + i;
    std::int64_t sum = 0;
    for (int r = 0; r < group.size(); ++r) {
      sum += value_at(r, at);
    }
    return sum;
  };
  Dims widest = shape;
  widest[d] = *std::max_element(sizes.begin(), sizes.end());
  const auto out = site.tensor(part, widest, dtype, form);
  if (equal) {
    group.reduce_scatter_into(out, x, dim, stream);
  } else {
    group.reduce_scatterv_into(out, x, sizes, dim, stream);
  }
  check_values(out, "reduce_scatter_into", expected);
  const Tensor result = equal ? group.reduce_scatter_along_dim(x, dim, stream)
                              : group.reduce_scatterv(x, sizes, dim, stream);
  check(result.shape() == part, "shape of reduce_scatter");
  check_values(result, "reduce_scatter", expected);
}

inline void check_all_reduce(GroupCoordinator& group, Site& site, const Dims& shape, DType dtype,
                             Form form, ReduceOp op = ReduceOp::sum, StreamRef stream = {}) {
  const auto expected = [&](std::int64_t flat) {
    std::int64_t result = value_at(0, flat);
    for (int r = 1; r < group.size(); ++r) {
      const std::int64_t x = value_at(r, flat);
      result = op == ReduceOp::sum   ? result + x
               : op == ReduceOp::max ? std::max(result, x)
               : op == ReduceOp::min ? std::min(result, x)
                                     : result * x;
    }
    return result;
  };
  const auto x = site.filled(shape, dtype, form);
  const auto out = site.tensor(shape, dtype, form);
  group.all_reduce_into(out, x, stream, op);
  check_values(out, "all_reduce_into", expected);
  group.all_reduce(x, stream, op);
  check_values(x, "all_reduce", expected);
}

inline void check_broadcast(GroupCoordinator& group, Site& site, const Dims& shape, DType dtype,
                            Form form, int root, StreamRef stream = {}) {
  const auto x = site.filled(shape, dtype, form);
  group.broadcast(x, root, stream);
  check_values(x, "broadcast", [&](std::int64_t flat) { return value_at(root, flat); });
}

inline void check_all_to_all(GroupCoordinator& group, Site& site, Dims shape, DType dtype,
                             Form form, StreamRef stream = {}) {
  shape[0] *= group.size();
  const auto x = site.filled(shape, dtype, form);
  const std::int64_t part = x.numel() / group.size();
  const auto expected = [&](std::int64_t flat) {
    return value_at(static_cast<int>(flat / part), group.rank() * part + flat % part);
  };
  const auto out = site.tensor(shape, dtype, form);
  group.all_to_all_into(out, x, stream);
  check_values(out, "all_to_all_into", expected);
  const Tensor result = group.all_to_all(x, stream);
  check_values(result, "all_to_all", expected);
}

/// Rank r sends to r + 1, one after the other around the ring.
inline void check_send_recv(GroupCoordinator& group, Site& site, const Dims& shape, DType dtype,
                            Form form, StreamRef stream = {}) {
  if (group.size() == 1) {
    return;
  }
  const auto mine = site.filled(shape, dtype, form);
  const auto theirs = site.tensor(shape, dtype, form);
  const int next = (group.rank() + 1) % group.size();
  const int previous = (group.rank() + group.size() - 1) % group.size();
  if (group.rank() == 0) {
    group.send(mine, next, stream);
    group.recv(theirs, previous, stream);
  } else {
    group.recv(theirs, previous, stream);
    group.send(mine, next, stream);
  }
  check_values(theirs, "recv", [&](std::int64_t flat) { return value_at(previous, flat); });
}

inline constexpr Memory kMemories[] = {Memory::arena, Memory::ordinary, Memory::mixed};
inline constexpr DType kFloats[] = {DType::f16, DType::bf16, DType::f32};

/// All-gather and reduce-scatter along every dimension, from both ends, of one shape.
inline void check_along_every_dim(GroupCoordinator& group, const Dims& shape, bool every_mix) {
  const int n = group.size();
  const auto check_mix = [&](int dim, int form, int dtype, int memory) {
    const std::int64_t extent = shape[from_front(dim, shape)];
    Site site(group, kMemories[memory]);
    check_all_gather(group, site, shape, dim, std::vector(u(n), extent), kFloats[dtype],
                     kForms[form]);
    check_reduce_scatter(group, site, shape, dim, uneven(extent, n), kFloats[dtype], kForms[form]);
  };
  for (int dim = -shape.size(); dim < shape.size(); ++dim) {
    const int turn = dim + shape.size();
    for (int form = 0; form < 3; ++form) {
      if (every_mix) {
        for (int mix = 0; mix < 9; ++mix) {
          check_mix(dim, form, mix / 3, mix % 3);
        }
      } else {  // by turns: six dims, as a shape of three has, take each form with each type and
                // each memory twice
        check_mix(dim, form, (form + turn) % 3, (2 * form + turn + turn / 3) % 3);
      }
    }
  }
}

/// Small shapes in every mix; large ones in every mix in the long run, in the short run by turns
/// and at two ranks.
inline void check_shapes(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& group = state.dcp();
  for (const auto& shape : {Dims{24}, Dims{3, 5}, Dims{3, 5, 7}, Dims{8, 16, 32}, Dims{2, 3, 4, 5},
                            Dims{2, 3, 2, 3, 2}}) {
    check_along_every_dim(group, shape, full_run() || world.size() <= 3);
  }
  if (full_run() || world.size() == 2) {
    for (const auto& shape : {Dims{16, 64, 128}, Dims{16, 3, 128}, Dims{64, 5, 512},
                              Dims{128, 7, 512}, Dims{4, 1024, 512}}) {
      check_along_every_dim(group, shape, full_run());
    }
  }
}

/// The v-variants with ranks that have nothing, and every other collective.
inline void check_every_collective(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  for (GroupCoordinator* group : {static_cast<GroupCoordinator*>(&state.dcp()),
                                  static_cast<GroupCoordinator*>(&state.world())}) {
    const int n = group->size();
    std::vector<std::int64_t> ragged;
    for (int r = 0; r < n; ++r) {
      ragged.push_back(n == 1 ? 2 : (r + 1) % 3);
    }
    for (const Memory memory : kMemories) {
      for (const Form form : kForms) {
        Site site(*group, memory);
        for (int dim = -3; dim < 3; ++dim) {
          check_all_gather(*group, site, {4, 3, 5}, dim, ragged, DType::bf16, form);
          Dims shape{4, 3, 5};
          shape[from_front(dim, shape)] = sum_of(ragged, n);
          check_reduce_scatter(*group, site, shape, dim, ragged, DType::f16, form);
        }
        for (const Dims& shape : {Dims{7}, Dims{3, 5, 7}, Dims{64, 130}}) {
          check_all_reduce(*group, site, shape, DType::f32, form);
          check_broadcast(*group, site, shape, DType::bf16, form, n - 1);
          check_all_to_all(*group, site, shape, DType::f16, form);
          check_send_recv(*group, site, shape, DType::i32, form);
          group->barrier();
        }
      }
    }
  }
}

inline void check_every_dtype(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& group = state.dcp();
  for (const DType dtype : kAllDTypes) {
    for (const Memory memory : kMemories) {
      Site site(group, memory);
      const Dims shape{2, 6, 5};
      check_all_gather(group, site, shape, 1, std::vector<std::int64_t>(u(group.size()), 6), dtype,
                       Form::transposed);
      check_broadcast(group, site, shape, dtype, Form::sliced, 0);
      check_all_to_all(group, site, shape, dtype, Form::contiguous);
      check_send_recv(group, site, shape, dtype, Form::transposed);
      if (is_reducible(dtype)) {
        check_reduce_scatter(group, site, shape, -2, uneven(6, group.size()), dtype, Form::sliced);
        check_all_reduce(group, site, shape, dtype, Form::contiguous);
        if (dtype != DType::u8) {  // negative values
          check_all_reduce(group, site, shape, dtype, Form::transposed, ReduceOp::max);
          check_all_reduce(group, site, shape, dtype, Form::contiguous, ReduceOp::min);
        }
        if (group.size() <= 2) {  // products of more stay exact in few types
          check_all_reduce(group, site, shape, dtype, Form::contiguous, ReduceOp::prod);
        }
      } else {
        const auto x = site.filled(shape, dtype);
        check_throws<UsageError>([&] { group.all_reduce(x); }, "all_reduce x", to_string(dtype),
                                 "cannot be reduced");
        check_throws<UsageError>(
            [&] { (void)group.reduce_scatterv(x, uneven(2, group.size()), 0); }, "reduce_scatter x",
            "cannot be reduced");
      }
    }
  }
}

/// x is this rank's part of the output, and the output this rank's part of x.
inline void check_in_place(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& group = state.dcp();
  const int n = group.size();
  for (const Memory memory : kMemories) {
    for (const std::int64_t columns : {5, 5000}) {
      Site site(group, memory);
      const auto whole = site.tensor({2 * n, columns}, DType::f32);
      const auto mine = whole.slice(0, 2 * group.rank(), 2);
      fill(mine, group.rank());
      group.all_gather_into(whole, mine, 0);
      const std::int64_t part = 2 * columns;
      check_values(whole, "all_gather in place", [&](std::int64_t flat) {
        return value_at(static_cast<int>(flat / part), flat % part);
      });
      fill(whole, group.rank());
      group.reduce_scatter_into(mine, whole, 0);
      check_values(mine, "reduce_scatter in place", [&](std::int64_t flat) {
        std::int64_t sum = 0;
        for (int r = 0; r < n; ++r) {
          sum += value_at(r, group.rank() * part + flat);
        }
        return sum;
      });
    }
  }
}

}  // namespace cohort::test
