// SPDX-License-Identifier: Apache-2.0
#include "engine.hpp"

#include <cmath>
#include <initializer_list>
#include <utility>

#include "cohort/kv_step.hpp"

namespace decode_engine {

namespace {

using cohort::DType;

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

}  // namespace

Weights::Weights(const Model& model, Device& device, const Place& place) {
  const Sizes& s = model.sizes();
  /// One behind the other.
  const auto make = [&](std::int64_t layer,
                        std::initializer_list<std::pair<Part, Block>> blocks) -> const BFloat16* {
    std::int64_t elements = 0;
    for (const auto& [part, block] : blocks) {
      elements += block.elements();
    }
    memory_.push_back(device.backend()->allocate({elements}, DType::bf16, device.stream()));
    device.synchronize();
    auto* to = memory_.back().data_as<BFloat16>();
    for (const auto& [part, block] : blocks) {
      if (const auto noise = model.noise(part, layer)) {
        device.fill_with_noise(to, *noise, block);
      } else {
        device.put(to, bytes_of(model.block(part, layer, block)));
      }
      to += block.elements();
    }
    return memory_.back().data_as<BFloat16>();
  };
  const auto all_of = [&](Part part, std::int64_t first, std::int64_t count) {
    return std::pair(part, Block{first, count, 0, model.columns(part)});
  };
  const auto rows = [&](Part part, std::int64_t layer, std::int64_t first, std::int64_t count) {
    return make(layer, {all_of(part, first, count)});
  };
  const auto columns = [&](Part part, std::int64_t layer, std::int64_t first, std::int64_t count) {
    return make(layer, {{part, Block{0, s.hidden, first, count}}});
  };
  const std::int64_t heads = place.own_heads(s);
  const std::int64_t head = place.tp_rank * heads;
  const std::int64_t inner = place.own_inner(s);
  const std::int64_t first_inner = place.tp_rank * inner;
  for (std::int64_t l = place.first_layer(s); l < place.end_layer(s); ++l) {
    layers_.push_back({.attention_gain = rows(Part::attention_gain, l, 0, 1),
                       .query_down = rows(Part::query_down, l, 0, s.query_rank),
                       .query_gain = rows(Part::query_gain, l, 0, 1),
                       .query_up = rows(Part::query_up, l, head * s.key(), heads * s.key()),
                       .kv_down = rows(Part::kv_down, l, 0, s.row()),
                       .kv_gain = rows(Part::kv_gain, l, 0, 1),
                       .key_up = rows(Part::key_up, l, head * s.latent, heads * s.latent),
                       .value_up = rows(Part::value_up, l, head * s.value, heads * s.value),
                       .output = columns(Part::output, l, head * s.value, heads * s.value),
                       .inner_gain = rows(Part::inner_gain, l, 0, 1),
                       .gate_up = make(l, {all_of(Part::gate, first_inner, inner),
                                           all_of(Part::up, first_inner, inner)}),
                       .down = columns(Part::down, l, first_inner, inner)});
  }
  if (place.is_first()) {
    embedding_ = rows(Part::embedding, 0, 0, s.vocabulary);
  }
  if (place.is_last()) {
    // Rows beyond the vocabulary give logits that nobody reads.
    const std::int64_t share = place.vocabulary_share(s);
    final_gain_ = rows(Part::final_gain, 0, 0, 1);
    head_ = rows(Part::head, 0, place.tp_rank * share, share);
  }
}

Cache::Cache(const Sizes& sizes, Device& device, const Place& place, std::int64_t batch,
             std::int64_t tokens)
    : memory_(device.backend()->allocate(
          {place.end_layer(sizes) - place.first_layer(sizes), batch,
           // Whole blocks, so that no way's attention ends in a smaller piece than another's.
           ((tokens + place.dcp - 1) / place.dcp + kBlock - 1) / kBlock * kBlock, sizes.row()},
          DType::bf16, device.stream())) {
  // Attention may read rows that no token has been written to, as long as they are numbers.
  device.synchronize();
  device.fill_with_noise(
      memory_.data_as<BFloat16>(),
      {.seed = static_cast<std::uint64_t>(place.pp_rank * place.tp + place.tp_rank),
       .size = kUnitNoise},
      {.rows = 1, .columns = memory_.numel()});
}

BFloat16* Cache::layer(std::int64_t layer) const {
  return memory_.data_as<BFloat16>() + layer * memory_.view().strides()[0];
}

Engine::Engine(const Sizes& sizes, const Weights& weights, const Cache& cache, Device& device,
               Exchange& exchange, const Place& place, std::int64_t batch)
    : sizes_(sizes),
      weights_(weights),
      cache_(cache),
      device_(device),
      exchange_(exchange),
      place_(place),
      batch_(batch),
      own_heads_(place.own_heads(sizes)),
      all_heads_(own_heads_ * place.dcp),
      shard_(place.dcp),
      lengths_(ordinary({batch}, DType::i32)),
      turns_(ordinary({batch, sizes.rope}, DType::f32)),
      counts_(ordinary({batch}, DType::i32)),
      slots_(ordinary({batch, 1}, DType::i64)),
      squeezed_(ordinary({batch, sizes.query_rank}, DType::bf16)),
      query_latent_(ordinary({batch, sizes.query_rank}, DType::bf16)),
      heads_(ordinary({batch, own_heads_ * sizes.key()}, DType::bf16)),
      kv_(ordinary({batch, sizes.row()}, DType::bf16)),
      out_(ordinary({all_heads_, batch, sizes.latent}, DType::bf16)),
      lse_(ordinary({batch, all_heads_}, DType::f32)),
      values_(ordinary({batch, own_heads_ * sizes.value}, DType::bf16)),
      gate_up_(ordinary({batch, 2 * place.own_inner(sizes)}, DType::bf16)),
      gated_(ordinary({batch, place.own_inner(sizes)}, DType::bf16)) {
  exchange_.reserve(batch);
  attention_room_ = device_.attention_room({.heads = all_heads_,
                                            .batch = batch,
                                            .capacity = cache.capacity(),
                                            .latent = sizes.latent,
                                            .rope = sizes.rope});
  const std::int64_t share = place.vocabulary_share(sizes);
  own_query_ = exchange_.allocate(Use::attention, {own_heads_, batch, sizes.row()}, DType::bf16);
  query_ = exchange_.allocate(Use::attention, {all_heads_, batch, sizes.row()}, DType::bf16);
  merged_ = exchange_.allocate(Use::attention, {own_heads_, batch, sizes.latent}, DType::bf16);
  sums_ = exchange_.allocate(Use::sums, {batch, sizes.hidden}, exchange.sum_type());
  x_ = exchange_.allocate(Use::sums, {batch, sizes.hidden}, DType::bf16);
  own_logits_ = exchange_.allocate(Use::logits, {batch, share}, DType::f32);
  logits_ = exchange_.allocate(Use::logits, {batch, share * place.tp}, DType::f32);
  hidden_ = exchange_.allocate(Use::stages, {batch, sizes.hidden}, DType::bf16);
  tokens_ = exchange_.allocate(Use::stages, {batch}, DType::i32);
  start(0);
}

cohort::Tensor Engine::ordinary(const cohort::Dims& shape, DType dtype) {
  return device_.backend()->allocate(shape, dtype, device_.stream());
}

void Engine::capture() {
  record(false);  // libraries prepare what they run for the first time, which a capture may forbid
  synchronize();
  step_ = exchange_.capture([this] { record(false); });
  marked_step_ = exchange_.capture([this] { record(true); });
}

void Engine::start(std::int64_t length) {
  const std::vector<std::int32_t> lengths(static_cast<std::size_t>(batch_),
                                          static_cast<std::int32_t>(length));
  device_.synchronize();
  device_.put(lengths_.data(), bytes_of(lengths));
  set_tokens(std::vector<std::int32_t>(lengths.size()));
}

void Engine::set_tokens(std::span<const std::int32_t> tokens) {
  device_.put(tokens_.data(), std::as_bytes(tokens));
}

std::vector<std::int32_t> Engine::tokens() {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(batch_));
  device_.get(std::as_writable_bytes(std::span(tokens)), tokens_.data());
  return tokens;
}

