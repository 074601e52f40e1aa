// SPDX-License-Identifier: Apache-2.0
// Random collectives against a formula: every element of every result, and every byte around it.

#include <cohort/cohort.hpp>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "setup.hpp"
#include "support/threads.hpp"
#include "tensors.hpp"

namespace cohort::fuzz::collectives {
namespace {

using test::u;

enum class What { gather, scatter, all_reduce, broadcast, all_to_all, ring };
enum class Form { into, owning, in_place };

constexpr const char* to_string(What what) {
  constexpr const char* kNames[] = {"all_gather", "reduce_scatter", "all_reduce",
                                    "broadcast",  "all_to_all",     "send and recv"};
  return kNames[static_cast<int>(what)];
}
constexpr const char* to_string(Form form) {
  constexpr const char* kNames[] = {"into", "owning", "in place"};
  return kNames[static_cast<int>(form)];
}

/// What one rank of the world brings.
struct Share {
  int rank = 0;  ///< In the group.
  Dims x_shape, out_shape;
  Layout x, out;
  bool x_in_window = false;
  bool out_in_window = false;
};

/// A call, and all that the ranks bring to it.
struct Operation {
  What what = What::gather;
  Form form = Form::into;
  GroupKind kind = GroupKind::world;
  int size = 1;  ///< Of the group.
  DType dtype = DType::f32;
  ReduceOp op = ReduceOp::sum;
  Dims shape;  ///< Its extent along `dim` is that of the whole.
  int dim = 0;
  bool from_end = false;
  std::vector<std::int64_t> sizes;  ///< Along `dim`, by rank in the group.
  bool even = true;
  int root = 0;
  int stream = 0;   ///< 0 for none.
  int replays = 0;  ///< 0 where it is called eagerly.
  std::vector<Share> shares;

