"""Judging SAEs by labels: what their latents tell, and what it takes to beat them.

    judgement = judge(model, run.sae, "blocks.2.hook_resid_post")       # all of it, on StoryWorld, with all baselines
    judgement = judge(model, run.sae, site, data=LabelledTexts.read("reviews.csv"))

Each measure is a file with its definition, and takes any `Dictionary` on any `Examples`:

    sparse_probing     balanced accuracy of the best 1, 2 and 5 candidates
    monosemanticity    FMS@p
    absorption         latents that are silent where a more specific one speaks
    scr, tpp           what ablating a few candidates does to probes
"""

from sae.judging.absorption import Absorption, absorption
from sae.judging.dictionaries import Dictionary
from sae.judging.examples import Examples
from sae.judging.judgement import Judgement, LabelledTexts, Row, judge
from sae.judging.monosemanticity import Monosemanticity, monosemanticity
from sae.judging.scr import SpuriousRemoval, scr
from sae.judging.sparse_probing import SparseProbing, sparse_probing
from sae.judging.tpp import TargetedPerturbation, tpp

__all__ = [
    "Absorption",
    "Dictionary",
    "Examples",
    "Judgement",
    "LabelledTexts",
    "Monosemanticity",
    "Row",
    "SparseProbing",
    "SpuriousRemoval",
    "TargetedPerturbation",
    "absorption",
    "judge",
    "monosemanticity",
    "scr",
    "sparse_probing",
    "tpp",
]
