// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "cohort/control_plane.hpp"
#include "cohort/dcp/kv_placement.hpp"
#include "cohort/dcp/partials.hpp"
#include "cohort/dtype.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/give_up.hpp"
#include "cohort/loose_parts.hpp"
#include "cohort/residual_norm.hpp"
#include "cohort/stream.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/tensor.hpp"
#include "cohort/topology.hpp"

/// \file
/// What a backend brings: memory that can be registered, a transport for each group, and the local
/// arithmetic of the DCP step. The host and CUDA backends implement it; the core names neither.

namespace cohort {

/// How elements are combined.
enum class ReduceOp : std::uint8_t { sum, prod, min, max };

/// Whether it is one of them, and not some other number.
[[nodiscard]] constexpr bool is_reduce_op(ReduceOp op) noexcept { return op <= ReduceOp::max; }

/// Such as "sum".
[[nodiscard]] constexpr std::string_view to_string(ReduceOp op) noexcept {
  switch (op) {
    case ReduceOp::sum:
      return "sum";
    case ReduceOp::prod:
      return "prod";
    case ReduceOp::min:
      return "min";
    case ReduceOp::max:
      return "max";
  }
  return "unknown";
}

/// The collectives whose path can be asked for.
enum class Collective : std::uint8_t {
  all_gather,
  reduce_scatter,
  all_reduce,
  all_to_all,
  broadcast,
  all_reduce_rms_norm,
};

/// One local allocation that can be registered with groups. Freed on destruction, which comes
/// after that of every window on it.
class Segment {
 public:
  Segment() = default;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  virtual ~Segment() = default;

  /// Its first byte, in this process.
  [[nodiscard]] virtual void* data() const noexcept = 0;
  /// Its length.
  [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
  /// Whether transports of such a backend register it: then it is of that backend's one class of
  /// such segments. Asked instead of the type, for sources without run-time type information.
  [[nodiscard]] virtual bool registers_with(BackendKind) const noexcept { return false; }

  /// Where equal tensors need not lie at equal offsets on all ranks.
  [[nodiscard]] LooseParts& loose_parts() noexcept { return loose_parts_; }
  /// The same, to look at.
  [[nodiscard]] const LooseParts& loose_parts() const noexcept { return loose_parts_; }

 private:
  LooseParts loose_parts_;
};

/// The registration of a segment with one group. Its destruction deregisters: local, and called
/// when no call of the group that touches the segment is outstanding.
class Window {
 public:
  Window() = default;
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;
  virtual ~Window() = default;

  /// Addresses of every rank's copy of the segment, by rank in the group, for this process's own
  /// loads and stores. Empty where only the transport can address the peers.
  [[nodiscard]] virtual std::span<void* const> peers() const noexcept = 0;
};

/// Local tensor arithmetic in stream order. Arguments have been validated; no call communicates or
/// allocates, and all arithmetic is fp32 with the rules of dcp/lse_merge.hpp.
class TensorOps {
 public:
  TensorOps() = default;
  TensorOps(const TensorOps&) = delete;
  TensorOps& operator=(const TensorOps&) = delete;
  virtual ~TensorOps() = default;

  /// What keeps a merge of partials like `out` [S, B, H, D] into those rows from running on this
  /// backend by any plan, or nothing. Follows from sizes and type alone, which are equal on all
  /// ranks; asked before anything is enqueued.
  [[nodiscard]] virtual std::string merge_obstacle(const ConstTensorView& /*out*/,
                                                   const dcp::MergeRows& /*rows*/) const {
    return {};
  }
  /// The same of a query's parts.
  [[nodiscard]] virtual std::string query_obstacle(const ConstTensorView& /*q_nope*/,
                                                   const ConstTensorView& /*q_pe*/) const {
    return {};
  }

  /// The same of rows that are to be normed, into that type.
  [[nodiscard]] virtual std::string norm_obstacle(const ConstTensorView& /*x*/,
                                                  DType /*out*/) const {
    return {};
  }

  /// Copies elements between equal shapes of any strides; converts f32 to f16 or bf16 where the
  /// types differ so.
  virtual void copy(const ConstTensorView& from, const TensorView& to, StreamRef stream) = 0;

  /// Fills a step's counts and slots.
  virtual void place_step(const dcp::KvRows& rows, StreamRef stream) = 0;

  /// packed[..., :Dn] = q_nope and packed[..., Dn:] = q_pe, in one pass over the inputs.
  /// Shapes [B, h, Dn], [B, h, Dr] and [B, h, Dn + Dr].
  virtual void pack_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                          const TensorView& packed, StreamRef stream) = 0;