  [[nodiscard]] bool partitions() const { return what == What::gather || what == What::scatter; }
  [[nodiscard]] bool reduces() const { return what == What::scatter || what == What::all_reduce; }
  [[nodiscard]] int dim_argument() const { return from_end ? dim - shape.size() : dim; }
  [[nodiscard]] Dims part(int rank) const {
    Dims part = shape;
    part[dim] = sizes[u(rank)];
    return part;
  }
  /// Extents along `dim` of the ranks before this one.
  [[nodiscard]] std::int64_t before(int rank) const {
    return std::accumulate(sizes.begin(), sizes.begin() + rank, std::int64_t{0});
  }
  [[nodiscard]] std::int64_t inner() const {
    std::int64_t product = 1;
    for (int d = dim + 1; d < shape.size(); ++d) {
      product *= shape[d];
    }
    return product;
  }
};

std::string to_string(const Operation& o) {
  std::string text = fmt::format(
      "{} {} in {} of {}: {}{} {} dim {} sizes [{}] root {} stream {} {}\n", to_string(o.what),
      to_string(o.form), to_string(o.kind), o.size, to_string(o.dtype), cohort::to_string(o.shape),
      to_string(o.op), o.dim_argument(), fmt::join(o.sizes, ","), o.root, o.stream,
      o.replays == 0 ? "eagerly" : fmt::format("captured, {} replays", o.replays));
  for (const auto& share : o.shares) {
    text += fmt::format("  rank {}: x{} {}{}; out{} {}{}\n", share.rank,
                        cohort::to_string(share.x_shape), to_string(share.x),
                        share.x_in_window ? " in a window" : "", cohort::to_string(share.out_shape),
                        to_string(share.out), share.out_in_window ? " in a window" : "");
  }
  return text;
}

/// Small whole numbers, so that every result is exact in every type and in every order.
std::int64_t value(const Operation& o, int rank, std::int64_t flat, int turn) {
  const std::int64_t mixed = rank * 5 + flat * 7 + flat / 11 + turn * 3;
  if (o.reduces() && o.op == ReduceOp::prod) {
    constexpr std::int64_t kFactors[] = {1, 2, -1, 1, -2};
    const std::int64_t factor = kFactors[mixed % 5];
    return o.dtype == DType::u8 ? std::abs(factor) : factor;
  }
  return mixed % 11 - (o.dtype == DType::u8 ? 0 : 3);
}

std::int64_t reduced(const Operation& o, std::int64_t flat, int turn) {
  std::int64_t result = value(o, 0, flat, turn);
  for (int r = 1; r < o.size; ++r) {
    const std::int64_t other = value(o, r, flat, turn);
    switch (o.op) {
      case ReduceOp::sum:
        result += other;
        break;
      case ReduceOp::prod:
        result *= other;
        break;
      case ReduceOp::min:
        result = std::min(result, other);
        break;
      case ReduceOp::max:
        result = std::max(result, other);
        break;
    }
  }
  return result;
}

/// What the call is to give at a place of this rank's output.
std::int64_t expected(const Operation& o, int rank, std::int64_t flat, int turn) {
  switch (o.what) {
    case What::gather: {
      const std::int64_t inner = o.inner();
      std::int64_t k = flat / inner % o.shape[o.dim];
      const std::int64_t outer = flat / inner / o.shape[o.dim];
      int from = 0;
      while (k >= o.sizes[u(from)]) {
        k -= o.sizes[u(from++)];
      }
      return value(o, from, (outer * o.sizes[u(from)] + k) * inner + flat % inner, turn);
    }
    case What::scatter: {
      const std::int64_t inner = o.inner();
      const std::int64_t own = o.sizes[u(rank)];
      const std::int64_t k = flat / inner % own + o.before(rank);
      return reduced(o, (flat / inner / own * o.shape[o.dim] + k) * inner + flat % inner, turn);
    }
    case What::all_reduce:
      return reduced(o, flat, turn);
    case What::broadcast:
      return value(o, o.root, flat, turn);
    case What::all_to_all: {
      const std::int64_t piece = numel(o.shape) / o.size;
      return value(o, static_cast<int>(flat / piece), rank * piece + flat % piece, turn);
    }
    case What::ring:
      return value(o, (rank + o.size - 1) % o.size, flat, turn);
  }
  return 0;
}

Dims draw_shape(Random& random, int least_dims) {
  std::vector<std::int64_t> extents(u(random.between(least_dims, 5)));
  std::int64_t left = random.one_in(4) ? 40'000 : 1'500;
  for (auto& extent : extents) {
    extent = random.one_in(12)  ? 0
             : random.one_in(8) ? random.between(1, 700)
                                : random.between(1, 7);
    extent = std::min(extent, std::max<std::int64_t>(1, left));
    left /= std::max<std::int64_t>(1, extent);
  }
  return test::dims(extents);
}

void draw_parts(Random& random, Operation& o) {
  o.dim = static_cast<int>(random.between(0, o.shape.size() - 1));
  o.from_end = random.one_in(2);
  o.even = random.one_in(2);
  o.sizes.assign(u(o.size), o.shape[o.dim]);
  for (auto& size : o.sizes) {
    if (!o.even) {
      size = random.one_in(3) ? 0 : random.between(0, std::max<std::int64_t>(1, o.shape[o.dim]));
    }
  }
  o.shape[o.dim] = o.before(o.size);
}

Share draw_share(Random& random, const Operation& o, const Setup& setup, int rank) {
  Share share;
  share.rank = rank;
  share.x_shape = o.what == What::gather ? o.part(rank) : o.shape;
  share.out_shape = o.what == What::scatter ? o.part(rank) : o.shape;
  share.x = draw_layout(random, share.x_shape);
  share.out = draw_layout(random, share.out_shape);
  // The debug checks want equal offsets, so there all ranks use ordinary memory.
  share.x_in_window = random.one_in(2) && !setup.debug_checks;
  share.out_in_window = random.one_in(2) && !setup.debug_checks;
  return share;
}

Operation draw_operation(Random random, const Setup& setup) {
  Operation o;
  o.kind = random.pick({GroupKind::world, GroupKind::tensor_parallel, GroupKind::pipeline_parallel,
                        GroupKind::decode_context_parallel});
  o.size = static_cast<int>(group_ranks(setup.layout, o.kind, 0).size());
  o.what = random.pick({What::gather, What::gather, What::scatter, What::scatter, What::all_reduce,
                        What::broadcast, What::all_to_all, What::ring});
  if (o.size == 1 && o.what == What::ring) {
    o.what = What::broadcast;
  }
  o.form = random.pick({Form::into, Form::into, Form::owning, Form::in_place});
  o.dtype = test::kAllDTypes[random.between(0, std::ssize(test::kAllDTypes) - 1)];
  if (o.reduces() && !is_reducible(o.dtype)) {
    o.dtype = DType::bf16;
  }
  o.op = random.pick({ReduceOp::sum, ReduceOp::sum, ReduceOp::prod, ReduceOp::min, ReduceOp::max});
  o.root = static_cast<int>(random.between(0, o.size - 1));
  o.stream = static_cast<int>(random.between(0, 2));
  o.replays = random.one_in(3) ? static_cast<int>(random.between(1, 3)) : 0;
  o.shape = draw_shape(random, o.partitions() || o.what == What::all_to_all ? 1 : 0);
  if (o.partitions()) {
    draw_parts(random, o);
  } else if (o.what == What::all_to_all) {
    o.shape[0] *= o.size;
  }
  for (int r = 0; r < setup.ranks; ++r) {
    const auto ranks = group_ranks(setup.layout, o.kind, r);
    const auto place = std::find(ranks.begin(), ranks.end(), r) - ranks.begin();
    o.shares.push_back(draw_share(random, o, setup, static_cast<int>(place)));
  }
  return o;
}

GroupCoordinator& group_of(ParallelState& state, GroupKind kind) {
  for (GroupCoordinator* group : state.groups()) {
    if (group->kind() == kind) {
      return *group;
    }
  }
  throw std::logic_error("no such group");
}

/// One rank's part in an operation.
class Player {
 public:
  Player(ParallelState& state, const Operation& o, HostStream* streams)
      : state_(state),
        o_(o),
        group_(group_of(state, o.kind)),
        share_(o.shares[u(state.world().rank())]),
        stream_(o.stream == 0 ? (o.replays > 0 ? streams[0].ref() : StreamRef())
                              : streams[o.stream - 1].ref()),
        x_place_(*group_.arena(), widest(&Share::x), share_.x_in_window),
        out_place_(*group_.arena(), widest(&Share::out), share_.out_in_window),
        x_(x_place_.memory(), o.dtype, share_.x_shape, share_.x),
        out_(out_place_.memory(), o.dtype, share_.out_shape, share_.out) {}

