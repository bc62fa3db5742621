"""What makes a step cheap changes nothing: changes that go into the weight beforehand, and gradients that are written by hand."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from edit_cases import edit_of, fill, linear

from steerkit.adapters.methods.antipasto import AntiPaSTO
from steerkit.adapters.methods.diff_pruning import HIGH, LOW, DiffPruning, _Gates
from steerkit.adapters.methods.goft import cascade
from steerkit.adapters.methods.ssvd import SSVD
from steerkit.adapters.methods.svft import SVFT
from steerkit.adapters.tuner import EditLayer


def gradients(y, edit, x):
    return torch.autograd.grad(y.square().sum(), [x, *edit.parameters()])


@pytest.mark.parametrize("sides", [(160, 200), (200, 160), (150, 150)])
@pytest.mark.parametrize(
    "method",
    [
        SVFT(rank=0),
        SVFT(rank=3),
        SVFT(rank=60),
        SVFT(pattern="plain"),
        SVFT(pattern="random"),
        SSVD(140),
        AntiPaSTO(140),
        DiffPruning(gate=0.5),
    ],
    ids=str,
)
def test_a_change_in_the_weight_is_the_change_beside_it(method, sides):
    module = linear(*sides, dtype=torch.float64)
    edit = fill(edit_of(method, module).double(), 0.3).eval()
    x = torch.randn(
        3, 80, sides[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    assert edit.folded(module.weight, 240) is not None
    inside, beside = edit.around(module, x), edit(x, module)
    torch.testing.assert_close(inside, beside)
    torch.testing.assert_close(gradients(inside, edit, x), gradients(beside, edit, x))


def test_few_tokens_do_not_pay_for_it():
    module = linear(160, 200)
    assert edit_of(SVFT(), module).folded(module.weight, 1) is None
    assert edit_of(AntiPaSTO(4), module).folded(module.weight, 10**6) is None


def test_changes_that_add_up_are_not_rounded_away_by_autocast():
    """Each too small for its entry of the weight, had it been added to that before it becomes bfloat16."""
    module = linear(64, 64, bias=False)
    module.weight.data = module.weight.sign() * module.weight.abs().clamp_min(0.07).bfloat16().float()
    x = 1 + 0.1 * torch.randn(1024, 64, generator=torch.Generator().manual_seed(1))
    edit = edit_of(DiffPruning(gate=100.0), module).eval()
    with torch.no_grad():
        edit.w.fill_(1e-4)
        wanted = x @ edit.w.T
        with torch.autocast("cpu", torch.bfloat16):
            added = edit.around(module, x).float() - module(x).float()
    assert float((added * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.3)


def test_the_base_is_still_called_and_its_weight_left_alone():
    module, x = linear(64, 64), torch.randn(256, 64)
    layer, before = EditLayer(module), module.weight.clone()
    layer.update_layer("default", fill(edit_of(SVFT(), module), 0.3), False)
    layer._active_adapter = ["default"]
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(layer(x), seen[0])
    assert not torch.allclose(seen[0], torch.nn.functional.linear(x, before, module.bias), atol=1e-3)
    assert module.weight is dict(module.named_parameters())["weight"]
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("d", [1, 2, 3, 7, 12])
def test_the_cascade_has_the_gradient_of_finite_differences(d):
    generator = torch.Generator().manual_seed(d)
    x, blocks = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, d), (d - 1, 2, 2))
    )
    assert torch.autograd.gradcheck(cascade, (x, blocks))


def test_gates_are_hard_concrete_with_their_gradient():
    generator = torch.Generator().manual_seed(0)
    a = 2 * torch.randn(1000, generator=generator, dtype=torch.float64)
    a[:2] = torch.tensor([100.0, -100.0])
    u = torch.rand(1000, generator=generator, dtype=torch.float64)
    for drawn in (u, None):
        found, expected = a.clone().requires_grad_(), a.clone().requires_grad_()
        noise = 0 if drawn is None else u.log() - (-u).log1p()
        z = ((expected + noise).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
        own = _Gates.apply(found, drawn)
        torch.testing.assert_close(own, z)
        torch.testing.assert_close(
            torch.autograd.grad(own.square().sum(), found), torch.autograd.grad(z.square().sum(), expected)
        )
        assert own[:2].tolist() == [1, 0]
    single = _Gates.apply(a.float(), u.float())
    assert bool(single.isfinite().all())
    assert single[:2].tolist() == [1, 0]