  /// The LSEs of this rank's rows, lse [B, H] f32: of its splits together, -inf where it has no
  /// tokens.
  virtual void local_lse(const Partials& partials, const TensorView& lse, StreamRef stream) = 0;

  /// corrected[b, h, :] = weight of `rank` at (b, h) times its row of `partials`, zeros where it is
  /// empty. `lses` [n, B, H] f32 without gaps, of the ranks' rows; `corrected` [B, H, D] in f32 or
  /// in the type of the partials.
  virtual void correct_partial(const Partials& partials, const ConstTensorView& lses, int rank,
                               const TensorView& corrected, StreamRef stream) = 0;

  /// The merged LSEs of this rank's rows, where asked for, from the `lses` of the ranks' rows
  /// [n, B, H] of any strides.
  virtual void merge_lse(const ConstTensorView& lses, const MergeArguments& arguments, int rank,
                         StreamRef stream) = 0;

  /// Fills piece r of `pieces` (u8 [n, bytes of a piece], the layout of dcp/packed_piece.hpp for as
  /// many rows as a rank has at most) with this rank's rows that rank r merges.
  virtual void pack_partial(const MergeArguments& arguments, const TensorView& pieces,
                            StreamRef stream) = 0;

  /// Merges the pieces that all ranks packed for this one, in rank order.
  virtual void merge_pieces(const ConstTensorView& pieces, const MergeArguments& arguments,
                            int rank, StreamRef stream) = 0;

  /// residual += x, rounded to their type; out = residual / sqrt(mean of its squares + epsilon) *
  /// weight of each row, from the rounded residual on in fp32, and rounded once; or that times
  /// the reciprocal of the scale, in fp32, to the nearest of f8_e4m3 within +-448. The squares are
  /// added in an order that depends on nothing but the row's size and type. `x` may be `out`.
  virtual void rms_norm(const NormArguments& arguments, StreamRef stream) = 0;

  /// Merges what a group's only rank has, with the bits of the two above, where that needs no
  /// pieces. Where it does, does nothing and returns false.
  [[nodiscard]] virtual bool merge_alone(const MergeArguments& /*arguments*/,
                                         StreamRef /*stream*/) {
    return false;
  }
};

/// The types of a query's parts. Where they differ the parts are moved as bytes, of which ranks
/// that mean different ones could have equal numbers.
struct QueryTypes {
  DType nope = DType::u8;  ///< Of q_nope.
  DType pe = DType::u8;    ///< Of q_pe.

  /// For what ranks compare.
  [[nodiscard]] constexpr std::int64_t number() const noexcept {
    return static_cast<std::int64_t>(nope) * 256 + static_cast<std::int64_t>(pe);
  }
};

/// Kernels that address peers' memory themselves. Collective like every call of a transport.
class PeerKernels {
 public:
  PeerKernels() = default;
  PeerKernels(const PeerKernels&) = delete;
  PeerKernels& operator=(const PeerKernels&) = delete;
  virtual ~PeerKernels() = default;

  /// The largest inbox slot, in bytes, that the shapes below may need. Collective: grows the
  /// library's inboxes, outside of captures only.
  virtual void reserve(std::size_t slot_bytes) = 0;

  /// Empty where the one-kernel merge can run with these arguments, otherwise why it cannot.
  [[nodiscard]] virtual std::string merge_obstacle(const MergeArguments& arguments) const = 0;
  /// Most bytes of a partial [B, H, D] with which every rank had better merge everything itself
  /// where all want everything, instead of its heads and gathering those.
  [[nodiscard]] virtual std::int64_t most_replicated_bytes() const noexcept { return 0; }
  /// One launch: push, wait, merge, write.
  virtual void merge_attention(const MergeArguments& arguments, StreamRef stream) = 0;

  /// Empty where the fused query gather can run, otherwise why it cannot.
  [[nodiscard]] virtual std::string gather_obstacle(const ConstTensorView& q_nope,
                                                    const ConstTensorView& q_pe) const = 0;
  /// q [B, H, Dn + Dr] from every rank's q_nope [B, H/n, Dn] and q_pe [B, H/n, Dr], all of one
  /// type. The ranks agree on `types` as well: what the parts are that come as bytes.
  virtual void gather_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                            const TensorView& q, QueryTypes types, StreamRef stream) = 0;
  /// Local, for the query gathers that follow: whether the kernel behind one waits for it where a
  /// card launches it early.
  virtual void attention_waits(bool /*waits*/) noexcept {}
};

/// Moves tensor bytes for one group. Every call but `send` and `recv` is collective: all ranks
/// issue the same sequence. Calls are enqueued in stream order and captured where the stream is
/// capturing. The group has validated shapes, dtypes and devices, and ordered the stream behind its
/// calls on other streams; views may have any strides.
class Transport {
 public:
  Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;
  virtual ~Transport() = default;

