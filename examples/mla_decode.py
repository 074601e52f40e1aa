# SPDX-License-Identifier: Apache-2.0
"""mpirun -n 4 python3 examples/mla_decode.py --tp 4 [--dcp 2] [--device cuda]

A small transformer with latent attention (MLA) decodes: the ranks share heads and features by tensor parallelism
and each sequence's cache by decode context parallelism, and on cards a step is a CUDA graph. The exit status is 0
where every rank gets the tokens of the model on a rank alone. Needs the Python package, see src/python/README.md.
"""

import argparse
import os
import sys

import torch
from torch.nn.functional import rms_norm, silu

import cohort

VOCABULARY, HIDDEN, LAYERS, HEADS = 96, 64, 2, 16
LATENT, ROPE, VALUE, BATCH, PROMPT, NEW = 32, 8, 16, 3, 5, 24


def make_weights():
    """The whole model, the same on every rank."""
    generator = torch.Generator().manual_seed(7)

    def matrix(*shape):
        return torch.randn(shape, generator=generator) / shape[-2] ** 0.5

    layers = [{"kv": matrix(HIDDEN, LATENT + ROPE), "q_nope": matrix(HEADS, HIDDEN, LATENT),
               "q_pe": matrix(HEADS, HIDDEN, ROPE), "value": matrix(HEADS, LATENT, VALUE),
               "out": matrix(HEADS * VALUE, HIDDEN), "up": matrix(HIDDEN, 4 * HIDDEN),
               "down": matrix(4 * HIDDEN, HIDDEN)} for _ in range(LAYERS)]
    return {"embedding": matrix(VOCABULARY, HIDDEN) * 8, "head": matrix(HIDDEN, VOCABULARY)}, layers


# Along which dimension the ranks of a TP group share a weight; the others are on every rank.
SHARED = {"q_nope": 0, "q_pe": 0, "value": 0, "out": 0, "up": 1, "down": 0, "head": 1}


def rotate(x, position):
    """Rotary embedding of the last dimension, for tokens at `position`."""
    half = x.shape[-1] // 2
    angle = position * 100.0 ** (-torch.arange(half, device=x.device) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Model:
    """This rank's part. The cache keeps token t on rank t mod n of its DCP group."""

    def __init__(self, state):
        self.tp, self.dcp, device = state.tp, state.dcp, state.device

        def part(name, weight):
            if name in SHARED:
                weight = weight.chunk(self.tp.world_size, SHARED[name])[self.tp.rank_in_group]
            return weight.to(device).contiguous()

        whole, layers = make_weights()
        self.weights = {name: part(name, weight) for name, weight in whole.items()}
        self.layers = [{name: part(name, weight) for name, weight in layer.items()} for layer in layers]
        slots = -(-(PROMPT + NEW) // self.dcp.world_size) + 1
        self.spare = torch.tensor(slots - 1, device=device)  # takes the tokens of other ranks
        self.holds = torch.arange(slots, device=device) * self.dcp.world_size + self.dcp.rank_in_group
        self.holds[-1] = 2**30
        self.caches = torch.zeros(LAYERS, BATCH, slots, LATENT + ROPE, device=device)

    def attention(self, weights, cache, x, position):
        n = self.dcp.world_size
        kv = x @ weights["kv"]
        kv = torch.cat([kv[:, :LATENT], rotate(kv[:, LATENT:], position)], -1)
        mine = position % n == self.dcp.rank_in_group
        cache.index_copy_(1, torch.where(mine, position // n, self.spare)[None], kv[:, None])
        q_nope = torch.einsum("bd,hdl->bhl", x, weights["q_nope"])
        q_pe = rotate(torch.einsum("bd,hdr->bhr", x, weights["q_pe"]), position)

        q = self.dcp.gather_query(q_nope, q_pe)  # the heads of all ranks, of this rank's tokens
        scores = torch.einsum("bhc,bsc->bhs", q, cache) * (LATENT + ROPE) ** -0.5
        scores = scores.masked_fill(self.holds > position, float("-inf"))
        lse = scores.logsumexp(-1)
        out = torch.einsum("bhs,bsl->bhl", (scores - lse[..., None]).exp(), cache[..., :LATENT])
        merged = cohort.cp_lse_ag_out_rs(out, lse, self.dcp)  # this rank's heads, of all tokens

        value = torch.einsum("bhl,hlv->bhv", merged, weights["value"]).flatten(1)
        return self.tp.all_reduce(value @ weights["out"])

    def step(self, tokens, position):
        """The next token of each sequence, behind `tokens` at `position`."""
        x = self.weights["embedding"][tokens]
        for weights, cache in zip(self.layers, self.caches):
            x = x + self.attention(weights, cache, rms_norm(x, (HIDDEN,)), position)
            x = x + self.tp.all_reduce(silu(rms_norm(x, (HIDDEN,)) @ weights["up"]) @ weights["down"])
        return self.tp.all_gather(rms_norm(x, (HIDDEN,)) @ self.weights["head"], -1).argmax(-1)


def graph_of(state, model):
    """`model.step` as a CUDA graph: called with tokens and a position, it replays."""
    tokens = torch.zeros(BATCH, dtype=torch.long, device=state.device)
    position = torch.zeros((), dtype=torch.long, device=state.device)
    for _ in range(2):
        model.step(tokens, position)
    state.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), state.graph_capture():
        following = model.step(tokens, position)

    def step(new_tokens, new_position):
        tokens.copy_(new_tokens)
        position.copy_(new_position)
        state.replay(graph)
        return following.clone()

    return step


def decode(state):
    """Tokens [BATCH, NEW] behind a prompt."""
    model = Model(state)
    step = graph_of(state, model) if state.device.type == "cuda" else model.step
    prompt = torch.randint(VOCABULARY, (PROMPT, BATCH), generator=torch.Generator().manual_seed(3)).to(state.device)
    tokens, new = prompt[0], []
    for position in range(PROMPT + NEW - 1):
        following = step(tokens, torch.tensor(position, device=state.device))
        tokens = prompt[position + 1] if position + 1 < PROMPT else following
        new += [following] if position + 1 >= PROMPT else []
    state.synchronize()
    return torch.stack(new, 1).cpu()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, required=True, help="ranks")
    parser.add_argument("--dcp", type=int, help="ranks that share a cache; by default all")
    parser.add_argument("--device", help="cpu or cuda; by default a card where there is one")
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]))
    with torch.inference_mode():
        with cohort.ParallelState(args.tp, dcp=args.dcp or args.tp, device=args.device, symmetric=True) as state:
            tokens, rank = decode(state), state.world.rank_in_group
        with cohort.ParallelState(control="single", device=args.device) as alone:
            expected = decode(alone)
    same = torch.equal(tokens, expected)
    if rank == 0:
        print(f"{'the same tokens' if same else 'OTHER TOKENS'} on {args.tp} ranks as on one: {tokens[0].tolist()}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
