"""Steering: changing what a language model does by editing its activations or weights.

pairs = steering.load_pairs("storyworld:mood=happy")
vector = steering.fit(model, pairs, method="mean_diff", site="blocks.2.hook_resid_post")
with model.steer(vector, strength=4.0):
    model.generate("Anna", max_new_tokens=40)
"""

from steerkit.steering.conditions import fit_condition
from steerkit.steering.detection import Detection, detect
from steerkit.steering.edits import (
    Add,
    AddMatrix,
    Clamp,
    Edit,
    LowRank,
    Project,
    Rotate,
    SingularRotate,
    WeightDelta,
)
from steerkit.steering.effects import Effect, Rated, Scored, StoryAttribute, Words, harmonic_mean
from steerkit.steering.evaluation import Bench, Measurement
from steerkit.steering.features import ablate_latents, add_latents, clamp_latents
from steerkit.steering.fitting import fit
from steerkit.steering.formats import export, from_repeng, from_steering_vectors, load_any
from steerkit.steering.merging import Merged, merge
from steerkit.steering.methods import METHODS, Method, fit_effects
from steerkit.steering.pair_making import generated_pairs, template_pairs
from steerkit.steering.pairs import Pair, Pairs, load_pairs
from steerkit.steering.previews import Preview, preview
from steerkit.steering.propensity import Propensity
from steerkit.steering.story_prompts import story_prompts
from steerkit.steering.vector import Condition, SteeringVector
from steerkit.steering.where import Constant, Custom, Decay, Tokens, Where, Window

__all__ = [
    "METHODS",
    "Add",
    "AddMatrix",
    "Bench",
    "Clamp",
    "Condition",
    "Constant",
    "Custom",
    "Decay",
    "Detection",
    "Edit",
    "Effect",
    "LowRank",
    "Measurement",
    "Merged",
    "Method",
    "Pair",
    "Pairs",
    "Preview",
    "Project",
    "Propensity",
    "Rated",
    "Rotate",
    "Scored",
    "SingularRotate",
    "SteeringVector",
    "StoryAttribute",
    "Tokens",
    "WeightDelta",
    "Where",
    "Window",
    "Words",
    "ablate_latents",
    "add_latents",
    "clamp_latents",
    "detect",
    "export",
    "fit",
    "fit_condition",
    "fit_effects",
    "from_repeng",
    "from_steering_vectors",
    "generated_pairs",
    "harmonic_mean",
    "load_any",
    "load_pairs",
    "merge",
    "preview",
    "story_prompts",
    "template_pairs",
]
