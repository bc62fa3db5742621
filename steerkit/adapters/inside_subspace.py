"""The intrinsic dimension of a task: how few random directions of the weights suffice to learn it.

    theta = theta_0 + P v        theta: all trained parameters (D,); v: (d,), trained, from 0; P: (D, d), random and fixed

    with RandomSubspace(model.model, d=1000, seed=0) as subspace:
        finetune(model, objective, …)                   # the only parameter is subspace.vector
        scores[1000] = evaluate(model)
    d90(scores, full=0.91)

Li et al. 2018, https://arxiv.org/abs/1804.08838; Aghajanyan et al. 2020, https://arxiv.org/abs/2012.13255 (DID: one projection
for all parameters). They project with Fastfood; P here is the randomised Hadamard transform, without Gaussians or a stored matrix:

    P v = √(N/D) [ s ⊙ H (t ⊙ v at d random of N places) ]_{1…D}       H: orthonormal Hadamard, N = 2^⌈log₂ D⌉; s, t: random signs

Every weight depends on all of v, with equal size; E ‖P v‖² = ‖v‖². A step of v by Adam is √(D/d) times shorter than one of theta at
the same learning rate: scale the rate by that to move the weights as far. Cost: O(D log D) a step; theta once more, and D bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.errors import InputError

VECTOR = "random_subspace"
"""Under this name v is a parameter of the module while the subspace is in place."""
_RADIX_BITS = 5


class Projection:
    """P: (d,) -> (D,), linear and differentiable; its adjoint is its gradient. The same for the same sizes and seed."""

    def __init__(self, D: int, d: int, seed: int, device: str | torch.device = "cpu") -> None:
        if not 1 <= d <= D:
            raise InputError(
                f"A subspace of {d} dimensions does not fit {D} parameters: d must be from 1 to {D}."
            )
        self.bits = max(D - 1, 1).bit_length()
        N = 2**self.bits
        generator = torch.Generator().manual_seed(seed)
        self.D, self.scale = D, math.sqrt(N / D)
        self.places = torch.randperm(N, generator=generator)[:d].to(device)
        self.signs_in = _signs(d, generator).to(device)
        self.signs_out = _signs(D, generator).to(device)

    def __call__(self, v: Float[Tensor, " d"]) -> Float[Tensor, " D"]:
        spread = v.new_zeros(2**self.bits).index_copy(0, self.places, v * self.signs_in)
        return self.scale * self.signs_out * _hadamard(spread, self.bits)[: self.D]


class RandomSubspace:
    """Trains a module in a random subspace of its trainable parameters: a context manager.

    Inside, those parameters are tensors that every forward pass computes from `vector`, which is the module's only parameter with
    requires_grad; `state_dict` has it in their place. Parameters that are tied stay tied. On leaving, also after an exception, the
    module's own parameters are put back untouched; `vector` remains, and entering again goes on from it.

    Raises InputError where nothing requires a gradient, or d exceeds the number of what does.
    """

    def __init__(self, module: nn.Module, d: int, seed: int = 0) -> None:
        self.module = module
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.parameters = [module.get_parameter(name) for name in self.names]
        if not self.parameters:
            raise InputError(
                "No parameter of the model requires a gradient: there is nothing to train in a subspace."
            )
        first = self.parameters[0]
        dtype = first.dtype if first.dtype == torch.float64 else torch.float32
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.project = Projection(sum(self.sizes), d, seed, first.device)
        self.vector = nn.Parameter(torch.zeros(d, dtype=dtype, device=first.device))
        self._slots = self._find_slots()
        self._saved: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._of: Tensor | None = None
        """The v that the module's tensors are of; None once a backward pass has used them up."""
        self._with_grad = False

    def delta(self) -> dict[str, Tensor]:
        """Name -> P v of that parameter's shape: what training has added to it."""
        with torch.no_grad():
            return dict(zip(self.names, self._cut(self.project(self.vector))))

    def __enter__(self) -> RandomSubspace:
        if self._saved or VECTOR in self.module._parameters:
            raise InputError("The model is in a random subspace already.")
        owners = list(dict.fromkeys([self.module, *(owner for owner, _, _ in self._slots)]))
        self._saved = [(owner, dict(owner._parameters)) for owner in owners]
        for owner, name, _ in self._slots:
            del owner._parameters[name]
        self.module.register_parameter(VECTOR, self.vector)
        self._hooks = [
            owner.register_forward_pre_hook(lambda module, _: self._refresh(module is self.module))
            for owner in owners
        ]
        self._of = None
        self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for owner, name, _ in self._slots:
            owner.__dict__.pop(name, None)
        for owner, parameters in self._saved:
            owner._parameters.clear()
            owner._parameters.update(parameters)
        self._hooks, self._saved, self._of = [], [], None

    def _find_slots(self) -> list[tuple[nn.Module, str, int]]:
        """(module, name there, number of the parameter): more than one of a parameter where it is tied."""
        number = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        return [
            (owner, name, number[id(parameter)])
            for owner in self.module.modules()
            for name, parameter in owner._parameters.items()
            if id(parameter) in number
        ]

    def _refresh(self, root: bool = True) -> None:
        """Give the module the tensors of v as it is now.

        With gradients, each forward pass of the module has a graph of its own, as it would with parameters; a part of the module
        that is called alone gets a new one when a backward pass has used the last. Without, v is projected again if it has changed.
        """
        with_grad = torch.is_grad_enabled()
        if self._of is not None and self._with_grad == with_grad:
            if not root:
                return
            if not with_grad and torch.equal(self._of, self.vector):
                return
        flat = self.project(self.vector)
        if flat.requires_grad:
            flat.register_hook(self._used_up)
        tensors = [p.detach() + part for p, part in zip(self.parameters, self._cut(flat))]
        for owner, name, i in self._slots:
            setattr(owner, name, tensors[i])
        self._of, self._with_grad = self.vector.detach().clone(), with_grad

    def _used_up(self, gradient: Tensor) -> None:
        self._of = None

    def _cut(self, flat: Float[Tensor, " D"]) -> list[Tensor]:
        """Pieces of P v in the shape, precision and place of the parameters."""
        pieces = flat.split(self.sizes)
        return [piece.view(p.shape).to(p.device, p.dtype) for piece, p in zip(pieces, self.parameters)]