  /// Such as "nccl".
  [[nodiscard]] virtual std::string_view name() const noexcept = 0;
  /// What the policy decides on; equal on all ranks.
  [[nodiscard]] virtual const SymmetricCapabilities& capabilities() const noexcept = 0;
  /// Null where the ranks cannot address each other's memory.
  [[nodiscard]] virtual PeerKernels* peer_kernels() noexcept = 0;

  /// Collective; the ranks have agreed on sequence, size and history before. Throws
  /// `TransportError`, `SymmetryError` and `TimeoutError`.
  [[nodiscard]] virtual std::unique_ptr<Window> register_segment(Segment& segment) = 0;

  /// Whether a call may take for granted that a buffer of a window lies at the same offset on every
  /// rank, so that it goes wrong silently where it does not. Where each rank tells the others its
  /// own offsets, or nothing is addressed by offset, arenas need not stay alike.
  [[nodiscard]] virtual bool needs_equal_offsets() const noexcept { return false; }
  /// From here on every call whose buffers have to lie at equal offsets compares them over the
  /// control plane before it enqueues anything, and throws `SymmetryError` where they differ: debug
  /// checks. On all ranks or none.
  virtual void compare_places() noexcept {}
  /// From here on a `recv` also compares the shape of what it gets with its own, where messages say
  /// what they are: debug checks.
  virtual void compare_shapes() noexcept {}

  /// Makes room for collectives whose layout the transport has to pack, with up to `bytes` of input
  /// and output together, so that they can be captured without having run before. Local; not within
  /// a capture. A transport that packs nothing has nothing to do.
  virtual void reserve_scratch(std::size_t /*bytes*/) {}

  /// The ranks of the next all-gather, all-reduce or all-to-all have to agree on this as well,
  /// where they compare what they call: what its bytes are, and what becomes of them. Not 0. Local.
  virtual void agree_also(std::int64_t /*form*/) noexcept {}

