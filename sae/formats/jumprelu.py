"""Any SAE without a limit of latents a token as JumpReLU, exactly, in SAELens's layout: ReLU latents above thresholds.

gated:  1[π + b_gate > 0] · ReLU(e^r π + b_mag)  =  z · 1[z > e^r (-b_gate) + b_mag],   z = ReLU(e^r π + b_mag)
"""

from __future__ import annotations

from pathlib import Path

from sae.architectures import SAE
from sae.architectures.topk import TopK
from sae.formats.base import Format, as_jumprelu
from steerkit.errors import InputError


def write(sae: SAE, out: Path) -> None:
    if isinstance(sae.config, TopK) and sae.threshold is None and sae.config.own_thresholds is None:
        raise InputError(
            "A TopK SAE is not JumpReLU: the limit to k latents a token would be lost. Prune it first (`sae.prune`)."
        )
    as_jumprelu(sae).save(out)


FORMAT = Format("jumprelu", write=write)
