# SPDX-License-Identifier: Apache-2.0
"""torchrun --nproc-per-node N readme_example.py, or mpirun -n N python3 readme_example.py: runs the first
example of the package's README as it stands there, but for the number of ranks; with mpirun without
torch.distributed, as it says."""

import os
import pathlib
import re
import sys

import torch

ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
readme = (pathlib.Path(__file__).parents[2] / "src" / "python" / "README.md").read_text()
example = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
code, layouts = re.subn(r"tp=4, dcp=2", f"tp={ranks}, dcp={ranks}", example)
if "OMPI_COMM_WORLD_SIZE" in os.environ:
    code, meetings = re.subn(r"dist\.init_process_group.*", "", code)
else:
    meetings = code.count("dist.init_process_group")
if (layouts, meetings) != (1, 1):
    sys.exit(f"the README's example has changed:\n{example}")

batch, heads = 3, 2 * ranks
names = {
    "q_nope": torch.ones(batch, 2, 16), "q_pe": torch.zeros(batch, 2, 8),
    "attend_to_local_tokens": lambda q: (q[..., :16].clone(), torch.zeros(batch, heads)),
    "project": lambda merged: merged.flatten(1),
}
exec(compile(code, "README.md", "exec"), names)  # noqa: S102
if names["q"].shape != (batch, heads, 24) or not torch.equal(names["hidden"], torch.full((batch, 32), float(ranks))):
    sys.exit(f"wrong: {names['q'].shape}, {names['hidden']}")