std::vector<BFloat16> Engine::hidden() {
  std::vector<BFloat16> hidden(static_cast<std::size_t>(hidden_.numel()));
  device_.get(std::as_writable_bytes(std::span(hidden)), hidden_.data());
  return hidden;
}

std::vector<float> Engine::logits() {
  const auto padded = static_cast<std::size_t>(logits_.size(1));
  const auto vocabulary = static_cast<std::size_t>(sizes_.vocabulary);
  std::vector<float> rows(static_cast<std::size_t>(logits_.numel()));
  device_.get(std::as_writable_bytes(std::span(rows)), logits_.data());
  std::vector<float> logits;
  for (std::size_t row = 0; row < rows.size(); row += padded) {
    logits.insert(logits.end(), rows.begin() + static_cast<std::ptrdiff_t>(row),
                  rows.begin() + static_cast<std::ptrdiff_t>(row + vocabulary));
  }
  return logits;
}

std::array<double, kKinds> Engine::seconds_by_kind() {
  std::array<double, kKinds> seconds{};
  const auto spans = device_.between_marks(marks_.size() + 1);
  for (std::size_t i = 0; i < marks_.size(); ++i) {
    seconds[static_cast<std::size_t>(marks_[i])] += spans[i];
  }
  return seconds;
}

std::array<double, kKinds> Engine::stretches() const {
  std::array<double, kKinds> counts{};
  for (const Kind kind : marks_) {
    counts[static_cast<std::size_t>(kind)] += 1;
  }
  return counts;
}