  void play() {
    if (o_.replays == 0) {
      prepare(0);
      call();
      check(0);
      return;
    }
    group_.reserve(4 * widest(&Share::x) + 4 * widest(&Share::out) + (1 << 16));
    CapturedGraph graph = state_.capture(stream_, [&] { call(); });
    for (int turn = 1; turn <= o_.replays; ++turn) {
      prepare(turn);
      graph.launch(stream_);
      check(turn);
    }
    result_.reset();
  }

 private:
  /// The largest memory that any rank needs, so that all allocate alike.
  [[nodiscard]] std::size_t widest(Layout Share::*layout) const {
    std::int64_t span = 0;
    for (const auto& share : o_.shares) {
      span = std::max(span, (share.*layout).span);
    }
    return u(span) * size_of(o_.dtype);
  }

  /// In which memory the call reads and writes.
  [[nodiscard]] bool in_out() const { return o_.form == Form::in_place && o_.what == What::gather; }
  [[nodiscard]] bool in_x() const {
    return o_.what == What::broadcast ||
           (o_.form == Form::in_place && (o_.what == What::scatter || o_.what == What::all_reduce));
  }
  template <class View>
  [[nodiscard]] View own_part(const View& whole) const {
    return whole.slice(o_.dim, o_.before(share_.rank), o_.sizes[u(share_.rank)]);
  }
  [[nodiscard]] TensorView x() const { return in_out() ? own_part(out_.view()) : x_.view(); }
  [[nodiscard]] TensorView out() const {
    if (!in_x()) {
      return out_.view();
    }
    return o_.what == What::scatter ? own_part(x_.view()) : x_.view();
  }

