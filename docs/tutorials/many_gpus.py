# %% [markdown]
# # Many GPUs
#
# `steerkit train sae`, `sweep sae` and `cache` share their work when `torchrun` (or `accelerate launch`) starts them several
# times: each process reads its own part of the text, and gradients are summed. What comes out is what *one* process would
# have made, up to rounding; this page trains both ways and compares. Here two processes run on a CPU, over gloo; on GPUs the
# same command gives each process a GPU of its own and uses NCCL.

# %% fast={"STEPS": 8}
import os
import subprocess
import sys
import time

from safetensors.torch import load_file

import sae
from steerkit import storyworld

STEPS, BATCH = 60, 512

# %% [markdown]
# ## One command, started twice
#
# From a shell it is
#
# ```text
# torchrun --standalone --nproc-per-node 2 -m steerkit.cli.main train sae --site blocks.1.hook_resid_post …
# ```
#
# The batch size is that of all processes together, so that the run is the same with any number of them: with more GPUs each
# has less to do.

# %%
with open("stories.txt", "w") as file:
    file.writelines(f"{story.text}\n" for story in storyworld.sample(400, seed=2))

command = (
    "-m steerkit.cli.main train sae --data stories.txt --site blocks.1.hook_resid_post --arch batch_topk --d-sae 128 --k 8 "
    f"--tokens {STEPS * BATCH} --set training.batch_size={BATCH} --set training.block_tokens=8192 "
    "--set training.held_out_tokens=2000 --seed 0 --quiet"
).split()
alone = [sys.executable]
together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
environment = {**os.environ, "OMP_NUM_THREADS": "1"}
for name, launcher in (("one", alone), ("two", together)):
    started = time.perf_counter()
    subprocess.run(
        [*launcher, *command, "--out", f"runs/{name}"], check=True, capture_output=True, env=environment
    )
    print(f"{name}: {time.perf_counter() - started:.0f} s, the start of the processes included")

# %% [markdown]
# Do not read a speed-up out of these seconds: two processes on this CPU share its cores, and most of such a short run is the
# start. What is shown is that they agree.

# %%
one, two = (load_file(f"runs/{name}/sae_weights.safetensors") for name in ("one", "two"))
print(f"{'tensor':<12}{'one and two':>14}{'one and another seed':>24}")
subprocess.run(
    [*alone, *command[:-3], "--seed", "1", "--quiet", "--out", "runs/other"],
    check=True,
    capture_output=True,
    env=environment,
)
other = load_file("runs/other/sae_weights.safetensors")
for name, tensor in one.items():
    print(
        f"{name:<12}{float((tensor - two[name]).abs().max()):>14.1e}{float((tensor - other[name]).abs().max()):>24.1e}"
    )

# %% [markdown]
# The right column says what “not the same” would look like: a run from another seed. Rounding alone makes the left one, as sums are
# taken in another order, and in float32 it grows from step to step, as in any training; computed in float64 (`--set
# training.dtype=float64`) the weights of one and two processes agree to 1e-8, which is tested.

# %%
for name in ("one", "two"):
    print(name, sae.SAERun.load(f"runs/{name}"))

# %% [markdown]
# ## What differs with GPUs
#
# - `torchrun --standalone --nproc-per-node gpu -m steerkit.cli.main train sae …` starts a process for each GPU of the
#   machine. On several machines torchrun's `--nnodes`, `--node-rank` and `--rdzv-endpoint` go before `-m`, and the run
#   directory must be on a disk that all of them see.
# - Every process holds the whole model: the work is shared, not the weights. A model too large for one GPU is spread with
#   `device_map="auto"` in one process instead.
# - Ctrl-C, or one process that dies, ends all of them; `--resume` with the same number of processes goes on from the last
#   checkpoint.
# - Only the first process writes and speaks.
