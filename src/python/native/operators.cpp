// SPDX-License-Identifier: Apache-2.0

// The operators of the Python package: what torch.ops.cohort has. Built without Python's headers,
// so that one library serves every interpreter that the installed torch serves.

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/headeronly/version.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <tuple>
#include <utility>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/torch.hpp"
#include "engines.hpp"
#include "store_messenger.hpp"
#include "torch_pools.hpp"
#if COHORT_TORCH_WITH_MPI
#include "cohort/mpi.hpp"
#endif
#if COHORT_TORCH_WITH_CUDA
#include "cohort/cuda.hpp"
#include "cohort/nccl/known_faults.hpp"
#include "cohort/nccl/nccl_check.hpp"
#endif

namespace cohort::python {
namespace {

using Name = c10::string_view;
using Names = std::vector<std::string>;
using Sizes = std::vector<std::int64_t>;

/// A dimension or a rank: Python's numbers have no end, and what is beyond every one stays so.
[[nodiscard]] int as_int(std::int64_t number) {
  return static_cast<int>(std::clamp<std::int64_t>(number, std::numeric_limits<int>::min(),
                                                   std::numeric_limits<int>::max()));
}

// --- how ranks meet

/// `control` is what the ranks call the store.
[[nodiscard]] std::shared_ptr<ControlPlane> over_store(c10::intrusive_ptr<c10d::Store> store,
                                                       std::string_view control, int rank, int size,
                                                       std::chrono::milliseconds limit) {
  // The ranks that meet there make their states in the same order, so the number is the same on all
  // of them, whatever states some have made elsewhere.
  static std::mutex mutex;
  static std::map<std::string, std::int64_t, std::less<>> states;
  std::int64_t number = 0;
  {
    const std::lock_guard lock(mutex);
    number = states[std::string(control)]++;
  }
  return std::make_shared<MessageControlPlane>(
      std::make_shared<StoreMessenger>(std::move(store), fmt::format("cohort/{}", number), rank,
                                       size),
      limit);
}

[[nodiscard]] c10::intrusive_ptr<c10d::Store> connect_store(std::string_view address, int size,
                                                            std::chrono::milliseconds limit) {
  const auto colon = address.rfind(':');
  if (colon == std::string_view::npos) {
    throw ConfigError(fmt::format("control: expected store://HOST:PORT, got store://{}", address));
  }
  c10d::TCPStoreOptions options;
  options.port =
      static_cast<std::uint16_t>(parse_env_integer("control", address.substr(colon + 1), 1, 65535));
  options.numWorkers = static_cast<std::size_t>(size);
  options.waitWorkers = false;
  options.timeout = limit;
  return c10::make_intrusive<c10d::TCPStore>(std::string(address.substr(0, colon)), options);
}

#if COHORT_TORCH_WITH_MPI
/// MPI's session of the process, which Python ends.
std::shared_ptr<MpiSession>& mpi_session() {
  static auto* const session = new std::shared_ptr<MpiSession>;
  return *session;
}
#endif

[[nodiscard]] std::shared_ptr<ControlPlane> over_mpi(std::chrono::milliseconds limit) {
#if COHORT_TORCH_WITH_MPI
  auto& session = mpi_session();
  if (session == nullptr) {
    session = std::make_shared<MpiSession>(MpiSessionOptions{.limit = limit});
  }
  return {session, &session->world()};
#else
  static_cast<void>(limit);
  throw ConfigError("control mpi: the package was built without MPI");
#endif
}

/// Collective. Ends MPI after the last state; `in_order` says that no rank has failed.
void finalize_mpi(bool in_order) {
#if COHORT_TORCH_WITH_MPI
  auto& session = mpi_session();
  if (session != nullptr && !in_order) {
    static_cast<MpiControlPlane&>(session->world()).messenger().abandon();
  }
  session.reset();
#else
  static_cast<void>(in_order);
#endif
}

/// "single", "mpi", "store://HOST:PORT", or the name of a process group, whose store is used.
[[nodiscard]] std::shared_ptr<ControlPlane> meet(std::string_view control, int rank, int size,
                                                 std::chrono::milliseconds limit) {
  constexpr std::string_view kStore = "store://";
  if (control == "single") {
    return std::move(make_thread_control_planes(1, limit)[0]);
  }
  if (control == "mpi") {
    return over_mpi(limit);
  }
  if (control.substr(0, kStore.size()) == kStore) {
    return over_store(connect_store(control.substr(kStore.size()), size, limit), control, rank,
                      size, limit);
  }
  // A connection of its own: waits of the process group's must not hold up these.
  return over_store(c10d::resolve_process_group(std::string(control))->getStore()->clone(), control,
                    rank, size, limit);
}

// --- states

[[nodiscard]] std::shared_ptr<Backend> make_backend(std::int64_t device, bool peer_mapping) {
  if (device < 0) {
    return host_backend({.map_peers = peer_mapping});
  }
#if COHORT_TORCH_WITH_CUDA
  // Torch has started CUDA, and threads run: the environment is as it is.
  return cuda_backend({.device = static_cast<int>(device),
                       .environment = {.leave_alone = true},
                       .peer_mapping = peer_mapping});
#else
  throw ConfigError("device: the package was built without CUDA, so only cpu can be had");
#endif
}

[[nodiscard]] GroupKind kind_of(std::string_view name) {
  for (const GroupKind kind : {GroupKind::world, GroupKind::tensor_parallel,
                               GroupKind::pipeline_parallel, GroupKind::decode_context_parallel}) {
    if (name == to_string(kind)) {
      return kind;
    }
  }
  throw ConfigError(fmt::format("symmetric: expected world, tp, pp or dcp, got {}", name));
}

[[nodiscard]] SymmetricOptions symmetric_options(const Names& symmetric, bool peer_mapping) {
  SymmetricOptions options{.enabled = !symmetric.empty(), .peer_mapping = peer_mapping};
  if (symmetric == Names{"all"}) {
    options.selection = Selection::all();
  } else if (options.enabled && symmetric != Names{"automatic"}) {
    GroupKindSet kinds;
    for (const auto& name : symmetric) {
      kinds.insert(kind_of(name));
    }
    options.selection = Selection::of(kinds);
  }
  return options;
}

/// Layout is tp, pp, dcp; meeting is this rank and the number of ranks, where `control` needs them.
std::int64_t parallel_state(Name control, Sizes meeting, Sizes layout, std::int64_t device,
                            Names symmetric, Name merge_plan, bool peer_mapping, bool debug_checks,
                            std::int64_t limit_ms, std::int64_t growth_bytes) {
  const auto plan = merge_plan_from_string(merge_plan);
  if (!plan) {
    throw ConfigError(fmt::format(
        "merge_plan: expected automatic, staged, packed or one_kernel, got {}", merge_plan));
  }
  const std::chrono::milliseconds limit =
      runtime_settings().timeout.value_or(std::chrono::milliseconds(limit_ms));
  if (!is_time_limit(limit)) {
    throw ConfigError(fmt::format("timeout: expected more than 0 s, got {} ms", limit_ms));
  }
  auto engine = std::make_shared<Engine>();
  engine->backend = make_backend(device, peer_mapping);
  engine->world =
      meet(control, static_cast<int>(meeting.at(0)), static_cast<int>(meeting.at(1)), limit);
  engine->state.emplace(ParallelState::create(
      *engine->world, {.layout = {.tp = static_cast<int>(layout.at(0)),
                                  .pp = static_cast<int>(layout.at(1)),
                                  .dcp = static_cast<int>(layout.at(2))},
                       .backend = engine->backend,
                       .symmetric = symmetric_options(symmetric, peer_mapping),
                       .merge = {.plan = *plan},
                       .debug_checks = debug_checks,
                       .arena = {.growth_bytes = static_cast<std::size_t>(growth_bytes)}}));
  return Engines::of_process().add(std::move(engine));
}

[[nodiscard]] Use use_state(std::int64_t state) {
  return Use(Engines::of_process().engine(state), "ParallelState");
}

void shutdown(std::int64_t state) {
  const Use use = use_state(state);
  use.engine().captures.clear();
  use.state().shutdown();
}

void drop(std::int64_t state) {
  TorchPools::of_process().leave(Engines::prefix_of(state));
  Engines::of_process().drop(state);
}

Names groups(std::int64_t state) {
  const Use use = use_state(state);
  Names names;
  for (const GroupCoordinator* group : use.state().groups()) {
    names.push_back(Engines::name_of(use.engine(), *group));
  }
  return names;
}

Names describe(std::int64_t state) {
  const Use use = use_state(state);
  Names lines;
  for (const GroupCoordinator* group : use.state().groups()) {
    lines.push_back(fmt::format("{}: {}", group->name(), cohort::describe(group->decision())));
  }
#if COHORT_TORCH_WITH_CUDA
  lines.push_back(describe_nccl(nccl_runtime_version()));
#endif
  return lines;
}

void synchronize(std::int64_t state, std::int64_t limit_ms) {
  const Use use = use_state(state);
  use.state().synchronize(use.stream(), std::chrono::milliseconds(limit_ms));
}

void order(std::int64_t state) {
  const Use use = use_state(state);
  use.state().order(use.stream());
}

void launched(std::int64_t state) {
  const Use use = use_state(state);
  use.state().launched(use.stream());
}

void reclaim_graphs(std::int64_t state) { use_state(state).state().reclaim_graphs(); }

void begin_graphs(std::int64_t state, bool pooled) {
  const Use use = use_state(state);
  ++use.engine().graph_captures;
  use.engine().pooled = pooled;
}

void end_graphs(std::int64_t state) {
  const Use use = use_state(state);
  if (--use.engine().graph_captures == 0) {
    use.engine().captures.clear();
  }
}

/// 0 where the package was built without CUDA.
std::int64_t nccl_version() {
#if COHORT_TORCH_WITH_CUDA
  return nccl_runtime_version();
#else
  return 0;
#endif
}

/// Of the torch that the operators were built against, such as "2.11.0".
std::string built_for() {
  return fmt::format("{}.{}.{}", TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH);
}

Names parts() {
  Names parts;
#if COHORT_TORCH_WITH_MPI
  parts.emplace_back("mpi");
#endif
#if COHORT_TORCH_WITH_CUDA
  parts.emplace_back("cuda");
#endif
  return parts;
}

// --- groups

/// This rank, then the world ranks of all, by rank in the group.
Sizes members(Name group) {
  const GroupUse<> use(group);
  Sizes numbers{use->rank()};
  numbers.insert(numbers.end(), use->ranks().begin(), use->ranks().end());
  return numbers;
}

void reserve(Name group, std::int64_t bytes) {
  if (bytes < 0) {
    throw UsageError(fmt::format("reserve: expected at least 0 bytes, got {}", bytes));
  }
  const GroupUse<> use(group);
  use->reserve(static_cast<std::size_t>(bytes));
}

/// Shape is batch, heads, latent, rope, value.
void reserve_for(Name group, Sizes shape, at::ScalarType dtype,
                 std::optional<at::ScalarType> query_dtype,
                 std::optional<at::ScalarType> rope_dtype) {
  const DcpUse use(group);
  DecodeShape step{.batch = shape.at(0),
                   .heads = shape.at(1),
                   .latent = shape.at(2),
                   .rope = shape.at(3),
                   .value = shape.at(4),
                   .dtype = dtype_from_torch(dtype)};
  if (query_dtype) {
    step.query_dtype = dtype_from_torch(*query_dtype);
  }
  if (rope_dtype) {
    step.rope_dtype = dtype_from_torch(*rope_dtype);
  }
  use->reserve_for(step);
}

void freeze(Name group) {
  const GroupUse<> use(group);
  use->freeze();
}

/// Used, reserved, peak, live blocks, segments, frozen.
Sizes arena(Name group) {
  const GroupUse<> use(group);
  const ArenaStatistics now = use->arena()->statistics();
  return {static_cast<std::int64_t>(now.used),     static_cast<std::int64_t>(now.reserved),
          static_cast<std::int64_t>(now.peak),     static_cast<std::int64_t>(now.live_blocks),
          static_cast<std::int64_t>(now.segments), now.frozen ? 1 : 0};
}

/// -1 for memory that is not the arena's.
std::int64_t arena_offset(const at::Tensor& x, Name group) {
  const GroupUse<> use(group);
  const auto offset = use->arena()->offset_of(x.const_data_ptr());
  return offset ? static_cast<std::int64_t>(*offset) : -1;
}

std::string path(Name collective, const at::Tensor& x, const at::Tensor& out, std::int64_t dim,
                 Name group) {
  const GroupUse<> use(group);
  for (const auto& [name, known] : {std::pair{"all_gather", Collective::all_gather},
                                    std::pair{"reduce_scatter", Collective::reduce_scatter},
                                    std::pair{"all_reduce", Collective::all_reduce},
                                    std::pair{"all_to_all", Collective::all_to_all},
                                    std::pair{"broadcast", Collective::broadcast}}) {
    if (collective == name) {
      return use->path(known, const_view_of(x), view_of(out), as_int(dim));
    }
  }
  throw UsageError(fmt::format("path: no collective is called {}", collective));
}

Names last_merge(Name group) {
  const DcpUse use(group);
  const MergeChoice choice = use->last_merge_choice();
  return {std::string(to_string(choice.plan)), choice.reason};
}

void barrier(Name group) {
  const GroupUse<> use(group);
  use->barrier(use.stream());
}

// --- symmetric memory

void enter_symmetric(Name group, bool disabled) {
  const GroupUse<> use(group);
  auto engine = Engines::of_process().group(group).engine;
  ScopeTarget target = *use;
  if (disabled) {
    target.arena = nullptr;
  }
  SymmetricScopes::of_thread().open.push_back({std::move(engine), target});
}

void leave_symmetric() {
  auto& open = SymmetricScopes::of_thread().open;
  if (open.empty()) {
    throw UsageError("use_symmetric_memory: left on another thread than it was entered on");
  }
  open.pop_back();
}

/// From the group's arena, whatever the policy says of its windows.
at::Tensor empty(Sizes size, at::ScalarType dtype, Name group) {
  const GroupUse<> use(group);
  return to_torch(use->arena()->empty(Dims(size), dtype_from_torch(dtype), use.stream()),
                  use.engine().backend);
}

/// From the scope that is open on this thread; torch's own under a null scope.
at::Tensor empty_in_scope(Sizes size, at::ScalarType dtype) {
  const auto& open = SymmetricScopes::of_thread().open;
  if (open.empty()) {
    throw UsageError("cohort.empty: no use_symmetric_memory is open on this thread");
  }
  Use use(open.back().engine, "cohort.empty");
  use.enter_capture();
  return use.result(size, dtype);
}

/// What torch's pools over the group's arena allocate with and give back to, as addresses; none
/// where the group has no windows or torch has no pools.
Sizes enter_pools(Name group) {
  const GroupUse<> use(group);
  if (ScopeTarget(*use).arena == nullptr ||
      use.engine().backend->device().kind == DeviceKind::host) {
    return {};
  }
  const auto allocate = TorchPools::of_process().enter(group);
  return {static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(allocate)),
          static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(&TorchPools::free))};
}

