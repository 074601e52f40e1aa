# SPDX-License-Identifier: Apache-2.0
"""What NCCL expects of itself on Hopper cards of one host that reach each other over NVLink.

NCCL 2.28 chooses between its kernels by two cost models of its own; these are their facts:

- ordinary kernels: src/graph/tuning.cc of v2.28.7-1 and v2.29.2-1, which agree: ncclTunerConstantsDefaults (latencies,
  the LL protocol's bandwidth and the LL128 one's per channel), ncclTopoTuneModel (how they add up), and
  ncclTopoGetAlgoTime. Channels and their bandwidth: 18 links of 20.6 GB/s (src/graph/topo.h) carry 6
  channels of 60 GB/s (sm90SpeedArrayIntra in src/graph/search.cc), each of which is then halved.
- kernels on registered buffers: queryModel_lsa in src/sym_kernels.cc of v2.29.2-1, the same there as queryModel was
  in 2.28; the pick of a kernel weighs its time with its blocks (ncclSymkPickKernel).

They say what NCCL picks and roughly what it takes: between two cards the models are some 1 us too
slow for small payloads and 25 to 35 % too fast for large ones (bench/model --check).
Times in microseconds, bandwidths in bytes a microsecond.
"""

import math

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")

CHANNELS, CHANNEL_GB_S = 12, 30.0
LL_GB_S, LL128_CHANNEL_GB_S, TREE_CHANNEL_GB_S = 141.0, 36.7, 38.7
#                 LL   LL128  simple: the base, and of one step between cards
RING_LATENCY = ((6.6, 14.0, 8.4), (0.6, 1.9, 3.4))
TREE_LATENCY = ((6.8, 14.0, 8.4), (0.6, 1.25, 4.0))

GIB_S = (1 << 30) / 1e6
LL_BUS_FACTOR = 9
MOST_BLOCKS, MULTICAST_BLOCKS, BLOCK_PENALTY = 64, 16, 0.025


def ring_us(collective, ranks, total):
    """The fastest protocol of a ring."""
    steps = (2 if collective == "all_reduce" else 1) * (ranks - 1)
    bus = CHANNELS * CHANNEL_GB_S
    rates = (min(LL_GB_S, bus / 2), min(0.92 * bus, CHANNELS * LL128_CHANNEL_GB_S), bus)
    return min(base + steps * step + total / (1e3 * rate * ranks / steps)
               for base, step, rate in zip(*RING_LATENCY, rates))


def tree_us(ranks, total):
    """The fastest protocol of an all-reduce by trees, without the correction for middle sizes, which
    makes trees slower."""
    bus = min(0.92 * CHANNELS * CHANNEL_GB_S, CHANNELS * TREE_CHANNEL_GB_S)
    rates = (min(bus / 3.8, LL_GB_S), min(bus * 7 / 9, CHANNELS * LL128_CHANNEL_GB_S), bus)
    return min(base + 2 * (ranks - 1) * step + total / (1e3 * rate / 2)
               for base, step, rate in zip(*TREE_LATENCY, rates))


def plain_us(collective, ranks, total):
    """On buffers that are not registered; `total` as the benchmark's `bytes`."""
    ring = ring_us(collective, ranks, total)
    return min(ring, tree_us(ranks, total)) if collective == "all_reduce" else ring


def _softmin(value, ceiling, softness):
    return ceiling - softness * math.log1p((math.exp(ceiling / softness) - 1) * math.exp(-value / softness))


def _softplus(value):
    return value if value > 100 else math.log1p(math.exp(value))


def _kernel(bus_bytes, base, block_rate, multiplier, peak, most_blocks):
    """(us, blocks): the fewest blocks that come within 2.5 % of all."""
    def at(blocks):
        rate = _softmin(blocks * block_rate * multiplier, peak, block_rate)
        return base + _softplus(bus_bytes / rate - 1)

    whole = at(most_blocks)
    blocks = next(n for n in range(1, most_blocks + 1) if n == most_blocks or at(n) <= 1.025 * whole)
    return at(blocks), blocks


def registered_us(collective, ranks, total, multicast=False):
    """The time of the kernel that NCCL picks where both buffers are registered."""
    share = total if collective == "all_reduce" else total / ranks
    reduces_all = collective == "all_reduce"
    block_rate = (65 if reduces_all else 44) * GIB_S
    direct = (2 * total / ranks if reduces_all else share) * (ranks - 1)
    kernels = [_kernel(ranks * share * LL_BUS_FACTOR, 4.5, block_rate, 1, 320 * GIB_S, MOST_BLOCKS),
               _kernel(direct, 7.8, block_rate, 1, 320 * GIB_S, MOST_BLOCKS)]
    if multicast and ranks > 2:
        blocks = -(-MULTICAST_BLOCKS // ranks)
        if collective != "reduce_scatter":
            kernels.append(_kernel(ranks * share * LL_BUS_FACTOR, 4.5, block_rate, 1.1, 320 * GIB_S, MOST_BLOCKS))
        kernels.append(
            _kernel(total / ranks + total, 7.8, block_rate, ranks, 480 * GIB_S, blocks) if reduces_all else
            _kernel(direct, 7.8, block_rate, 0.55 * ranks, 320 * GIB_S, blocks))
    return min(kernels, key=lambda kernel: kernel[0] * (1 + BLOCK_PENALTY * kernel[1]))[0]


def best_us(collective, ranks, total, multicast=False):
    """The faster of both ways."""
    return min(plain_us(collective, ranks, total), registered_us(collective, ranks, total, multicast))
