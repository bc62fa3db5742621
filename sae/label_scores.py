"""What guided latents have learned of their labels, on held-out text.

    label_scores(model, sae, held_out, site, TokenLabels.of(held_out, sae.labels))
    # [{"label": "mood=happy", "latent": 0, "auroc": 0.93, "auroc_ci": …, "auroc_logit": 0.95, "prevalence": 0.25, …}]

`auroc` is that of the latent as it is used, TopK and all; `auroc_logit` that of its pre-activation, which is what was taught.
Intervals are jackknifed over documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sae.architectures.guided import GuidedSAE
from sae.thresholds import encoded
from steerkit.activations import Tokenization, collect
from steerkit.data import Documents, load_documents
from steerkit.labels import TokenLabels
from steerkit.stats import auroc, auroc_interval


@torch.no_grad()
def label_scores(
    model: Any,
    sae: GuidedSAE,
    documents: Documents | Sequence[str],
    site: str,
    labels: TokenLabels,
    *,
    tokenization: Tokenization | None = None,
    tokens: int = 200_000,
) -> list[dict[str, Any]]:
    """The AUROC of each guided latent for its label on at most `tokens` tokens; None where all known labels are the same.

    Labels between 0 and 1 count as positive above a half.
    """
    acts = collect(model, load_documents(documents), site, tokenization=tokenization, max_tokens=tokens)
    x, document = acts[site], acts.document.numpy()
    known = labels(document, acts.position.numpy())
    logits = torch.cat([sae.logits(part.to(sae.device, sae.dtype)).cpu() for part in x.split(65_536)]).numpy()
    guided = [part[:, : sae.n_labels].cpu() for part in encoded(sae, x)]
    latents = torch.cat(guided).numpy()
    found = []
    for latent, name in enumerate(sae.labels):
        label = known[name].numpy()
        here = label == label
        positive, groups = label[here] > 0.5, document[here]
        scored = 0 < positive.sum() < len(positive)
        values = latents[here, latent]
        found.append(
            {
                "label": name,
                "latent": latent,
                "auroc": float(auroc(values, positive)) if scored else None,
                "auroc_ci": auroc_interval(values, positive, groups).to_dict() if scored else None,
                "auroc_logit": float(auroc(logits[here, latent], positive)) if scored else None,
                "prevalence": float(positive.mean()) if len(positive) else None,
                "tokens": len(positive),
            }
        )
    return found