  /// Rank r's `in` becomes extents [sum(sizes[..r)), + sizes[r]) of `out` along `dim`.
  virtual void all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                          std::span<const std::int64_t> sizes, StreamRef stream) = 0;
  /// `out` becomes the sum over ranks of this rank's extents of `in` along `dim`.
  virtual void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                              std::span<const std::int64_t> sizes, ReduceOp op,
                              StreamRef stream) = 0;
  /// `in` may be `out`.
  virtual void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op,
                          StreamRef stream) = 0;
  /// An all-reduce of x and what `TensorOps::rms_norm` does with the sum, where the transport has
  /// one call for both; where it has none, which follows from sizes, types and the group alone,
  /// does nothing and returns false.
  [[nodiscard]] virtual bool all_reduce_rms_norm(const NormArguments& /*arguments*/,
                                                 StreamRef /*stream*/) {
    return false;
  }
  /// Every rank gets `root`'s elements.
  virtual void broadcast(const TensorView& tensor, int root, StreamRef stream) = 0;
  /// Part r of `in` along dimension 0 goes to rank r; part r of `out` came from rank r.
  virtual void all_to_all(const ConstTensorView& in, const TensorView& out, StreamRef stream) = 0;
  /// Matched by one `recv` of the same size; messages of a pair keep their order.
  virtual void send(const ConstTensorView& tensor, int to, StreamRef stream) = 0;
  /// Fills `tensor` with what rank `from` sends.
  virtual void recv(const TensorView& tensor, int from, StreamRef stream) = 0;
  /// Stream work after it runs once every rank's stream has reached it.
  virtual void barrier(StreamRef stream) = 0;

  /// The path that a call with these arguments takes, such as "direct" or "bounce".
  [[nodiscard]] virtual std::string path(Collective collective, const ConstTensorView& in,
                                         const TensorView& out, int dim) const = 0;

  /// Waits until the stream is idle, watching the group as well. Throws `TimeoutError` naming the
  /// missing ranks, `TransportError` where a peer failed.
  virtual void synchronize(StreamRef stream, std::chrono::milliseconds limit) = 0;

  /// The stream is idle: throws as `synchronize` where it had calls of the group, or launches that
  /// may hold some, and one is known to have failed. Any thread, whatever the group's own does
  /// meanwhile but ending the transport.
  virtual void check(StreamRef /*stream*/, PeerLook /*look*/) {}
  /// A graph that may hold calls of the group is about to be launched. Throws where another rank is
  /// known to have left.
  virtual void before_launch(StreamRef /*stream*/) {}

  /// Bytes of an inbox's slot (see `PeerKernels::reserve`) in which a collective travels whose
  /// larger side, input or output, has `bytes`, and its last dimension `row_bytes`; 0 where the
  /// library's own kernels do not take it.
  [[nodiscard]] virtual std::size_t slot_bytes(Collective /*collective*/, std::size_t /*bytes*/,
                                               std::size_t /*row_bytes*/) const noexcept {
    return 0;
  }

  /// Whether a call of the group is known to have failed, without asking the device: one load, for
  /// engines that wait by means of their own. `synchronize` then says what happened.
  [[nodiscard]] virtual bool failed() const noexcept { return false; }

  /// Memory for the group's records that its ranks on this machine map, zeros at first; none where
  /// they map nothing. Asked once.
  [[nodiscard]] virtual TraceRings trace_rings() { return {}; }
  /// A call of the group begins on this rank: what the transport has done so far. `capture`: that
  /// of the call's stream, which holds until `call_ends`; 0 without one.
  [[nodiscard]] virtual TransportStand call_begins(TraceCall /*call*/, StreamRef /*stream*/,
                                                   CaptureId /*capture*/) noexcept {
    return {};
  }
  /// It has been enqueued, or has failed: what the transport has done by then.
  [[nodiscard]] virtual TransportStand call_ends() noexcept { return {}; }
  /// Writes how far the device has come into the ring; waits for it no longer than some
  /// milliseconds. Any thread, also while calls are made. Nothing where that stands there already.
  virtual void look_at_device(TraceRing& /*ring*/) {}

  /// Before teardown: waits so long for the group's calls to come to their end, and then tells
  /// those that wait for ranks to end. Local; the group makes no call afterwards. What cannot be
  /// ended keeps its memory when the transport goes.
  virtual void settle(std::chrono::milliseconds /*patience*/) noexcept {}

  /// Teardown shall not wait for peers, of which some may be gone, and those that still wait for
  /// this rank by the transport's own means shall not either, and learn the reason. Local; the
  /// group makes no call afterwards.
  virtual void forsake_peers(const detail::GiveUp& /*why*/) noexcept {}
  /// The device has refused, on this rank alone, what `error` says: a call or a launch that is not
  /// captured, or the question whether one has ended. Ranks that cannot see it are told, and the
  /// group has ended, unless it had before.
  virtual void refused(const std::exception_ptr& /*error*/) noexcept {}
  /// What this rank has left the group with by the transport's own means; nothing before, and where
  /// it has none but the control plane's.
  [[nodiscard]] virtual std::optional<detail::GiveUp> left_with() const { return std::nullopt; }
  /// What the last call threw where the ranks differed in it, and the group works on; nothing where
  /// it has failed. Any thread.
  [[nodiscard]] virtual std::optional<detail::GiveUp> differed() const { return std::nullopt; }

  /// Collective. At least so many lanes: a call of one lane needs no order against those of others,
  /// where the transport's own kernels carry it. A transport whose calls block has nothing to do.
  virtual void reserve_lanes(int /*lanes*/) {}
  /// The lane of the calls that follow, one of those reserved; 0 at first.
  virtual void select_lane(int /*lane*/) noexcept {}

  /// Most thread blocks of own kernels in the calls that follow; 0 for the backend's budget. Equal
  /// on all ranks.
  virtual void limit_blocks(int /*blocks*/) noexcept {}
};

/// A kind of device with its memory, streams, transports and arithmetic. Shared by all groups, and
/// by the arenas of its memory, so that tensors may outlive everything else.
class Backend : public std::enable_shared_from_this<Backend> {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  /// Host or cards.
  [[nodiscard]] virtual BackendKind kind() const noexcept = 0;
  /// Where its tensors lie.
  [[nodiscard]] virtual Device device() const noexcept = 0;
  /// Runs its streams.
  [[nodiscard]] virtual StreamDriver& streams() noexcept = 0;
  /// Local work on tensors.
  [[nodiscard]] virtual TensorOps& ops() noexcept = 0;

  /// Local. Sizes are multiples of `segment_granularity`. Throws `TransportError`.
  [[nodiscard]] virtual std::unique_ptr<Segment> allocate_segment(std::size_t bytes) = 0;
  /// The same for memory that will never be registered.
  [[nodiscard]] virtual std::unique_ptr<Segment> allocate_workspace(std::size_t bytes) {
    return allocate_segment(bytes);
  }
  /// Segments are multiples of that many bytes.
  [[nodiscard]] virtual std::size_t segment_granularity() const noexcept = 0;
  /// Ordinary memory, in stream order where the device allows. Throws `TransportError`.
  [[nodiscard]] virtual Tensor allocate(const Dims& shape, DType dtype, StreamRef stream) = 0;

  /// Collective over `group`, which outlives the transport.
  [[nodiscard]] virtual std::unique_ptr<Transport> connect(ControlPlane& group) = 0;
};

}  // namespace cohort
