// SPDX-License-Identifier: Apache-2.0
#include "ways.hpp"

#include <fmt/format.h>

#include <cstddef>
#include <memory>
#include <utility>

#include "cohort/host/host_stream.hpp"
#include "written_inputs.hpp"

namespace cohort::bench {

Lane* lane_of(Session& session, Path path, const MergeOptions& merge) {
  switch (path) {
    case Path::raw:
    case Path::shared_loop:
    case Path::raw_symmetric:
      return nullptr;
    case Path::plain:
      return &session.lanes.get({.merge = merge});
    case Path::symmetric:
      return &session.lanes.get({.symmetric = true, .merge = merge});
    case Path::compared:
      return &session.lanes.get({.symmetric = true, .own = OwnKernels::compare, .merge = merge});
    case Path::own:
      return &session.lanes.get({.own = OwnKernels::all, .merge = merge});
  }
  return nullptr;
}

std::string path_obstacle(Session& session, Path path) {
  if (session.ranks() < 2) {
    return "needs at least two ranks";
  }
  if (path == Path::raw_symmetric) {
    if (std::string why = session.bed.registration_obstacle(); !why.empty()) {
      return why;
    }
    return lane_of(session, Path::symmetric)->obstacle();
  }
  const Lane* const lane = lane_of(session, path);
  return lane == nullptr ? std::string{} : lane->obstacle();
}

std::vector<Way> ways(Session& session) {
  std::vector<Way> found;
  for (const Path path : session.options.paths) {
    if (path == Path::shared_loop) {
      continue;
    }
    if (const std::string why = path_obstacle(session, path); !why.empty()) {
      session.sink.note(fmt::format("no {} rows: {}", to_string(path), why));
    } else {
      found.push_back({path, lane_of(session, path), &session.raw});
    }
  }
  return found;
}

std::vector<Way> ways_with_loop(Session& session) {
  auto found = ways(session);
  if (session.loop != nullptr && session.ranks() > 1) {
    found.push_back({Path::shared_loop, nullptr, session.loop});
  }
  return found;
}

Buffer allocate(const Way& way, const Dims& shape, DType dtype) {
  return way.is_raw() ? way.library->allocate(shape, dtype, way.path == Path::raw_symmetric)
                      : way.lane->allocate(shape, dtype);
}

void poison(Session& session, const TensorView& view) {
  // All bits set is a NaN in f32, f16 and bf16.
  session.bed.fill_bytes(view.data(), view.bytes(), 0xff);
}

std::vector<std::byte> fetch(Session& session, const TensorView& view) {
  std::vector<std::byte> bytes(view.bytes());
  session.bed.get(bytes, view.data());
  return bytes;
}

void write_before(Session& session, Variant& variant, std::vector<TensorView> inputs) {
  if (session.options.inputs != Inputs::written) {
    return;
  }
  const auto all = std::make_shared<const std::vector<TensorView>>(std::move(inputs));
  variant.writing = [&session, all] {
    host::enqueue(
        session.bed.stream(),
        [](const std::shared_ptr<const std::vector<TensorView>>& views) {
          for (const TensorView& view : *views) {
            rewrite({static_cast<std::byte*>(view.data()), view.bytes()});
          }
        },
        all);
  };
  variant.call = [writing = variant.writing, call = std::move(variant.call)] {
    writing();
    call();
  };
}

void add_modes(Session& session, Case& work, const Variant& variant) {
  for (const Mode mode : session.options.modes) {
    work.variants.push_back(variant);
    work.variants.back().mode = mode;
  }
}

void leave_out(Session& session, std::string_view bench, Path path, std::string_view reason) {
  session.sink.note(fmt::format("no {} {} rows: {}", bench, to_string(path), reason));
}

}  // namespace cohort::bench
