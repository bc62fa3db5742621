# %% [markdown]
# # Steer a model six ways
#
# A steering vector changes what a model writes without training it anew. There are many ways to make one, and at a large
# enough strength each does *something*. So they are compared here at the same price: how far the steered model's next-token
# distributions are from the unsteered ones, in nats of KL divergence a sequence – beside a random direction, the same method
# fitted on sides in random order, and plain prompting.

# %% fast={"N_PAIRS": 24, "N_PROMPTS": 12, "TOKENS": 10, "TARGET": 2.0}
import pandas as pd

from steerkit import HookedModel, steering
from steerkit.steering import Where
from steerkit.steering.sweep import SweepConfig, sweep
from steerkit.steering.tasks import make_task

SITE = "blocks.2.hook_resid_post"
N_PAIRS, N_PROMPTS, TOKENS, TARGET = 128, 90, 40, 3.0

# %% [markdown]
# ## By hand, once
#
# Pairs are texts that differ in one thing: here the mood. The mean difference of the activations at one site is the oldest
# way.

# %%
model = HookedModel.from_pretrained("storyworld")
pairs = steering.load_pairs("storyworld:mood=happy", n=N_PAIRS)
print("+", pairs[0].positive)
print("-", pairs[0].negative)

# %%
vector = steering.fit(model, pairs, method="mean_diff", site=SITE)
for strength in (-8.0, 0.0, 8.0):
    with model.steer(vector, strength=strength):
        print(f"{strength:+.0f}: Anna is a {model.generate('Anna is a', max_new_tokens=40, do_sample=False)}")

# %% [markdown]
# A vector is a value: `2 * vector`, `vector + other`, `vector.save(path)`. `Where` says which tokens it acts on, the same
# ones with a key-value cache and without; after the `with` nothing is left in the model.
#
# ## Measured
#
# One text proves nothing. A `Bench` draws samples after prompts that do not say the mood yet, with the same random numbers
# for every change of the model, and StoryWorld's judge reads them exactly. Intervals are at 95 %, over prompts.

# %%
prompts = steering.story_prompts(model, "mood", "happy", N_PROMPTS // 3, seed=5)
bench = steering.Bench(
    model, prompts, steering.StoryAttribute("mood", "happy"), max_new_tokens=TOKENS, samples=2
)
for tokens, where in (
    ("prompt", Where.prompt_only()),
    ("generated", Where.generation_only()),
    ("all", Where()),
):
    found = bench.measure(vector, strength=8.0, where=where)
    print(f"{tokens:<10} happy {found.effect}, KL {found.kl} nats, grammatical {found.grammaticality}")
print(f"{'unsteered':<10} happy {bench.base.effect}")

# %% [markdown]
# In the run that is shown, steering the prompt alone does as much as steering every token, for a tenth of the nats: the mood
# is decided there, and what is added to generated tokens is spent on something else.
#
# ## Six ways at one price
#
# The sweep fits each method, looks on a third of the prompts for the strength at which it costs `TARGET` nats a sequence, and
# measures it on the other prompts:
#
# | method | how |
# |---|---|
# | `mean_diff` | mean of the positive sides less that of the negative ones |
# | `whitened` | the same in whitened coordinates |
# | `iti` | the attention heads that tell the sides apart best, each moved along its own difference |
# | `bipo` | one vector, trained by a preference loss in both directions |
# | `reft` | low-rank edits of the first and last tokens of the prompt, trained |
# | `weight_arithmetic` | two low-rank fine-tunes, one on each side, subtracted |
#
# Beside them: `unembedding` (does no more than boost the logits of the pairs' own words), `random`, the mean difference of
# shuffled sides, and the instruction “Write a happy story.”, which the model has learned to follow.

# %% fast={"METHODS": ["mean_diff", "random"]}
METHODS = ["mean_diff", "whitened", "iti", "bipo", "reft", "weight_arithmetic", "unembedding", "random"]

# %%
task = make_task(model, "storyworld:mood=happy", n_prompts=N_PROMPTS)
config = SweepConfig(
    methods=tuple(METHODS),
    sites=(SITE,),
    kl_targets=(TARGET,),
    at=TARGET,
    n_pairs=N_PAIRS,
    shuffled=("mean_diff",),
    few_shot=0,
    study=None,
    samples=1,
    max_new_tokens=TOKENS,
)
found = sweep(
    model,
    task.pairs,
    task.effect,
    task.validation,
    task.test,
    "runs/happy",
    config,
    prompting=task.instruction,
)
rows = [
    {
        "method": name,
        "happy": best["effect"],
        "95 %": "{:.2f} to {:.2f}".format(*best["effect_ci"]),
        "KL": best["kl"],
        "grammatical": best["grammaticality"],
    }
    for name, best in found.best.items()
]
print(pd.DataFrame(rows).sort_values("happy", ascending=False).round(3).to_string(index=False))
print(f"unsteered: {found.base['effect']:.3f}")

# %% [markdown]
# How to read it. First look at the nulls: what lies within their intervals has not been shown to work, and they also show
# that almost three nats of nothing in particular leave the base rate as it was. Then at the column KL: the strength was
# sought on other prompts, so prices differ a little; what costs more should do more. Only then compare the methods, and only
# where the intervals come apart: with so few prompts they are wide. Fine-tuning both ways and subtracting does what the
# instruction does; boosting the logits of the pairs' own words gets as far as most directions that were learned from
# activations, which is why that baseline belongs into the table.
#
# ## Where to go on
#
# `steerkit steer sweep --pairs storyworld:mood=happy --out runs/happy` does this at several prices and sites and writes a
# page; `--pairs FILE.jsonl` takes your own pairs, with any model. [Steering](../steering.md) has tables at full size.