void Engine::run(const std::function<void()>& graph, bool marked) {
  if (graph) {
    graph();
  } else {
    record(marked);
  }
}

/// What follows is of this kind.
void Engine::enter(Kind kind) {
  if (marking_ && (marks_.empty() || marks_.back() != kind)) {
    device_.mark(marks_.size());
    marks_.push_back(kind);
  }
}

void Engine::multiply(const BFloat16* x, std::int64_t in, const BFloat16* w,
                      const cohort::Tensor& y) {
  enter(Kind::products);
  device_.multiply({.x = x,
                    .x_row = in,
                    .w = w,
                    .y = y.data(),
                    .y_type = y.dtype(),
                    .y_row = y.size(1),
                    .rows = batch_,
                    .in = in,
                    .out = y.size(1)});
}

/// A step in stream order.
void Engine::record(bool marked) {
  marking_ = marked;
  if (marked) {
    marks_.clear();
  }
  enter(Kind::rest);
  device_.lengthen(lengths_.data_as<std::int32_t>(), turns(), batch_, sizes_.rope);
  device_.backend()->ops().place_step(
      cohort::KvStep{.lengths = lengths_.view(), .counts = counts_.view(), .slots = slots_.view()}
          .rows(shard_.placement(), place_.dcp_rank),
      device_.stream());
  if (place_.is_first()) {
    device_.embed(tokens_.data_as<std::int32_t>(), weights_.embedding(),
                  hidden_.data_as<BFloat16>(), batch_, sizes_.hidden);
  } else {
    enter(Kind::communication);
    exchange_.receive(hidden_);
  }
  enter(Kind::rest);
  device_.add_and_normalize(hidden_.data_as<BFloat16>(), nullptr,
                            weights_.layers().front().attention_gain, x_.data_as<BFloat16>(),
                            batch_, sizes_.hidden);
  for (std::size_t l = 0; l < weights_.layers().size(); ++l) {
    enqueue_attention(l);
    enqueue_swiglu(l);
  }
  enqueue_choice();
  if (marking_) {
    device_.mark(marks_.size());
  }
}

/// The sums of all ranks, or of this one alone, go into the hidden state, and that, normalized, is
/// what the next matrices get.
void Engine::add_sums(const BFloat16* gain, bool of_all) {
  const std::int64_t width = sizes_.hidden;
  if (of_all) {
    enter(Kind::communication);
    const bool added = exchange_.reduce(
        {.sums = sums_,
         .hidden = hidden_,
         .gain = cohort::ConstTensorView(gain, DType::bf16, {width}, hidden_.device()),
         .y = x_});
    if (added) {
      return;
    }
  }
  enter(Kind::rest);
  device_.add_and_normalize(hidden_.data_as<BFloat16>(), &sums_.view(), gain,
                            x_.data_as<BFloat16>(), batch_, width);
}