/// The number of the capture that the current stream is in, 0 for none.
std::int64_t capture(Name group) {
  const GroupUse<> use(group);
  return use.stream().valid() ? static_cast<std::int64_t>(use.stream().capture_id()) : 0;
}

// --- collectives

[[nodiscard]] ReduceOp op_of(std::string_view name) {
  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::prod, ReduceOp::min, ReduceOp::max}) {
    if (name == to_string(op)) {
      return op;
    }
  }
  throw UsageError(fmt::format("op: expected sum, prod, min or max, got {}", name));
}

/// The extents of `x` with that of `dim` made `times` as large, or divided where `times` is
/// negative. What does not divide is found by the call.
[[nodiscard]] Sizes scaled(const at::Tensor& x, std::int64_t dim, int times,
                           std::string_view argument) {
  Sizes shape = x.sizes().vec();
  auto& extent = shape[static_cast<std::size_t>(
      normalize_dim(as_int(dim), static_cast<int>(shape.size()), argument))];
  extent = times > 0 ? extent * times : extent / -times;
  return shape;
}

void all_gather_into(const at::Tensor& out, const at::Tensor& x, std::int64_t dim, Name group) {
  const GroupUse<> use(group);
  use->all_gather_into(view_of(out), const_view_of(x), as_int(dim), use.stream());
}

