// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/inbox.hpp"

#include "launch.cuh"

// Preparing and reading a rank's own inbox: runtime calls only.

namespace cohort::cuda {

using detail::check_cuda;

namespace {

std::byte* own_inbox(const PeerTable& table) { return table.peers[table.rank]; }

/// Copies from pageable memory return when the source has been read, so a local value may go.
void write_word(std::byte* to, std::uint64_t value, cudaStream_t stream) {
  check_cuda(cudaMemcpyAsync(to, &value, sizeof(value), cudaMemcpyHostToDevice, stream),
             "cudaMemcpyAsync");
}

}  // namespace

void initialize_inbox(const PeerTable& table, cudaStream_t stream, std::chrono::nanoseconds limit,
                      std::uint64_t after_epoch, HostWords* words) {
  std::byte* inbox = own_inbox(table);
  check_cuda(cudaMemsetAsync(inbox, 0, static_cast<std::size_t>(table.layout.bytes), stream),
             "cudaMemsetAsync");
  for (int i = 0; i < kEpochRecords; ++i) {
    const auto at = sizeof(InboxControl) + static_cast<std::size_t>(i) * sizeof(EpochRecord);
    write_word(inbox + at + offsetof(EpochRecord, epoch), after_epoch, stream);
  }
  write_word(inbox + offsetof(InboxControl, words), reinterpret_cast<std::uint64_t>(words), stream);
  set_inbox_limit(table, limit, stream);
}

void set_inbox_limit(const PeerTable& table, std::chrono::nanoseconds limit, cudaStream_t stream) {
  write_word(own_inbox(table) + offsetof(InboxControl, limit_ns),
             static_cast<std::uint64_t>(limit.count()), stream);
}

InboxError read_inbox_error(const PeerTable& table, cudaStream_t stream) {
  std::uint64_t word = 0;
  check_cuda(cudaMemcpyAsync(&word, own_inbox(table) + offsetof(InboxControl, error), sizeof(word),
                             cudaMemcpyDeviceToHost, stream),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return InboxError::decode(word);
}

void load_kernels(int n) {
  for (const int ranks :
       {n, 0}) {  // 0: those for any number of ranks, which take what is unaligned
    detail::load_gather(ranks);
    detail::load_reduce(ranks);
    detail::load_all_reduce(ranks);
    detail::load_norm(ranks);
    detail::load_merge(ranks);
  }
}

void load_local_kernels() {
  detail::load_copy();
  detail::load_local_merge();
  detail::load_local_norm();
  detail::load_support();
}

std::vector<KernelInfo> kernel_report(int n) {
  std::vector<KernelInfo> report;
  detail::report_copy(report);
  detail::report_local_merge(report);
  detail::report_local_norm(report);
  detail::report_gather(n, report);
  detail::report_reduce(n, report);
  detail::report_all_reduce(n, report);
  detail::report_norm(n, report);
  detail::report_merge(n, report);
  return report;
}

}  // namespace cohort::cuda
