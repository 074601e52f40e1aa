// SPDX-License-Identifier: Apache-2.0
#include "decoder.hpp"

#include <algorithm>
#include <numeric>

#include "numbers.hpp"

namespace dcp_decode {
namespace {

using cohort::DType;

/// The first head of this rank among those of its TP group.
std::int64_t first_head(const Options& options, cohort::ParallelState& state) {
  return options.heads / options.layout.tp * state.tp().rank();
}

}  // namespace

Decoder::Decoder(const Options& options, cohort::ParallelState& state, Machine& machine)
    : options_(options),
      state_(state),
      stream_(machine.stream()),
      shard_(options.layout.dcp),
      own_heads_(options.heads / options.layout.tp),
      group_heads_(own_heads_ * options.layout.dcp),
      layer_({options.heads, options.latent_dim, options.rope_dim, options.value_dim}, options.seed,
             state.pp().rank(), first_head(options, state), own_heads_),
      lengths_(ragged_lengths(options.batch, options.context, options.seed)),
      shards_(index(options.batch)),
      caches_(index(options.batch)),
      hidden_(machine, ordinary({options.batch, options.width()}, DType::bf16)),
      tokens_(machine, ordinary({options.batch}, DType::i64)),
      nope_(machine, ordinary({options.batch, own_heads_, options.latent_dim}, DType::bf16)),
      pe_(machine, ordinary({options.batch, own_heads_, options.rope_dim}, DType::bf16)),
      out_(machine, ordinary({options.batch, group_heads_, options.value_dim}, DType::bf16)),
      lse_(machine, ordinary({options.batch, group_heads_}, DType::f32)) {
  auto& dcp = state_.dcp();
  dcp.reserve_for({.batch = options_.batch,
                   .heads = group_heads_,
                   .latent = options_.latent_dim,
                   .rope = options_.rope_dim,
                   .value = options_.value_dim});
  const std::int64_t batch = options_.batch;
  query_.emplace(machine, symmetric(dcp, {batch, group_heads_, options_.width()}, DType::bf16));
  merged_.emplace(machine, symmetric(dcp, {batch, own_heads_, options_.value_dim}, DType::bf16));
  merged_lse_.emplace(machine, symmetric(dcp, {batch, own_heads_}, DType::f32));
  projected_.emplace(machine, symmetric(state_.tp(), {batch, options_.width()}, DType::f32));
  if (options_.graph) {
    graph_ = state_.capture(stream_, [this] { enqueue_layer(); });
  }
  dcp.freeze();  // a step that needed more than was reserved would be an error

  fill_context();
  std::fill_n(tokens_.host(), tokens_.size(), 0);
}

cohort::Tensor Decoder::ordinary(const cohort::Dims& shape, DType dtype) {
  return state_.backend().allocate(shape, dtype, stream_);
}

cohort::Tensor Decoder::symmetric(const cohort::GroupCoordinator& group, const cohort::Dims& shape,
                                  DType dtype) {
  const cohort::SymmetricScope scope(group, stream_);
  return cohort::empty(shape, dtype);
}

void Decoder::fill_context() {
  std::vector<BFloat16> row(index(options_.width()));
  for (std::int64_t b = 0; b < options_.batch; ++b) {
    const std::int64_t length = std::exchange(lengths_[index(b)], 0);
    for (std::int64_t t = 0; t < length; ++t) {
      layer_.context_row(b, t, row);
      append(b, row);
    }
  }
}

/// Token t of a sequence lives on rank t mod n of the DCP group.
void Decoder::append(std::int64_t sequence, std::span<const BFloat16> row) {
  const std::int64_t token = lengths_[index(sequence)]++;
  auto& all = caches_[index(sequence)];
  all.insert(all.end(), row.begin(), row.end());
  if (shard_.owner(token) == state_.dcp().rank()) {
    auto& own = shards_[index(sequence)];
    own.insert(own.end(), row.begin(), row.end());
  }
}

void Decoder::step() {
  begin_step();
  if (graph_) {
    graph_->launch(stream_);
  } else {
    enqueue_layer();
  }
  state_.dcp().synchronize(stream_, cohort::kDefaultTimeLimit);
  for (std::size_t phase = kGather; phase <= kReduce; ++phase) {
    const std::chrono::duration<double> elapsed = marks_[phase + 1] - marks_[phase];
    seconds_[phase] += elapsed.count();
  }
  check_step();
  finish_step();
}

/// Hidden states come from the token chosen last, or from the stage before.
void Decoder::begin_step() {
  const Time start = std::chrono::steady_clock::now();
  auto& pp = state_.pp();
  if (pp.is_first()) {
    for (std::int64_t b = 0; b < options_.batch; ++b) {
      layer_.embed(tokens_.host()[b], lengths_[index(b)], hidden_of(b));
    }
  } else {
    const std::array<cohort::NamedView, 1> set{{{"hidden", hidden_.view()}}};
    pp.recv_tensors_into(set, stream_);
    hidden_.download();
    pp.synchronize(stream_, cohort::kDefaultTimeLimit);
  }
  for (std::int64_t b = 0; b < options_.batch; ++b) {
    layer_.query(hidden_of(b), nope_.host() + b * own_heads_ * options_.latent_dim,
                 pe_.host() + b * own_heads_ * options_.rope_dim);
  }
  spend(kHandOver, start);
}

/// The layer in stream order; on its own or inside a capture.
void Decoder::enqueue_layer() {
  auto& dcp = state_.dcp();
  nope_.upload();
  pe_.upload();
  mark(kGather);
  dcp.gather_query_into(query_->view(), nope_.view(), pe_.view(), stream_);
  mark(kAttention);
  query_->download();
  stream_.submit([this] { attend_locally(); });
  out_.upload();
  lse_.upload();
  mark(kMerge);
  dcp.merge_attention_into({.merged = merged_->view(), .lse = merged_lse_->view()},
                           {.out = out_.view(), .lse = lse_.view(), .base = options_.lse_base},
                           stream_);
  mark(kReduce);
  merged_->download();
  merged_lse_->download();
  stream_.submit([this] { project(); });
  projected_->upload();
  state_.tp().row_parallel_reduce(projected_->view(), stream_);
  projected_->download();
  mark(kReduce + 1);
}

void Decoder::attend_locally() {
  for (std::int64_t b = 0; b < options_.batch; ++b) {
    const std::int64_t row = b * group_heads_;
    local_attention({shards_[index(b)], options_.width()},
                    {query_->host() + row * options_.width(), options_.width()}, group_heads_,
                    options_.value_dim, score_scale(options_.width()), options_.lse_base,
                    {out_.host() + row * options_.value_dim, options_.value_dim},
                    lse_.host() + row);
  }
}

void Decoder::project() {
  const std::int64_t width = options_.width();
  for (std::int64_t b = 0; b < options_.batch; ++b) {
    layer_.project(merged_->host() + b * own_heads_ * options_.value_dim,
                   {projected_->host() + b * width, index(width)});
  }
}

void Decoder::check_step() {
  const Time start = std::chrono::steady_clock::now();
  for (std::int64_t b = 0; b < options_.batch; ++b) {
    const std::int64_t row = b * own_heads_;
    deviation_.include(compare(
        {caches_[index(b)], options_.width()}, nope_.host() + row * options_.latent_dim,
        pe_.host() + row * options_.rope_dim, own_heads_, options_.latent_dim, options_.value_dim,
        options_.lse_base, merged_->host() + row * options_.value_dim, merged_lse_->host() + row));
  }
  for (std::size_t i = 0; i < merged_->size(); ++i) {  // FNV-1a
    hash_ = (hash_ ^ merged_->host()[i].bits) * 0x100000001b3ULL;
  }
  spend(kReference, start);
}

/// The layer's row joins the cache; its result goes to the next stage, or becomes the next token.
void Decoder::finish_step() {
  const Time start = std::chrono::steady_clock::now();
  std::vector<BFloat16> row(index(options_.width()));
  for (std::int64_t b = 0; b < options_.batch; ++b) {
    layer_.kv_row(hidden_of(b), row);
    append(b, row);
    layer_.add_and_normalize(hidden_of(b), {projected_->host() + b * options_.width(), row.size()});
  }
  auto& pp = state_.pp();
  if (pp.is_last()) {
    for (std::int64_t b = 0; b < options_.batch; ++b) {
      tokens_.host()[b] = Layer::choose_token(hidden_of(b));
    }
    tokens_.upload();
  } else {
    hidden_.upload();
    const std::array<cohort::NamedView, 1> set{{{"hidden", hidden_.view()}}};
    pp.send_tensors(set, stream_);
  }
  pp.broadcast(tokens_.view(), pp.size() - 1, stream_);
  tokens_.download();
  pp.synchronize(stream_, cohort::kDefaultTimeLimit);
  spend(kHandOver, start);
}

std::span<BFloat16> Decoder::hidden_of(std::int64_t sequence) {
  return {hidden_.host() + sequence * options_.width(), index(options_.width())};
}

/// Notes the time at which the stream gets here, also in every launch of the graph.
void Decoder::mark(std::size_t place) {
  stream_.submit([this, place] { marks_[place] = std::chrono::steady_clock::now(); });
}

void Decoder::spend(Phase phase, Time since) {
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - since;
  seconds_[phase] += elapsed.count();
}

std::int64_t Decoder::tokens() const {
  return std::accumulate(lengths_.begin(), lengths_.end(), std::int64_t{0});
}

std::int64_t Decoder::own_tokens() const {
  std::int64_t sum = 0;
  for (const std::int64_t length : lengths_) {
    sum += shard_.local_count(length, state_.dcp().rank());
  }
  return sum;
}

std::int64_t Decoder::empty_shards() const {
  return std::count_if(shards_.begin(), shards_.end(),
                       [](const auto& rows) { return rows.empty(); });
}

}  // namespace dcp_decode
