// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/offset_allocator.hpp"
#include "cohort/tensor.hpp"
#include "cohort/tensor_overlap.hpp"
#include "cohort/transport.hpp"

/// \file
/// What the arguments of a collective must be, and what follows from them. Pure: every check throws
/// a `UsageError` that names the argument, what was expected and what came.

namespace cohort {

/// A call that a group must have room for; equal on all ranks.
struct CollectiveShape {
  Collective collective = Collective::all_gather;  ///< Which call it is.
  Dims shape;                                      ///< Of a rank's input.
  DType dtype = DType::f32;                        ///< Of the elements.
  int dim = 0;                                     ///< Where it gathers or scatters.
  std::int64_t widest = 0;  ///< Of the v-variants: most extents along `dim` that a rank has.
};

/// Who makes a call.
struct Caller {
  std::string_view group;  ///< The group's name, for errors.
  int rank = 0;            ///< The rank in the group.
  int size = 1;            ///< Ranks of the group.
};

/// Throws `UsageError` for elements that do not lie where their type has to. A tensor without any
/// may point anywhere.
template <class Void>
void check_aligned(std::string_view argument, const BasicTensorView<Void>& x) {
  // Sizes are powers of two up to 8, so most tensors pass without a look at their type.
  const auto address = reinterpret_cast<std::uintptr_t>(x.data());
  if (address % 8 != 0 && (address & (size_of(x.dtype()) - 1)) != 0 && x.numel() != 0) {
    detail::refuse([&, argument] {
      return fmt::format("{}: expected the data of {} at a multiple of {} bytes, got {}", argument,
                         to_string(x.dtype()), size_of(x.dtype()),
                         static_cast<const void*>(x.data()));
    });
  }
}

/// Throws `UsageError` for a tensor of another device than the group's, for one whose elements are
/// not aligned, and for one of no type that there is.
template <class Void>
[[gnu::noinline]] void check_each_on_device(std::string_view argument, const Caller& caller,
                                            Device device, const BasicTensorView<Void>& x) {
  check_dtype(argument, x.dtype());
  check_aligned(argument, x);
  if (x.device() != device) {
    detail::refuse([&, argument] {
      return fmt::format("{}: group {} works on {}, got a tensor on {}", argument, caller.group,
                         to_string(device), to_string(x.device()));
    });
  }
}

/// The same for what most tensors pass: at a multiple of 8 bytes, whatever the type. Asked twice in
/// each call.
template <class Void>
[[gnu::always_inline]] inline void check_on_device(std::string_view argument, const Caller& caller,
                                                   Device device, const BasicTensorView<Void>& x) {
  const bool passes = is_dtype(x.dtype()) && x.device() == device &&
                      reinterpret_cast<std::uintptr_t>(x.data()) % 8 == 0;
  if (!passes) [[unlikely]] {
    check_each_on_device(argument, caller, device, x);
  }
}

/// Throws `UsageError` unless it is a rank of the group.
inline void check_member(std::string_view argument, const Caller& caller, int rank) {
  if (rank < 0 || rank >= caller.size) {
    detail::refuse([&, argument] {
      return fmt::format("{}: expected a rank in [0, {}) of group {}, got {}", argument,
                         caller.size, caller.group, rank);
    });
  }
}

/// The same, and another rank than the caller's.
inline void check_peer(std::string_view argument, const Caller& caller, int peer) {
  check_member(argument, caller, peer);
  if (peer == caller.rank) {
    detail::refuse([&, argument] {
      return fmt::format("{}: rank {} of group {} cannot be its own peer", argument, peer,
                         caller.group);
    });
  }
}

/// Throws `UsageError` unless `x` has the dtype of `like` and the given shape.
template <class A, class B>
void check_alike(std::string_view argument, const BasicTensorView<A>& x,
                 const BasicTensorView<B>& like, const Dims& shape) {
  if (x.dtype() != like.dtype() || x.shape() != shape) {
    detail::refuse([&, argument] {
      return fmt::format("{}: expected {}{}, got {}{}", argument, to_string(like.dtype()),
                         to_string(shape), to_string(x.dtype()), to_string(x.shape()));
    });
  }
}

/// Throws `UsageError` for elements of a type that cannot be reduced, such as 8-bit floats.
template <class Void>
void check_reducible(std::string_view argument, const BasicTensorView<Void>& x) {
  if (!is_reducible(x.dtype())) {
    detail::refuse([&, argument] {
      return fmt::format("{}: {} cannot be reduced", argument, to_string(x.dtype()));
    });
  }
}

/// Throws `UsageError` for what is no reduction.
inline void check_op(std::string_view argument, ReduceOp op) {
  if (!is_reduce_op(op)) {
    detail::refuse([&] {
      return fmt::format("{}: expected sum, prod, min or max, got number {}", argument,
                         static_cast<int>(op));
    });
  }
}

/// Throws `UsageError` for what is no collective.
inline void check_collective(std::string_view argument, Collective collective) {
  if (collective > Collective::all_reduce_rms_norm) {
    detail::refuse([=] {
      return fmt::format("{}: expected a Collective, got number {}", argument,
                         static_cast<int>(collective));
    });
  }
}

/// Throws where a result would be written over itself.
template <class Void>
void check_distinct(std::string_view argument, const BasicTensorView<Void>& out) {
  if (!out.is_contiguous() && overlaps_itself(out)) [[unlikely]] {
    detail::refuse([&, argument] {
      return fmt::format(
          "{}: expected elements that can be shown to lie apart, got shape {} with "
          "strides {}",
          argument, to_string(out.shape()), to_string(out.strides()));
    });
  }
}

/// Throws where a result would overwrite what is still to be read.
template <class A, class B>
void check_apart(std::string_view argument, const BasicTensorView<A>& out,
                 const BasicTensorView<B>& x) {
  if (overlap(out, x)) {
    detail::refuse([&, argument] {
      return fmt::format("{}: must not {} the input{}", argument,
                         identical(out, x) ? "be" : "overlap", identical(out, x) ? " itself" : "");
    });
  }
}

/// The same, but in a call in place a part of the one is the other, the same elements. Those of the
/// input then lie apart: otherwise what is still to be read of other parts is overwritten.
/// @param in_place  Whether it is so; asked only where the two may overlap.
template <class A, class B, class InPlace>
void check_in_place_or_apart(std::string_view argument, const BasicTensorView<A>& out,
                             const BasicTensorView<B>& x, const InPlace& in_place) {
  if (is_apart(out, x)) {
    return;
  }
  if (in_place() ? overlaps_itself(x) : overlap(out, x)) {
    detail::refuse([&, argument] {
      return fmt::format("{}: overlaps the input other than where a call in place has it",
                         argument);
    });
  }
}

/// Throws `UsageError` unless `size` divides the extent of `dim`.
template <class Void>
void check_divisible(std::string_view argument, const BasicTensorView<Void>& x, int dim, int size) {
  if (x.shape()[normalize_dim(dim, x.ndim(), argument)] % size != 0) {
    detail::refuse([&, argument] {
      return fmt::format("{}: expected an extent of dimension {} that {} ranks divide, got {}",
                         argument, dim, size, to_string(x.shape()));
    });
  }
}

/// The sum of `sizes`, which must name one extent for each rank.
[[nodiscard]] inline std::int64_t total(std::string_view argument, const Caller& caller,
                                        std::span<const std::int64_t> sizes) {
  if (sizes.size() != static_cast<std::size_t>(caller.size)) {
    detail::refuse([&, argument] {
      return fmt::format("{}: expected {} sizes, one for each rank of group {}, got {}", argument,
                         caller.size, caller.group, sizes.size());
    });
  }
  std::int64_t sum = 0;
  for (const auto extent : sizes) {
    if (extent < 0) {
      detail::refuse([&, argument] {
        return fmt::format("{}: expected sizes >= 0, got {}", argument, extent);
      });
    }
    if (__builtin_add_overflow(sum, extent, &sum)) {
      detail::refuse(
          [&, argument] { return fmt::format("{}: the sum of the sizes overflows", argument); });
    }
  }
  return sum;
}

/// Extents of the ranks before the caller.
[[nodiscard]] inline std::int64_t offset_of(const Caller& caller,
                                            std::span<const std::int64_t> sizes) {
  std::int64_t offset = 0;
  for (int r = 0; r < caller.rank; ++r) {
    offset += sizes[static_cast<std::size_t>(r)];
  }
  return offset;
}

/// The shape of what `x` of every rank becomes when gathered.
[[nodiscard]] inline Dims gathered_shape(const ConstTensorView& x, const Caller& caller,
                                         std::span<const std::int64_t> sizes, int dim) {
  Dims shape = x.shape();
  shape[dim] = total("all_gather sizes", caller, sizes);
  if (x.shape()[dim] != sizes[static_cast<std::size_t>(caller.rank)]) {
    detail::refuse([&] {
      return fmt::format("all_gather x: expected {} extents along dimension {}, got {}",
                         sizes[static_cast<std::size_t>(caller.rank)], dim, to_string(x.shape()));
    });
  }
  static_cast<void>(numel(shape, "all_gather x of all ranks"));
  return shape;
}

/// The shape of the caller's part of `x`.
[[nodiscard]] inline Dims scattered_shape(const ConstTensorView& x, const Caller& caller,
                                          std::span<const std::int64_t> sizes, int dim) {
  const std::int64_t sum = total("reduce_scatter sizes", caller, sizes);
  if (x.shape()[dim] != sum) {
    detail::refuse([&] {
      return fmt::format(
          "reduce_scatter x: expected the sizes' sum of {} extents along dimension {}, got {}", sum,
          dim, to_string(x.shape()));
    });
  }
  Dims shape = x.shape();
  shape[dim] = sizes[static_cast<std::size_t>(caller.rank)];
  return shape;
}

/// What a step allocates of an arena, and how much it packs.
struct StepRoom {
  std::vector<std::size_t> blocks;  ///< Bytes of every block, in no order.
  std::size_t scratch = 0;          ///< Most bytes of input and output of one call.

