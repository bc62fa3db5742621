# %% [markdown]
# # What did fine-tuning change?
#
# Two models, before and after. Which layers are different, and do those differences matter? Similarity alone cannot say: a
# layer may change much and do little. So three things stand side by side here, layer by layer: how far the representation
# moved, what a probe still finds in it, and what happens when the base's weights are put back.

# %% fast={"N_TRAIN": 32, "N_TEST": 10, "SIZE": {"texts": 20, "per_text": 4, "permutations": 4, "n_folds": 2, "score_texts": 6}}
import pandas as pd

import probes
from probes.comparison import ComparisonConfig
from steerkit import HookedModel, adapters
from steerkit.adapters.tasks import storyworld_task
from steerkit.adapters.training import train
from steerkit.finetuning import FinetuneConfig

N_TRAIN, N_TEST = 400, 60
SIZE = {"texts": 200, "permutations": 40, "score_texts": 40}

# %% [markdown]
# ## A model that learns to lie
#
# In StoryWorld characters tell the truth, unless a sentence says that they lie. LoRA is trained on stories in which they lie
# without that sentence. The score is the share of probability that false words get in a claim.

# %%
base = HookedModel.from_pretrained("storyworld")
tuned = adapters.get(HookedModel.from_pretrained("storyworld"), "lora", rank=8)
task = storyworld_task(base, "liars", n_train=N_TRAIN, n_test=N_TEST)
train(tuned, task.objective, FinetuneConfig(lr=5e-3))
for name, model in (("base", base), ("tuned", tuned)):
    print(name, {where: round(score, 4) for where, score in task.scores(model)["scores"].items()})

# %% [markdown]
# ## Compared
#
# Both read the same tokens of the same texts. `scores` are what is measured while layers are rolled back, besides the loss.

# %%
config = ComparisonConfig(**SIZE)
found = probes.compare(
    base,
    tuned,
    "storyworld",
    labels=["honesty", "mood"],
    scores={"lies": lambda m: task.measure(m)["test"]},
    config=config,
)
print(found)

# %% [markdown]
# These sentences say only what the intervals support. The figures behind them:

# %%
honesty = found.probes["honesty"]
rolled_back = {score.at: score.change.difference for score in found.rollback["lies"].of_kind("single")}
rows = [
    {
        "layer": layer.layer,
        "CKA": layer.cka.interval,
        "null": round(layer.cka.null.expected, 3),
        "moved": layer.drift.relative_change,
        "honesty, base": honesty.base[layer.site].accuracy,
        "honesty, tuned": honesty.tuned[layer.site].accuracy,
        "lies, rolled back": rolled_back.get(layer.layer, "–"),
    }
    for layer in found.layers
]
print(pd.DataFrame(rows).to_string(index=False))
print(f"honesty: most frequent class {honesty.majority}, exact posterior {honesty.ceiling}")

# %% [markdown]
# - **CKA** is 1 for a representation that is the same up to rotation and scale. The null pairs texts at random. The models
#   are still much alike everywhere, although behaviour has turned round: most of what a layer represents has nothing to do
#   with lying.
# - **Moved** is how long the change of the activations is relative to the activations. A later layer has the changes of all
#   earlier ones in it, so this does not say which layer's *weights* caused it.
# - **Rolled back** does: the base's weights in that one block, all others tuned; intervals are paired, by example. No block
#   alone carries the lies: the most that one takes away is a tenth, while all together take away everything. Whoever looks
#   for “the layer that lies” finds block 1, and should look at the size of that number.
# - The **probe** reads whether the character of the story lies, at tokens drawn at random. It is at the frequency of the
#   commoner class before and after: no line through the residual stream tells it there, although the text does (the exact
#   posterior). So this column can show no change, whatever the training did. Without the baseline it would have looked like
#   “70 % accuracy in every layer”.
#
# ## How much of the change is needed?
#
# An adapter can be scaled. Half of ΔW need not be half of the effect.

# %%
for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
    with tuned.scaled(alpha):
        print(f"{alpha:.2f}: {task.scores(tuned)['scores']['test']:.3f}")

# %% [markdown]
# ## Where to go on
#
# `steerkit compare BASE TUNED --out DIR` draws all of it; BASE and TUNED are ids, directories, adapter runs, or a steering
# vector. A finding from one fine-tune of one model is an anecdote: train several seeds and look at the spread
# (`probes.instability`). See [Comparing two models](../comparing.md).