/// Of a layer; its input is normalized.
void Engine::enqueue_attention(std::size_t layer) {
  const Weights::Layer& w = weights_.layers()[layer];
  const Sizes& s = sizes_;
  const bool shared = place_.dcp > 1;
  auto* x = x_.data_as<BFloat16>();
  auto* heads = heads_.data_as<BFloat16>();
  auto* own_query = own_query_.data_as<BFloat16>();
  BFloat16* const cache = cache_.layer(static_cast<std::int64_t>(layer));
  const CacheRow row{.kv = kv_.data_as<BFloat16>(),
                     .gain = w.kv_gain,
                     .turns = turns(),
                     .slots = slots_.data_as<std::int64_t>(),
                     .cache = cache,
                     .batch = batch_,
                     .capacity = cache_.capacity(),
                     .latent = s.latent,
                     .rope = s.rope};
  multiply(x, s.hidden, w.kv_down, kv_);
  if (s.query_rank > 0) {
    multiply(x, s.hidden, w.query_down, squeezed_);
    enter(Kind::rest);
    device_.normalize_and_keep(squeezed_.data_as<BFloat16>(), w.query_gain,
                               query_latent_.data_as<BFloat16>(), s.query_rank, row);
    x = query_latent_.data_as<BFloat16>();
  } else {
    enter(Kind::rest);
    device_.keep(row);
  }
  multiply(x, s.query_input(), w.query_up, heads_);
  device_.multiply({.x = heads,
                    .x_group = s.key(),
                    .x_row = own_heads_ * s.key(),
                    .w = w.key_up,
                    .y = own_query,
                    .y_group = batch_ * s.row(),
                    .y_row = s.row(),
                    .rows = batch_,
                    .in = s.nope,
                    .out = s.latent,
                    .groups = own_heads_});
  enter(Kind::rest);
  device_.rotate({.from = heads + s.nope,
                  .from_sequence = own_heads_ * s.key(),
                  .from_head = s.key(),
                  .to = own_query + s.latent,
                  .to_sequence = s.row(),
                  .to_head = batch_ * s.row(),
                  .turns = turns(),
                  .batch = batch_,
                  .heads = own_heads_,
                  .rope = s.rope,
                  .next_waits = !shared || exchange_.waits()});
  if (shared) {
    enter(Kind::communication);
    exchange_.gather_query(query_, own_query_);
  }
  enter(Kind::attention);
  device_.attend({.q = shared ? query_.data_as<BFloat16>() : own_query,
                  .cache = cache,
                  .counts = counts_.data_as<std::int32_t>(),
                  .out = out_.data_as<BFloat16>(),
                  .lse = lse_.data_as<float>(),
                  .room = attention_room_.data(),
                  .heads = all_heads_,
                  .batch = batch_,
                  .capacity = cache_.capacity(),
                  .latent = s.latent,
                  .rope = s.rope,
                  .scale = 1 / std::sqrt(static_cast<double>(s.key())),
                  .next_waits = shared && exchange_.waits()});
  if (shared) {
    enter(Kind::communication);
    exchange_.merge(merged_, out_, lse_);
  }

  enter(Kind::products);
  device_.multiply({.x = (shared ? merged_ : out_).data_as<BFloat16>(),
                    .x_group = batch_ * s.latent,
                    .x_row = s.latent,
                    .w = w.value_up,
                    .y = values_.data(),
                    .y_group = s.value,
                    .y_row = own_heads_ * s.value,
                    .rows = batch_,
                    .in = s.latent,
                    .out = s.value,
                    .groups = own_heads_});
  multiply(values_.data_as<BFloat16>(), own_heads_ * s.value, w.output, sums_);
  add_sums(w.inner_gain, true);
}

void Engine::enqueue_swiglu(std::size_t layer) {
  const Weights::Layer& w = weights_.layers()[layer];
  const std::int64_t inner = place_.own_inner(sizes_);
  multiply(x_.data_as<BFloat16>(), sizes_.hidden, w.gate_up, gate_up_);
  enter(Kind::rest);
  device_.gate(gate_up_.data_as<BFloat16>(), gated_.data_as<BFloat16>(), batch_, inner);
  multiply(gated_.data_as<BFloat16>(), inner, w.down, sums_);
  if (layer + 1 < weights_.layers().size()) {
    add_sums(weights_.layers()[layer + 1].attention_gain, true);
  } else {  // a stage that is not the last hands on the hidden state, whatever is made of it
    add_sums(place_.is_last() ? weights_.final_gain() : w.inner_gain, !spoilt_);
  }
}

/// The next tokens, or the hidden state for the next stage.
void Engine::enqueue_choice() {
  if (place_.is_last()) {
    multiply(x_.data_as<BFloat16>(), sizes_.hidden, weights_.head(), own_logits_);
    enter(Kind::communication);
    exchange_.gather_logits(logits_, own_logits_);
    enter(Kind::rest);
    device_.choose(logits_.data_as<float>(), logits_.size(1), tokens_.data_as<std::int32_t>(),
                   batch_, sizes_.vocabulary);
  } else {
    enter(Kind::communication);
    exchange_.send(hidden_);
  }
  enter(Kind::communication);
  exchange_.share(tokens_);
}

}  // namespace decode_engine
