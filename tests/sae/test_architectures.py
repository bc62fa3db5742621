"""What each architecture's file promises: its gradients, its traps avoided, its units."""

import pytest
import torch

import sae
from sae.architectures import REGISTRY, Terms

D_IN, D_OUT, D_SAE = 12, 9, 40
CONFIGS = [
    sae.L1(D_SAE, target_l0=6.0),
    sae.SqrtL1(D_SAE, target_l0=6.0),
    sae.PAnneal(D_SAE, target_l0=6.0),
    sae.Gated(D_SAE, target_l0=6.0),
    sae.JumpReLU(D_SAE, target_l0=6.0, bandwidth=0.2),
    sae.JumpReLU(D_SAE, target_l0=6.0, bandwidth=0.2, sparsity="quadratic"),
    sae.TopK(D_SAE, k=4),
    sae.BatchTopK(D_SAE, k=4),
    sae.Matryoshka(D_SAE, k=4, prefixes=(0.25, 0.5)),
    sae.HierarchicalTopK(D_SAE, k=4),
    sae.Guided(D_SAE, k=4, labels=("a=1", "b=1", "c=1"), guidance=0.7, cond_loss_scaling=3.0),
    sae.Transcoder(D_SAE, k=4, target_site="other", d_out=D_OUT),
    sae.Transcoder(D_SAE, k=4, target_site="other", d_out=D_OUT, skip=True),
    sae.Crosscoder(D_SAE, k=4, widths=(5, 7)),
]
PENALISED = [config for config in CONFIGS if not hasattr(config, "k")]
NAMES = [
    getattr(config, "sparsity", "l0").replace("l0", "")
    + getattr(config, "skip", False) * "skip_"
    + config.name
    for config in CONFIGS
]
EACH = pytest.mark.parametrize("config", CONFIGS, ids=NAMES)