at::Tensor all_gather(const at::Tensor& x, std::int64_t dim, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const at::Tensor out =
      use.result(scaled(x, dim, use->size(), "all_gather x dim"), x.scalar_type());
  use->all_gather_into(view_of(out), in, as_int(dim), use.stream());
  return out;
}

void reduce_scatter_into(const at::Tensor& out, const at::Tensor& x, std::int64_t dim, Name op,
                         Name group) {
  const GroupUse<> use(group);
  use->reduce_scatter_into(view_of(out), const_view_of(x), as_int(dim), use.stream(), op_of(op));
}

at::Tensor reduce_scatter(const at::Tensor& x, std::int64_t dim, Name op, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const at::Tensor out =
      use.result(scaled(x, dim, -use->size(), "reduce_scatter x dim"), x.scalar_type());
  use->reduce_scatter_into(view_of(out), in, as_int(dim), use.stream(), op_of(op));
  return out;
}

void all_reduce_into(const at::Tensor& out, const at::Tensor& x, Name op, Name group) {
  const GroupUse<> use(group);
  use->all_reduce_into(view_of(out), const_view_of(x), use.stream(), op_of(op));
}

void all_reduce_(const at::Tensor& x, Name op, Name group) {
  const GroupUse<> use(group);
  use->all_reduce(view_of(x), use.stream(), op_of(op));
}