  /// Adds a block of that shape.
  void add_block(const Dims& shape, DType dtype) { blocks.push_back(bytes_of(shape, dtype)); }

  /// Bytes in one piece that suffice for eager steps of up to these blocks, and for one graph, or
  /// graphs of one pool, besides. What an eager step leaves alive is released before the next eager
  /// step begins, and what a captured one leaves before the next capture begins; both may live on
  /// through steps of the other kind, and whatever a step releases it may release at any time.
  ///
  /// With S bytes in all: a step that begins with nothing of its kind alive cuts its blocks from
  /// one end of free space, or from what it has released itself, so that it never reaches beyond S
  /// from there. Eager steps have the front and graphs the back, so 2 S suffice, and no less where
  /// nothing is released.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = 0;
    bool too_many = false;
    for (const auto block : blocks) {
      too_many = __builtin_add_overflow(sum, OffsetAllocator::rounded(block), &sum) || too_many;
    }
    return too_many || sum > OffsetAllocator::kMaxRequest ? std::numeric_limits<std::size_t>::max()
                                                          : 2 * sum;
  }
};

/// What one pass over `calls` allocates and packs. Throws for a shape that cannot be.
[[nodiscard]] inline StepRoom room_of(std::span<const CollectiveShape> calls, int size) {
  StepRoom room;
  for (const auto& call : calls) {
    if (call.widest < 0) {
      detail::refuse([&] {
        return fmt::format("reserve_for_calls widest: expected >= 0, got {}", call.widest);
      });
    }
    check_dtype("reserve_for_calls dtype", call.dtype);
    check_collective("reserve_for_calls collective", call.collective);
    static_cast<void>(numel(call.shape, "reserve_for_calls shape"));
    Dims in = call.shape;
    Dims out = in;
    const bool moves = call.collective == Collective::all_gather ||
                       call.collective == Collective::reduce_scatter ||
                       call.collective == Collective::all_to_all;
    if (moves) {
      const bool whole = call.collective == Collective::all_to_all;
      const int dim = whole ? 0 : normalize_dim(call.dim, in.size(), "reserve_for_calls dim");
      if (in.size() == 0) {
        detail::refuse(
            [&] { return "reserve_for_calls shape: expected a dimension to divide, got none"; });
      }
      if (call.collective == Collective::all_gather) {
        in[dim] = std::max(in[dim], call.widest);
        static_cast<void>(numel(in, "reserve_for_calls widest"));
        out[dim] = numel({in[dim], size}, "reserve_for_calls shape of all ranks");
        static_cast<void>(numel(out, "reserve_for_calls shape of all ranks"));
      } else if (call.collective == Collective::reduce_scatter && call.widest > 0) {
        out[dim] = call.widest;
      } else if (in[dim] % size != 0) {
        detail::refuse([&] {
          return fmt::format(
              "reserve_for_calls shape: expected an extent of dimension {} that {} ranks "
              "divide, got {}",
              dim, size, to_string(in));
        });
      } else if (!whole) {
        out[dim] = in[dim] / size;
      }
      room.add_block(out, call.dtype);
    } else if (call.collective == Collective::all_reduce_rms_norm) {
      if (in.size() != 2) {
        detail::refuse([&] {
          return fmt::format("reserve_for_calls shape: expected [B, hidden], got {}",
                             to_string(in));
        });
      }
      room.add_block(in, call.dtype);  // the sum, where the output has another type
      room.add_block(in, call.dtype);  // the output, where the call returns it
    }
    room.scratch = std::max(room.scratch,
                            static_cast<std::size_t>(numel(in) + numel(out)) * size_of(call.dtype));
  }
  return room;
}

}  // namespace cohort
