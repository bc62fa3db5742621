# %% [markdown]
# # Your own model, on a GPU
#
# Everything in the other tutorials takes any Hugging Face model: an id, a directory, or a model object that you have loaded.
# Here a small Llama with random weights stands for yours, so that the page can be made anywhere; on a GPU the same lines run
# on it without a change. What is different there is said where it is.

# %% fast={"TOKENS": 6000}
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sae
from steerkit import HookedModel, storyworld

TOKENS = 100_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## A model directory, and your text
#
# Replace this cell by your own: `MODEL = "your-org/your-model"`. A model needs a tokenizer beside it. Text is a `.txt` file
# with a document a line, a table with a `text` column, or the id of a data set.

# %%
MODEL, DATA = "my-model", "my-text.txt"
tokenizer = HookedModel.from_pretrained("storyworld").tokenizer
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
LlamaForCausalLM(config).save_pretrained(MODEL)
tokenizer.save_pretrained(MODEL)
with open(DATA, "w") as file:
    file.writelines(f"{story.text}\n" for story in storyworld.sample(1200, seed=9))

# %% [markdown]
# ## Load it, and look at its sites
#
# Without `device` the model goes to the GPU if there is one. `dtype="bfloat16"` halves the memory of a large one;
# `device_map="auto"` spreads one over several GPUs. Sites are found by structure and then checked: the residual stream
# against the model's own hidden states, the rest by algebra. A site that fails is refused when you use it, with the reason;
# `steerkit inspect MODEL` prints the same.

# %%
model = HookedModel.from_pretrained(MODEL, device=DEVICE)
for name, site in model.sites.items():
    if name.startswith("blocks.1."):
        print(f"{name:<32}{site.width:>5}  {site.path if site.verified else site.reason}")

# %% [markdown]
# ## Before a long run: what will it take?
#
# `--dry-run` prints shapes, parameters, memory and time, and trains nothing. A cell of a notebook would begin the line with
# `!`.

# %%
import subprocess
import sys


def steerkit(line: str) -> None:
    """Run `steerkit …` in a process of its own and print what it says."""
    command = [sys.executable, "-m", "steerkit.cli.main", *line.split()]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


steerkit(
    f"train sae --model {MODEL} --data {DATA} --site blocks.1.hook_resid_post --arch topk --d-sae 512 --tokens {TOKENS} --dry-run"
)

# %% [markdown]
# ## Train
#
# On a GPU products with sparse latents are done by Triton kernels (they come with torch for CUDA), and the steps can be
# computed in bfloat16 with `training.dtype`. `micro_batch="auto"` fits the batch to the memory that is left. If the model is
# large and you want to train several SAEs, `sae.train_many` (`steerkit sweep sae`) runs it once for all; `steerkit cache`
# keeps the activations on disk.

# %%
run = sae.train(
    model,
    DATA,
    "blocks.1.hook_resid_post",
    sae.TopK(d_sae=512, k=16),
    TOKENS,
    "runs/mine",
    device=DEVICE,
    batch_size=512,
    block_tokens=16384,
    held_out_tokens=4000,
    micro_batch="auto" if DEVICE == "cuda" else None,
    quiet=True,
)
print(run)
speed, memory = run.summary["tokens_per_second"]["total"], run.summary["peak_memory_mb"]
print(f"{speed:,.0f} tokens a second, {memory:,.0f} MB at the peak")

# %% [markdown]
# The weights are in `runs/mine/sae_weights.safetensors`, in SAELens's layout, whichever machine they were made on: load them
# on any.
#
# This model has random weights: it knows nothing, and still its activations have structure (they depend on the tokens), which
# an SAE finds. That is why the SAE of a randomly initialised model is a null worth having for yours: `steerkit eval sae RUN
# --nulls --random-model`.
#
# ## What else differs on a GPU
#
# - A resumed run ends with the same weights bit by bit on a CPU; on a GPU, whose sums are not always in one order, nearly so.
# - `python scripts/gpu_check.py` checks the kernels and gradients on *your* GPU and prints how fast a step is; it takes some
#   ten minutes.
# - `steerkit doctor` says if torch was installed without CUDA although there is a GPU.
# - The first step compiles kernels and takes seconds.
