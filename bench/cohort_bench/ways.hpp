// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <vector>

#include "exact.hpp"
#include "runner.hpp"

/// \file
/// What the benchmarks of collectives and of the decode step share.

namespace cohort::bench {

/// A path that this run can measure.
struct Way {
  Path path = Path::raw;
  Lane* lane = nullptr;           ///< Null for a bare library.
  RawLibrary* library = nullptr;  ///< Which.

  [[nodiscard]] bool is_raw() const noexcept { return lane == nullptr; }
};

/// Collective. The lane of a path with the merge plan given, or null for the bare library.
[[nodiscard]] Lane* lane_of(Session& session, Path path,
                            const MergeOptions& merge = {.plan = MergePlan::packed});

/// Collective. Why the path cannot be measured here, or "".
[[nodiscard]] std::string path_obstacle(Session& session, Path path);

/// Collective. The paths among those asked for that can be measured; notes say why others cannot.
[[nodiscard]] std::vector<Way> ways(Session& session);

/// The same, with the loop over shared memory, which has the plain collectives alone.
[[nodiscard]] std::vector<Way> ways_with_loop(Session& session);

/// Collective. Memory as the way's caller would have it.
[[nodiscard]] Buffer allocate(const Way& way, const Dims& shape, DType dtype);

/// Collective. The same, filled with `value(i)` in element i.
template <class Value>
[[nodiscard]] Buffer filled(Session& session, const Way& way, const Dims& shape, DType dtype,
                            const Value& value);

/// NaN in every element.
void poison(Session& session, const TensorView& view);

/// The elements of contiguous memory, on the host.
[[nodiscard]] std::vector<std::byte> fetch(Session& session, const TensorView& view);

/// Where inputs are to be written before each call: puts that before the variant's call. What is
/// written are the values that are there.
void write_before(Session& session, Variant& variant, std::vector<TensorView> inputs);

/// Adds the variant once for each mode asked for.
void add_modes(Session& session, Case& work, const Variant& variant);

/// Leaves rows out, with a remark on the first rank.
void leave_out(Session& session, std::string_view bench, Path path, std::string_view reason);

/// An all-reduce of `count` elements by the way; decode_step uses it too. The way's path must carry
/// it, otherwise `call` is empty and a note says why.
/// @param in_place  The sum replaces the input, so that only one call behind `poison` is right.
[[nodiscard]] Variant all_reduce_variant(Session& session, const Way& way, DType dtype,
                                         std::int64_t count, bool in_place = false);

template <class Value>
Buffer filled(Session& session, const Way& way, const Dims& shape, DType dtype,
              const Value& value) {
  Buffer buffer = allocate(way, shape, dtype);
  session.bed.synchronize();
  session.bed.put(buffer.view.data(), encode(dtype, buffer.view.numel(), value));
  return buffer;
}

}  // namespace cohort::bench