def made(config, dtype=torch.float32, seed=0):
    """An SAE with every parameter off its initial value, a batch, and a mask of dead latents."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, D_IN, generator=generator)
    model = config.build(D_IN)
    model.initialise(x, torch.full_like(model.b_dec, 0.1), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 7, 20, 21, 22, 23, 24, 25, 26]] = True
    return model.to(dtype), x.to(dtype), dead


def terms(model, x, *args, **kwargs):
    """Terms with whatever the architecture learns from beside the activations."""
    generator = torch.Generator().manual_seed(1)
    if model.config.name == "transcoder":
        kwargs["target"] = torch.randn(len(x), D_OUT, generator=generator).to(x)
    if model.config.name == "guided":
        labels = torch.rand(len(x), 3, generator=generator).round().to(x)
        labels[:, 1] = torch.rand(len(x), generator=generator).to(x)
        labels[::3, 2] = torch.nan
        kwargs["labels"] = labels
    return Terms(*args, **kwargs)


def test_every_registered_architecture_is_tested_here():
    assert {config.name for config in CONFIGS} == set(REGISTRY)


@EACH
@pytest.mark.parametrize("some_dead", [False, True], ids=["alive", "dead"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_by_hand_equal_autograd(config, some_dead, sparse, dtype):
    model, x, dead = made(config, dtype)
    given = terms(model, x, 0.3, dead & some_dead, progress=0.5, sparse=sparse)
    loss = model.loss(x, given)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    step = model.gradients(x, given)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert float(step.loss) == pytest.approx(float(loss.detach()), rel=tolerance)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@EACH
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_gradients_are_summed_over_parts_of_the_batch(config, sparse, monkeypatch):
    model, x, dead = made(config, torch.float64)
    x = torch.cat([x, x.flip(1), 2 * x[:40]])
    given = terms(model, x, 0.3, dead, sparse=sparse)
    whole = model.gradients(x, given)
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr("sae.architectures.base._CACHED", 1)
    assert len(list(model.row_chunks(x))) == 3
    parts = model.gradients(x, given)
    torch.testing.assert_close(vars(parts), vars(whole))
    torch.testing.assert_close(
        {name: parameter.grad for name, parameter in model.named_parameters()}, expected
    )


@EACH
def test_autograd_of_the_objective_is_right_away_from_kinks(config):
    # Looked at in the encoder's bias, and without dead latents: what is frozen on purpose makes the objective's derivative
    # another elsewhere.
    model, x, dead = made(config, torch.float64)
    name = "b_mag" if config.name == "gated" else "b_enc"

    class Objective(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self):
            return self.inner.loss(x, terms(model, x, 0.3, dead & False))

    def objective(bias):
        return torch.func.functional_call(Objective(), {f"inner.{name}": bias}, ())

    start = model.get_parameter(name).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(objective, (start,), eps=1e-7, atol=1e-5)


@EACH
def test_counts_and_l0_are_those_of_encode(config):
    model, x, dead = made(config)
    step = model.gradients(x, terms(model, x, 0.3, dead))
    active = model.encode(x) > 0
    torch.testing.assert_close(step.counts, active.sum(0).float())
    assert float(step.l0) == pytest.approx(float(active.sum(1).float().mean()))


@EACH
def test_folding_the_scale_changes_nothing_but_the_units(config):
    model, x, _ = made(config, torch.float64)
    latents, reconstruction = model.encode(x), model(x)
    model.fold_scale(3.7)
    torch.testing.assert_close(model.encode(x / 3.7), latents)
    torch.testing.assert_close(model(x / 3.7), reconstruction / 3.7)


@EACH
def test_initial_latents_are_about_as_sparse_as_asked_for(config):
    x = torch.randn(512, 64)
    sites = {"widths": (24, 40)} if config.name == "crosscoder" else {}
    model = type(config)(**{**vars(config), "d_sae": 256, **sites}).build(64)
    model.initialise(x, model.b_dec.detach().clone(), torch.Generator().manual_seed(0))
    l0 = float((model.encode(x) > 0).sum(1).float().mean())
    wanted = config.k if hasattr(config, "k") else 2 * config.target_l0
    assert l0 == pytest.approx(wanted, rel=0.35)
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(256))


@EACH
def test_any_batch_shape_is_encoded_alike(config):
    model, x, _ = made(config)
    assert model.encode(x).shape == (64, D_SAE)
    assert model(x).shape == (64, len(model.b_dec))
    torch.testing.assert_close(model(x.view(4, 16, D_IN)).flatten(0, 1), model(x))


@EACH
def test_the_jumprelu_form_is_the_same_function(config):
    from sae.formats import as_jumprelu

    if config.own_thresholds:
        pytest.skip(f"a {config.name} with thresholds stays one")
    model, x, _ = made(config, torch.float64)
    model.threshold = torch.full((D_SAE,), 0.3, dtype=torch.float64)
    same = as_jumprelu(model).double()
    same.load_state_dict(model.jumprelu_weights())
    assert model.arch == same.arch == "jumprelu"
    torch.testing.assert_close(same.encode(x), model.encode(x))
    torch.testing.assert_close(same(x), model(x))


def test_sqrt_l1_has_finite_gradients_at_silent_latents():
    model, x, dead = made(sae.SqrtL1(D_SAE, target_l0=6.0))
    with torch.no_grad():
        model.b_enc[5] = -1e4
    model.loss(x, Terms(0.3, dead)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.gradients(x, Terms(0.3, dead))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.penalty(torch.zeros(3), Terms()).abs().max() == 0


def test_the_auxiliary_term_of_gated_does_not_move_the_decoder():
    model, x, dead = made(sae.Gated(D_SAE, target_l0=6.0))
    with torch.no_grad():
        model.b_mag.fill_(-1e4)  # no magnitudes: the reconstruction is the bias alone
    model.gradients(x, Terms(0.3, dead))
    assert model.W_dec.grad.abs().max() == 0
    assert model.W_enc.grad.abs().max() > 0


def test_auxk_reaches_the_encoder_of_latents_that_are_never_positive():
    model, x, _ = made(sae.TopK(D_SAE, k=4))
    with torch.no_grad():
        model.b_enc[:8] = -50.0
    dead = torch.arange(D_SAE) < 8
    model.gradients(x, Terms(dead=torch.zeros_like(dead)))
    assert model.W_enc.grad[:, :8].abs().max() == 0
    model.gradients(x, Terms(dead=dead))
    assert (model.W_enc.grad[:, :8].abs().amax(0) > 0).all()


def test_the_parallel_part_of_the_decoders_gradient_is_removed():
    model, x, dead = made(CONFIGS[0])
    model.constrain()
    model.gradients(x, Terms(0.3, dead))
    model.remove_parallel_gradient()
    assert (model.W_dec.grad * model.W_dec).sum(1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sae.TopK(16, k=17), "k is 17"),
        (lambda: sae.Gated(16, target_l0=16.0), "target_l0 is 16"),
        (lambda: sae.L1(0), "d_sae is 0"),
        (lambda: sae.L1(64, target_l0=None), "Give target_l0, or l1"),
        (lambda: sae.L1(64, l1=-1.0), "l1 is -1"),
        (lambda: sae.get("gatd"), "Did you mean 'gated'"),
        (lambda: CONFIGS[0].build(12).encode(torch.zeros(3, 5)), "width"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make, message):
    from steerkit.errors import InputError

    with pytest.raises(InputError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
