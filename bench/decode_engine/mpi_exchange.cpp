// SPDX-License-Identifier: Apache-2.0
#include <mpi.h>

#include <utility>

#include "cohort/dcp/partials.hpp"
#include "cohort/mpi/mpi_control_plane.hpp"
#include "exchange.hpp"

namespace decode_engine {

namespace {

using cohort::DType;
using cohort::TensorView;
using cohort::detail::mpi_check;

class Communicator {
 public:
  /// Collective over all ranks.
  Communicator(int colour, int key) {
    mpi_check(MPI_Comm_split(MPI_COMM_WORLD, colour, key, &comm_), "MPI_Comm_split");
  }
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  ~Communicator() { static_cast<void>(MPI_Comm_free(&comm_)); }
  [[nodiscard]] MPI_Comm get() const noexcept { return comm_; }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
};

int count_of(const TensorView& x) { return static_cast<int>(x.numel()); }
int bytes_of(const TensorView& x) { return static_cast<int>(x.bytes()); }

class MpiExchange final : public Exchange {
 public:
  MpiExchange(Device& device, const Sizes& sizes, const Place& place)
      : device_(device),
        sizes_(sizes),
        place_(place),
        tp_(place.pp_rank, place.tp_rank),
        dcp_(place.pp_rank * place.tp + place.tp_rank / place.dcp, place.dcp_rank),
        pp_(place.tp_rank, place.pp_rank) {}

  void reserve(std::int64_t batch) override {
    const std::int64_t own = place_.own_heads(sizes_);
    lses_ = ordinary({place_.dcp, batch, own * place_.dcp}, DType::f32);
    corrected_ = ordinary({own * place_.dcp, batch, sizes_.latent}, DType::f32);
    sums_ = ordinary({own, batch, sizes_.latent}, DType::f32);
    shares_ = ordinary({place_.tp, batch, place_.vocabulary_share(sizes_)}, DType::f32);
  }
  cohort::Tensor allocate(Use, const cohort::Dims& shape, DType dtype) override {
    return ordinary(shape, dtype);
  }

  void gather_query(const TensorView& q, const TensorView& own) override {
    call("MPI_Allgather", [=, comm = dcp_.get()] {
      return MPI_Allgather(own.data(), bytes_of(own), MPI_BYTE, q.data(), bytes_of(own), MPI_BYTE,
                           comm);
    });
  }
  /// MPI has no sums in 16 bits, so the correction is made in fp32.
  void merge(const TensorView& merged, const TensorView& out, const TensorView& lse) override {
    auto& ops = device_.backend()->ops();
    call("MPI_Allgather", [lse, lses = lses_.view(), comm = dcp_.get()] {
      return MPI_Allgather(lse.data(), count_of(lse), MPI_FLOAT, lses.data(), count_of(lse),
                           MPI_FLOAT, comm);
    });
    ops.correct_partial({.out = cohort::ConstTensorView(out.transpose(0, 1)).unsqueeze(),
                         .lse = cohort::ConstTensorView(lse).unsqueeze(),
                         .base = cohort::LseBase::e},
                        lses_, place_.dcp_rank, corrected_.view().transpose(0, 1),
                        device_.stream());
    call("MPI_Reduce_scatter_block",
         [from = corrected_.view(), to = sums_.view(), comm = dcp_.get()] {
           return MPI_Reduce_scatter_block(from.data(), to.data(), count_of(to), MPI_FLOAT, MPI_SUM,
                                           comm);
         });
    ops.copy(sums_, merged, device_.stream());
  }
  /// As above.
  DType sum_type() const override { return DType::f32; }
  bool reduce(const Addition& addition) override {
    call("MPI_Allreduce", [sums = addition.sums, comm = tp_.get()] {
      return MPI_Allreduce(MPI_IN_PLACE, sums.data(), count_of(sums), MPI_FLOAT, MPI_SUM, comm);
    });
    return false;
  }
  void gather_logits(const TensorView& logits, const TensorView& own) override {
    call("MPI_Allgather", [own, shares = shares_.view(), comm = tp_.get()] {
      return MPI_Allgather(own.data(), count_of(own), MPI_FLOAT, shares.data(), count_of(own),
                           MPI_FLOAT, comm);
    });
    device_.backend()->ops().copy(shares_.view().transpose(0, 1),
                                  logits.reshape({logits.size(0), place_.tp, own.size(1)}),
                                  device_.stream());
  }
  void receive(const TensorView& hidden) override {
    call("MPI_Recv", [hidden, from = place_.pp_rank - 1, comm = pp_.get()] {
      return MPI_Recv(hidden.data(), bytes_of(hidden), MPI_BYTE, from, 0, comm, MPI_STATUS_IGNORE);
    });
  }
  void send(const TensorView& hidden) override {
    call("MPI_Send", [hidden, to = place_.pp_rank + 1, comm = pp_.get()] {
      return MPI_Send(hidden.data(), bytes_of(hidden), MPI_BYTE, to, 0, comm);
    });
  }
  void share(const TensorView& tokens) override {
    call("MPI_Bcast", [tokens, root = place_.pp - 1, comm = pp_.get()] {
      return MPI_Bcast(tokens.data(), bytes_of(tokens), MPI_BYTE, root, comm);
    });
  }

  std::function<void()> capture(const std::function<void()>& record) override {
    return captured_on(device_.stream(), record);
  }
  void synchronize() override { device_.synchronize(); }
  void close() override {}

 private:
  [[nodiscard]] cohort::Tensor ordinary(const cohort::Dims& shape, DType dtype) {
    return device_.backend()->allocate(shape, dtype, device_.stream());
  }
  template <class Call>
  void call(const char* name, Call made) {
    device_.stream().submit([name, made] { mpi_check(made(), name); });
  }

  Device& device_;
  Sizes sizes_;
  Place place_;
  Communicator tp_, dcp_, pp_;
  cohort::Tensor lses_, corrected_, sums_, shares_;
};

}  // namespace

std::unique_ptr<Exchange> make_mpi_exchange(Device& device, const Sizes& sizes,
                                            const Place& place) {
  return std::make_unique<MpiExchange>(device, sizes, place);
}

}  // namespace decode_engine
