"""A perceptron with one hidden layer: what is there, whether or not a line finds it.

    logits = W₂ relu(W₁ x + b₁) + b₂           x standardised on the rows to train on

Trained by AdamW (Loshchilov & Hutter 2019) on minibatches, all problems and sites at once, for a fixed
number of steps. An expressive probe learns labels that have nothing to do with the model (Hewitt & Liang
2019): read it beside its control task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from probes.methods.base import Fit, Method, Problems, Rows


@dataclass(frozen=True)
class MlpFit(Fit):
    """logits = relu((x − center) · hidden_weight + hidden_bias) · weight + bias."""

    hidden_weight: Float[Tensor, "S m h d"]
    hidden_bias: Float[Tensor, "S m h"]
    weight: Float[Tensor, "S m classes h"]
    bias: Float[Tensor, "S m classes"]
    center: Float[Tensor, "S d"]

    def logits(self, x: Float[Tensor, "S r d"]) -> Float[Tensor, "S r m classes"]:
        hidden = (x.float() - self.center[:, None]) @ self.hidden_weight.flatten(1, 2).mT
        hidden = (hidden.unflatten(-1, self.hidden_bias.shape[1:]) + self.hidden_bias[:, None]).relu()
        return torch.einsum("srmh,smkh->srmk", hidden, self.weight) + self.bias[:, None]

    def probabilities(self, x: Float[Tensor, "S r d"]) -> Float[Tensor, "S r m classes"]:
        return self.logits(x).softmax(-1)


@dataclass(frozen=True)
class Mlp(Method):
    """One hidden layer of rectified units."""

    hidden: int = 64
    steps: int = 500
    batch_size: int = 512
    lr: float = 3e-3
    weight_decay: float = 0.1
    balanced: bool = False

    name: ClassVar[str] = "mlp"

    def fit(self, x: Float[Tensor, "S n d"], problems: Problems) -> MlpFit:
        rows = Rows.of(x, problems.train, standardize=True, dtype=torch.float32)
        S, n, d = x.shape
        m, h, k = problems.size, self.hidden, problems.n_classes
        generator = torch.Generator().manual_seed(problems.seed)

        def drawn(*shape: int) -> Tensor:
            # The same for every site and problem, so that they differ in what they see alone.
            values = torch.randn(*shape, generator=generator) * (2 / shape[-1]) ** 0.5
            return values.to(x.device).expand(S, m, *shape).clone().requires_grad_()

        parameters = [drawn(h, d), x.new_zeros(S, m, h, dtype=torch.float32).requires_grad_()]
        parameters += [drawn(k, h), x.new_zeros(S, m, k, dtype=torch.float32).requires_grad_()]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        weights = (problems.weights(self.balanced) * problems.train.sum(0)).float()
        with torch.enable_grad():
            for _ in range(self.steps):
                chosen = torch.randint(n, (self.batch_size,), generator=generator).to(x.device)
                logits = _as_seen(rows, *parameters).logits(rows.x[:, chosen])
                picked = logits.log_softmax(-1).gather(
                    -1, problems.codes[chosen].expand(S, -1, -1)[..., None]
                )
                loss = -(picked[..., 0] * weights[chosen]).sum() / len(chosen)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        found = _as_seen(rows, *(p.detach() for p in parameters))
        raw = found.hidden_weight / rows.std[:, None, None]
        return MlpFit(raw, found.hidden_bias, found.weight, found.bias, rows.mean.float())


def _as_seen(rows: Rows, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor, bias: Tensor) -> MlpFit:
    """The perceptron as a function of `rows.x`, the problem's own standardisation inside its first layer."""
    scaled = hidden_weight * rows.inverse_scale[:, :, None]
    shifted = hidden_bias - (scaled * rows.shift[:, :, None]).sum(-1)
    return MlpFit(scaled, shifted, weight, bias, torch.zeros_like(rows.mean, dtype=torch.float32))