at::Tensor all_reduce(const at::Tensor& x, Name op, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const at::Tensor out = use.result(x.sizes().vec(), x.scalar_type());
  use->all_reduce_into(view_of(out), in, use.stream(), op_of(op));
  return out;
}

void broadcast_(const at::Tensor& x, std::int64_t root, Name group) {
  const GroupUse<> use(group);
  use->broadcast(view_of(x), as_int(root), use.stream());
}

at::Tensor all_to_all(const at::Tensor& x, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const at::Tensor out = use.result(x.sizes().vec(), x.scalar_type());
  use->all_to_all_into(view_of(out), in, use.stream());
  return out;
}

void send(const at::Tensor& x, std::int64_t to, Name group) {
  const GroupUse<> use(group);
  use->send(const_view_of(x), as_int(to), use.stream());
}

void recv_(const at::Tensor& x, std::int64_t from, Name group) {
  const GroupUse<> use(group);
  use->recv(view_of(x), as_int(from), use.stream());
}

void send_tensors(Names names, const std::vector<at::Tensor>& tensors, Name group) {
  const PpUse use(group);
  std::vector<NamedView> views;
  for (std::size_t i = 0; i < names.size(); ++i) {
    views.push_back({names[i], view_of(tensors.at(i))});
  }
  use->send_tensors(views, use.stream());
}