  void prepare(int turn) {
    out_.reset();
    x_.reset();
    const auto mine = [&](std::int64_t flat) { return value(o_, share_.rank, flat, turn); };
    if (in_out()) {
      test::fill_with(x(), mine);
    } else {
      x_.fill(mine);
    }
  }

  void call() {
    const ReduceOp op = o_.op;
    const int dim = o_.dim_argument();
    switch (o_.what) {
      case What::gather:
        if (o_.form == Form::owning) {
          result_ = o_.even ? group_.all_gather(x(), dim, stream_)
                            : group_.all_gatherv(x(), o_.sizes, dim, stream_);
        } else if (o_.even) {
          group_.all_gather_into(out(), x(), dim, stream_);
        } else {
          group_.all_gatherv_into(out(), x(), o_.sizes, dim, stream_);
        }
        return;
      case What::scatter:
        if (o_.form == Form::owning) {
          result_ = o_.even ? group_.reduce_scatter_along_dim(x(), dim, stream_, op)
                            : group_.reduce_scatterv(x(), o_.sizes, dim, stream_, op);
        } else if (o_.even) {
          group_.reduce_scatter_into(out(), x(), dim, stream_, op);
        } else {
          group_.reduce_scatterv_into(out(), x(), o_.sizes, dim, stream_, op);
        }
        return;
      case What::all_reduce:
        return in_x() ? group_.all_reduce(x(), stream_, op)
                      : group_.all_reduce_into(out(), x(), stream_, op);
      case What::broadcast:
        return group_.broadcast(x(), o_.root, stream_);
      case What::all_to_all:
        if (o_.form == Form::owning) {
          result_ = group_.all_to_all(x(), stream_);
        } else {
          group_.all_to_all_into(out(), x(), stream_);
        }
        return;
      case What::ring:
        return pass_around();
    }
  }

  void pass_around() {
    const int next = (share_.rank + 1) % o_.size;
    const int previous = (share_.rank + o_.size - 1) % o_.size;
    if (share_.rank == 0) {
      group_.send(x(), next, stream_);
      group_.recv(out(), previous, stream_);
    } else {
      group_.recv(out(), previous, stream_);
      group_.send(x(), next, stream_);
    }
  }

  void check(int turn) {
    const auto wanted = [&](std::int64_t flat) { return expected(o_, share_.rank, flat, turn); };
    const bool owning = o_.form == Form::owning && (o_.partitions() || o_.what == What::all_to_all);
    if (owning) {
      test::check(result_.shape() == share_.out_shape, "the result's shape");
      test::check_values(result_, "result", wanted);
    } else if (!in_x()) {
      out_.expect(wanted);
    } else if (o_.what == What::scatter) {
      test::fill_with(own_part(x_.expected()), wanted);
    } else {
      x_.expect(wanted);
    }
    out_.check("out");
    x_.check("x");
  }

  ParallelState& state_;
  const Operation& o_;
  GroupCoordinator& group_;
  const Share& share_;
  StreamRef stream_;
  Place x_place_;
  Place out_place_;
  Cell x_;
  Cell out_;
  Tensor result_;
};

void round(Random& random, std::string& words) {
  const Setup setup = draw_setup(random);
  words += to_string(setup);
  std::vector<Operation> operations(u(random.between(1, 8)));
  for (auto& operation : operations) {
    operation = draw_operation(random.split(), setup);
    words += to_string(operation);
  }
  test::run_ranks(setup.ranks, [&](ControlPlane& world) {
    HostStream streams[2];
    auto state = setup.create(world);
    for (std::size_t i = 0; i < operations.size(); ++i) {
      try {
        Player(state, operations[i], streams).play();
      } catch (const std::exception& error) {
        throw std::runtime_error(fmt::format("operation {}: {}", i, error.what()));
      }
    }
    state.shutdown();
  });
}

}  // namespace
}  // namespace cohort::fuzz::collectives

int main(int argc, char** argv) {
  return cohort::fuzz::drive(argc, argv, "collectives", 400, cohort::fuzz::collectives::round);
}
