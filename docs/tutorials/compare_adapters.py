# %% [markdown]
# # Compare adapters
#
# LoRA, IA3, rotations, full fine-tuning: each is a claim about how a model wants to be changed. Comparing them fairly needs
# the same data, a budget of parameters, and a learning rate chosen for *each* – the usual table with one learning rate for
# all compares learning rates. This tutorial does that on the built-in model and then looks into what was learned.

# %% fast={"N_TRAIN": 32, "N_TEST": 10, "METHODS": ["lora", "ia3"], "SEEDS": 1, "GRID": 1}
import pandas as pd
import torch

from steerkit import HookedModel, adapters
from steerkit.adapters.bench import BenchConfig, bench
from steerkit.adapters.inside import Change, base_energy, spectrum
from steerkit.adapters.tasks import storyworld_task
from steerkit.adapters.training import train
from steerkit.finetuning import FinetuneConfig

METHODS = ["lora", "svft", "oft", "ia3", "loreft", "full"]
N_TRAIN, N_TEST, SEEDS, GRID = 300, 60, 2, 3

# %% [markdown]
# ## The task
#
# StoryWorld's characters tell the truth unless a sentence says that they lie. The task is to make them lie without it. The
# score is exact: of the probability of all words that would fit a claim, the share that goes to false ones. It is taken in
# stories like those of the training (`test`), after a sentence that says the character is honest, and about a kind of fact
# that the training never contradicts (`held-out kind`).

# %%
model = HookedModel.from_pretrained("storyworld")
task = storyworld_task(model, "liars", n_train=N_TRAIN, n_test=N_TEST)
{name: f"{score:.2g}" for name, score in task.scores(model)["scores"].items()}

# %% [markdown]
# That is the base model, the null of this study: it hardly ever lies.
#
# ## One adapter by hand
#
# `adapters.get` puts any of some fifty methods into a model. Before training the model is what it was; removed, it is so
# again, bit for bit.

# %%
before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
tuned = adapters.get(model, "svft", modules="attention", rank=4)
print(f"{tuned.n_trainable:,} parameters")
train(tuned, task.objective, FinetuneConfig(lr=1e-2))
print("trained:   ", task.scores(tuned)["scores"]["test"])
with tuned.scaled(0.5):
    print("half of it:", task.scores(tuned)["scores"]["test"])
model = tuned.remove()
print(
    "the base again:",
    all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items()),
)

# %% [markdown]
# ## Compared
#
# The bench sets each method's size so that it trains as many parameters as LoRA of rank 8, where it has a size; tries
# learning rates by the validation loss of a seed that is not reported; and reports the others. `forgetting` is how much the
# loss on unrelated text rises, in nats a token.

# %%
config = BenchConfig(methods=tuple(METHODS), seeds=SEEDS, grid=GRID, extend=0)
found = bench(model, task, config, out="runs/bench")
rows = [
    {
        "method": row["method"],
        "parameters": row["trainable_params"],
        "learning rate": f"{row['lr']:.2g}",
        "lies": row["metric_mean"],
        "SD": row["metric_sd"],
        **{name: score["mean"] for name, score in row["ood"].items()},
        "forgetting": row["forgetting"],
    }
    for row in found.rows
]
print(pd.DataFrame(rows).sort_values("lies", ascending=False).round(3).to_string(index=False))

# %% [markdown]
# With two seeds and a short run, small differences mean nothing ([Adapters](../adapters.md) has three seeds and intervals).
# Three things in the run that is shown do not need small differences. A standard deviation of 0.5 over two seeds says that
# LoReFT learned the task once and once did not: its mean is of no use, and one seed would have told either story. IA3 stays
# behind at this length of training with thirty times fewer parameters. And among those with nearly the same score a rotation
# (`oft`) forgets least, which the three seeds there agree with.
#
# ## Inside
#
# What does a change look like? `changes()` gives ΔW of every weight. Is it of low rank even if nothing forced it to be, and
# does it lie in the directions that the weight uses most? A matrix of normal random numbers is the null for the first, random
# directions (`null`) for the second.

# %%
tuned = adapters.get(model, "full")
train(tuned, task.objective, FinetuneConfig(lr=6e-4))
generator = torch.Generator().manual_seed(0)
rows = []
for name, change in list(tuned.changes().items())[7:14]:
    noise = Change(change.base, torch.randn(change.delta.shape, generator=generator))
    energy = base_energy(change, k=10).top.both
    rows.append(
        {
            "weight": name.removeprefix("model."),
            "rank": min(change.delta.shape),
            "90 % in": spectrum(change).rank_at(0.9),
            "of noise": spectrum(noise).rank_at(0.9),
            "in top 10": energy.value,
            "null": energy.null,
        }
    )
print(pd.DataFrame(rows).round(3).to_string(index=False))
model = tuned.remove()

# %% [markdown]
# ## Where to go on
#
# `steerkit adapt bench --methods all --out runs/bench` writes the page with Pareto fronts; `--data FILE.csv --model ID` is
# for your own task and model, and `steerkit adapt inspect RUN` draws what is inside one adapter. See
# [Adapters](../adapters.md).