std::tuple<Names, std::vector<at::Tensor>> recv_tensors(Name group) {
  const PpUse use(group);
  std::tuple<Names, std::vector<at::Tensor>> received;
  for (NamedTensor& entry : use->recv_tensors(use.stream())) {
    std::get<0>(received).push_back(std::move(entry.name));
    std::get<1>(received).push_back(to_torch(std::move(entry.tensor), use.engine().backend));
  }
  return received;
}

// --- the decode step

void gather_query_into(const at::Tensor& q, const at::Tensor& q_nope, const at::Tensor& q_pe,
                       Name group) {
  const DcpUse use(group);
  use->gather_query_into(view_of(q), const_view_of(q_nope), const_view_of(q_pe), use.stream());
}

at::Tensor gather_query(const at::Tensor& q_nope, const at::Tensor& q_pe, Name group) {
  DcpUse use(group);
  const auto nope = const_view_of(q_nope);
  const auto pe = const_view_of(q_pe);
  Sizes shape{0, 0, 0};  // what has not three dimensions is refused by the call
  const bool as_bytes = nope.dtype() != pe.dtype();
  if (nope.ndim() == 3 && pe.ndim() == 3) {
    const auto width = [&](const ConstTensorView& part) {
      return part.size(2) * (as_bytes ? static_cast<std::int64_t>(size_of(part.dtype())) : 1);
    };
    shape = {nope.size(0), nope.size(1) * use->size(), width(nope) + width(pe)};
  }
  const at::Tensor q = use.result(shape, as_bytes ? at::kByte : q_nope.scalar_type());
  use->gather_query_into(view_of(q), nope, pe, use.stream());
  return q;
}

