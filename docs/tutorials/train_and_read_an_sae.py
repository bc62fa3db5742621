# %% [markdown]
# # Train an SAE and read it
#
# A sparse autoencoder (SAE) takes a model's activations apart into a few active *latents* a token. Training one is easy;
# knowing what it is worth is not. This tutorial trains one on the built-in model, measures it beside the nulls that it has to
# beat, looks for latents that know something that we can check, and takes one of them out of the model.

# %% fast={"TOKENS": 12000, "SETTINGS": {"batch_size": 256, "block_tokens": 4096}, "HELD_OUT": 4000, "CONCEPT_TOKENS": 45000}
import torch

import sae
from sae.concepts import concept_scores
from sae.evaluation import evaluate_nulls
from sae.latents import collect_latents
from steerkit import HookedModel, steering, storyworld

SITE = "blocks.2.hook_resid_post"
TOKENS, HELD_OUT, CONCEPT_TOKENS = 200_000, 20_000, 60_000
SETTINGS = {}

# %% [markdown]
# ## A model, its text, a site
#
# StoryWorld is a small language of which every token is labelled, with a transformer that was trained on it. `SITE` is the
# residual stream after the third block, by TransformerLens's name. A model's sites are checked against its own hidden states
# when it is loaded.

# %%
model = HookedModel.from_pretrained("storyworld")
print(storyworld.sample(1, seed=3)[0].text)

# %% [markdown]
# ## Train
#
# 512 latents for 128 dimensions, of which a gated SAE is steered to have 16 active on each token. Everything goes into a run
# directory, which `steerkit eval sae`, `steerkit dashboard` and `sae_lens.SAE.load_from_disk` read.

# %%
arch = sae.Gated(d_sae=512, target_l0=16)
run = sae.train(
    model, "storyworld", SITE, arch, TOKENS, "runs/gated", held_out_tokens=HELD_OUT, quiet=True, **SETTINGS
)
run

# %% [markdown]
# ## What it has to beat
#
# `fvu` is the share of the variance that is not explained, `delta_ce` what the next-token loss rises by when the SAE's
# reconstruction replaces the activations. CE recovered compares that with *zeros* in their place. Look at its column: even an
# SAE with random weights recovers a good part of a loss that nothing could be worse than. FVU and ΔCE tell them apart.

# %%
evaluate_nulls(model, run.sae, run.held_out(), SITE, tokens=HELD_OUT)

# %% [markdown]
# ## What do the latents know?
#
# Every story has a mood and a tense, and more. For each value, the latent that tells it best is chosen on some stories and
# scored on others: can it tell stories by its strongest activation? Beside it stand the ceiling (`posterior`: the exact
# probability of the value given the text – some stories do not say) and what needs no trained dictionary: a random SAE, the
# tokens alone, the best single coordinate of the activations.

# %%
scores = concept_scores(
    model, run.sae, SITE, per="story", tokens=CONCEPT_TOKENS, attributes=["mood", "tense", "weather"]
)
scores

# %% [markdown]
# Read along the rows. Every value has a latent that tells it perfectly – and the tokens alone get to 0.99, for told over a
# whole story a StoryWorld attribute is in its words. A random SAE is far above 0.5, because many random directions pick up
# words. An SAE is worth what it has *above* these columns, which by this measure is little: a perfect score in one column is
# not yet a finding.
#
# ## Look at one latent

# %%
latent = scores["mood", "angry"].latent
stats = collect_latents(model, run.sae, run.documents(), SITE, tokens=CONCEPT_TOKENS, quiet=True)
print(f"latent {latent}: active on {stats.density[latent]:.1%} of the tokens. Its strongest contexts:")
for example in stats.examples(latent)[:8]:
    row = stats.row(example.row)
    before = model.tokenizer.decode(row[max(0, example.position - 10) : example.position])
    print(
        f"{example.activation:6.2f}  … {before.strip()} [{model.tokenizer.decode(row[example.position]).strip()}]"
    )

# %% [markdown]
# ## Does the model use it?
#
# A latent that goes with anger need not matter to the model. So it is written to: clamped at the strongest activation that
# was seen, and at zero, which takes it out. The error that the SAE makes stays where it is. The control is another latent,
# drawn from the twenty that are most nearly as often active, with the same two changes. Prompts are beginnings that do not
# say the mood yet.

# %% fast={"N": 16}
N = 40
near = (torch.tensor(stats.density) - stats.density[latent]).abs().argsort()
control = int(near[torch.randint(1, 21, (), generator=torch.Generator().manual_seed(0))])
print(f"the control: latent {control}, active on {stats.density[control]:.1%} of the tokens")

# %%
prompts = steering.story_prompts(model, "mood", "angry", N)
bench = steering.Bench(model, prompts, steering.StoryAttribute("mood", "angry"), max_new_tokens=40, samples=2)
print(f"unsteered: angry {bench.base.effect}")
for name, i in (("the latent", latent), ("the control", control)):
    strongest = stats.examples(i)[0].activation
    for value in (strongest, 0.0):
        found = bench.measure(steering.clamp_latents(run.sae, [i], value, SITE))
        print(f"{name} at {value:.2f}: angry {found.effect}, KL {found.kl} nats a sequence")

# %% [markdown]
# In the run that is shown the latent goes with anger without exception, and taking it out changes nothing: the model has the
# mood from elsewhere as well. Writing to it moves the texts by half a nat and makes a tenth more of them angry, with an
# interval that still overlaps the unsteered one. So it is *a* latent about anger; it is not how this model decides to be
# angry. That could not be seen from its contexts.
#
# ## Where to go on
#
# `steerkit dashboard runs/gated` draws a page for every latent; `steerkit eval sae runs/gated --judge` scores the whole SAE
# by labels; `steerkit sweep sae` trains many in one pass over the activations. What the scores mean is in [Judging
# SAEs](../judging.md).