def d90(scores: Mapping[int, float], full: float, *, share: float = 0.9, chance: float = 0.0) -> float | None:
    """The smallest d that reaches `share` of the full score, between the d that were tried by interpolation in log d.

    `scores`: d -> score, higher is better; `full`: of training all parameters. The threshold is chance + share (full - chance); the
    paper has no chance. None if no d reaches it; the smallest d tried, if that does already, is an upper bound.
    """
    if not scores or not 0 < share <= 1 or not full > chance:
        raise InputError(
            f"d90 needs scores, a share in (0, 1] and a full score above chance, not {share}, {full}, {chance}."
        )
    threshold = chance + share * (full - chance)
    before: tuple[int, float] | None = None
    for d, score in sorted(scores.items()):
        if score >= threshold:
            if before is None:
                return float(d)
            step = (threshold - before[1]) / (score - before[1])
            return float(before[0] * (d / before[0]) ** step)
        before = d, score
    return None


def _signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1


def _hadamard(x: Float[Tensor, " N"], bits: int) -> Float[Tensor, " N"]:
    """H x, orthonormal. A few bits of the index at a time: each product transforms the top ones and turns them to the bottom."""
    for start in range(0, bits, _RADIX_BITS):
        radix = 2 ** min(_RADIX_BITS, bits - start)
        x = (x.view(radix, -1).T @ _hadamard_matrix(radix).to(x)).reshape(-1)
    return x


def _hadamard_matrix(n: int) -> Float[Tensor, "n n"]:
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)