/// What merges read besides the partial attentions. Tensors that are not given are none.
struct MergeExtras {
  bool base2 = false;
  bool replicated = false;
  const std::optional<at::Tensor>& sink;
  const std::optional<at::Tensor>& local_tokens;

  [[nodiscard]] Partials partials(const at::Tensor& out, const at::Tensor& lse) const {
    Partials all{.out = const_view_of(out),
                 .lse = const_view_of(lse),
                 .base = base2 ? LseBase::two : LseBase::e};
    if (sink) {
      all.sink = const_view_of(*sink);
    }
    if (local_tokens) {
      all.local_tokens = const_view_of(*local_tokens);
    }
    return all;
  }
  [[nodiscard]] MergeResult result() const {
    return replicated ? MergeResult::replicated : MergeResult::by_head;
  }
};

void merge_attention_into(const at::Tensor& merged, const at::Tensor& out, const at::Tensor& lse,
                          bool base2, bool replicated, const std::optional<at::Tensor>& sink,
                          const std::optional<at::Tensor>& local_tokens,
                          const std::optional<at::Tensor>& merged_lse, Name group) {
  const DcpUse use(group);
  const MergeExtras extras{base2, replicated, sink, local_tokens};
  MergeInto into{.merged = view_of(merged), .result = extras.result()};
  if (merged_lse) {
    into.lse = view_of(*merged_lse);
  }
  use->merge_attention_into(into, extras.partials(out, lse), use.stream());
}

/// Merges into new tensors; what has not three or four dimensions is refused by the call.
[[nodiscard]] std::pair<at::Tensor, at::Tensor> merge_new(const at::Tensor& out,
                                                          const at::Tensor& lse,
                                                          const MergeExtras& extras, bool with_lse,
                                                          Name group) {
  DcpUse use(group);
  const Partials partials = extras.partials(out, lse);
  Sizes shape{0, 0, 0};
  if (out.dim() == 3 || out.dim() == 4) {
    shape = out.sizes().slice(static_cast<std::size_t>(out.dim() - 3)).vec();
    shape[1] /= extras.replicated ? 1 : use->size();
  }
  const at::Tensor merged = use.result(shape, out.scalar_type());
  const at::Tensor merged_lse =
      with_lse ? use.result({shape[0], shape[1]}, at::kFloat) : at::Tensor();
  MergeInto into{.merged = view_of(merged), .result = extras.result()};
  if (with_lse) {
    into.lse = view_of(merged_lse);
  }
  use->merge_attention_into(into, partials, use.stream());
  return {merged, merged_lse};
}

at::Tensor merge_attention(const at::Tensor& out, const at::Tensor& lse, bool base2,
                           bool replicated, const std::optional<at::Tensor>& sink,
                           const std::optional<at::Tensor>& local_tokens, Name group) {
  return merge_new(out, lse, {base2, replicated, sink, local_tokens}, false, group).first;
}

