"""Optimisers that torch lacks, by the names that `FinetuneConfig.optimiser` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from steerkit.errors import InputError, did_you_mean


class UncorrectedAdamW(torch.optim.Optimizer):
    """AdamW without bias correction, the “BERTAdam” that BERT was first fine-tuned with.

        m ← β1 m + (1 - β1) g;   v ← β2 v + (1 - β2) g²;   θ ← (1 - η λ) θ - η m / (√v + ε)

    m and v begin at 0 and nothing makes up for it, so that step t is (1 - β1^t) / √(1 - β2^t) times AdamW's: for the usual β at
    most 6.6 times as long, at t = 12. For comparisons only: Mosbach et al. 2021, https://arxiv.org/abs/2006.04884; Zhang et al.
    2021, https://arxiv.org/abs/2006.05987. ε is 1e-6, as it was there.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` is called first, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(
                    state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-group["lr"]
                )
        return loss


OWN: dict[str, type[torch.optim.Optimizer]] = {"UncorrectedAdamW": UncorrectedAdamW}


def optimiser_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimiser of that name, here or in `torch.optim`. Raises InputError if there is none."""
    kind = OWN.get(name) or getattr(torch.optim, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        near = did_you_mean(name, [*OWN, *(known for known in dir(torch.optim) if known[0].isupper())])
        raise InputError(f"torch.optim has no optimiser {name!r}.{near}")
    return kind
