# SPDX-License-Identifier: Apache-2.0
"""What the parts of test_package.py share: the place of this rank, and what they count."""

import argparse
import faulthandler
import os

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--control", default=None)
parser.add_argument("--leave", default="in_order")
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

faulthandler.dump_traceback_later(float(os.environ.get("COHORT_TORCH_LIMIT", 240)) - 1, exit=True)
torch.set_num_threads(1)
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("RANK", 0)))
SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
CUDA = args.device != "cpu"
DEVICE = torch.device("cuda", RANK % torch.cuda.device_count()) if CUDA else torch.device("cpu")
if CUDA:
    torch.cuda.set_device(DEVICE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

counts = {"passed": 0, "failed": 0, "skipped": 0}


def check(name, ok):
    counts["passed" if bool(ok) else "failed"] += 1
    if not bool(ok):
        print(f"[rank {RANK}] FAIL {name}", flush=True)


def check_operator(op, arguments):
    """Torch's own checks of an operator's schema and fake implementation."""
    try:
        torch.library.opcheck(getattr(torch.ops.cohort, op).default, arguments, test_utils=("test_schema", "test_faketensor"))
        check(f"opcheck {op}", True)
    except Exception as error:  # noqa: BLE001
        check(f"opcheck {op}: {error}", False)


def refuses(name, kind, call, *parts):
    """`call` raises `kind` with all of `parts` in its text."""
    try:
        call()
    except kind as error:
        missing = [part for part in parts if part not in str(error)]
        check(f"{name}: {missing} not in: {error}", not missing)
    except BaseException as error:  # noqa: BLE001
        check(f"{name}: {type(error).__name__}: {error}", False)
    else:
        check(f"{name}: nothing was raised", False)


def skip(reason):
    """Counted on every rank, said once."""
    counts["skipped"] += 1
    if RANK == 0:
        print(f"skipped: {reason}", flush=True)