std::tuple<at::Tensor, at::Tensor> merge_attention_lse(
    const at::Tensor& out, const at::Tensor& lse, bool base2, bool replicated,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& local_tokens,
    Name group) {
  return merge_new(out, lse, {base2, replicated, sink, local_tokens}, true, group);
}

void record_stream(const at::Tensor& x, std::int64_t state) {
  const auto engine = Engines::of_process().engine(state);
  if (tensor_behind(x) == nullptr) {
    record_current_stream(x, *engine->backend);  // torch's business, under torch's own lock
    return;
  }
  const Use use(engine, "ParallelState");
  record_current_stream(x, *engine->backend);
}

// --- registration

/// `Function` with the library's errors as torch's.
template <auto Function>
struct Operator;
template <class Result, class... Arguments, Result (*Function)(Arguments...)>
struct Operator<Function> {
  static Result call(Arguments... arguments) {
    return with_torch_errors(
        [&]() -> Result { return Function(std::forward<Arguments>(arguments)...); });
  }
};

template <auto Function>
inline constexpr auto* as_operator = &Operator<Function>::call;

/// Calls `visit` with the schema and the implementation of each operator on tensors.
template <class Visit>
void for_each_tensor_operator(const Visit& visit) {
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
  visit("broadcast_(Tensor(a!) x, int root, str group) -> ()", as_operator<&broadcast_>);
  visit("all_to_all(Tensor x, str group) -> Tensor", as_operator<&all_to_all>);
  visit("send(Tensor x, int to, str group) -> ()", as_operator<&send>);
  visit("recv_(Tensor(a!) x, int source, str group) -> ()", as_operator<&recv_>);
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
}

[[nodiscard]] std::string name_in(std::string_view schema) {
  return std::string(schema.substr(0, schema.find('(')));
}

TORCH_LIBRARY(cohort, m) {
  for_each_tensor_operator([&](const char* schema, auto) { m.def(schema); });
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
  m.def("finalize_mpi(bool in_order) -> ()", as_operator<&finalize_mpi>);
  m.def("nccl_version() -> int", as_operator<&nccl_version>);
  m.def("built_for() -> str", as_operator<&built_for>);
  m.def("parts() -> str[]", as_operator<&parts>);
  m.def("members(str group) -> int[]", as_operator<&members>);
  m.def("reserve(str group, int bytes) -> ()", as_operator<&reserve>);
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
  m.def("barrier(str group) -> ()", as_operator<&barrier>);
  m.def("enter_symmetric(str group, bool disabled) -> ()", as_operator<&enter_symmetric>);
  m.def("leave_symmetric() -> ()", as_operator<&leave_symmetric>);
  m.def("enter_pools(str group) -> int[]", as_operator<&enter_pools>);
  m.def("capture(str group) -> int", as_operator<&capture>);
  m.def("empty(int[] size, ScalarType dtype, str group) -> Tensor", as_operator<&empty>);
  m.def("empty_in_scope(int[] size, ScalarType dtype) -> Tensor", as_operator<&empty_in_scope>);
  m.def("recv_tensors(str group) -> (str[], Tensor[])", as_operator<&recv_tensors>);
  m.def("record_stream(Tensor x, int state) -> ()", as_operator<&record_stream>);
}

void implement(torch::Library& m) {
  for_each_tensor_operator(
      [&](const char* schema, auto function) { m.impl(name_in(schema).c_str(), function); });
}

TORCH_LIBRARY_IMPL(cohort, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(cohort, CUDA, m) { implement(m); }

/// A backward through any of them is refused by the operator's name.
TORCH_LIBRARY_IMPL(cohort, Autograd, m) {
  for_each_tensor_operator([&](const char* schema, auto) {
    m.impl(name_in(schema).c_str(), torch::autograd::autogradNotImplementedFallback());
  });
}

}  // namespace
}  // namespace cohort::python
