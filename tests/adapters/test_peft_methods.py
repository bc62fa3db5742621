"""peft's methods are what their files say: equations, invariances, sizes that fit; prompts; what they refuse."""

import math

import pytest
import torch

from steerkit import adapters
from steerkit.adapters.sizes import greatest_divisor
from steerkit.errors import InputError, SiteError
from steerkit.models import HookedModel


@pytest.fixture
def ids(model):
    return torch.randint(5, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def put(model):
    """Puts an adapter into the model; the last is taken out in the end."""
    made = []

    def put_in(name, **settings):
        made.append(adapters.get(model, name, **settings))
        return made[-1]

    yield put_in
    if made:
        made[-1].remove()


@pytest.fixture
def filled(put):
    """The same with random numbers in all that is trained."""

    def fill(name, seed=0, size=0.3, **settings):
        tuned = put(name, **settings)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.trainable().values():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        return tuned

    return fill


def vera(layer, W):
    A, B = layer.vera_A["default"][:, : W.shape[1]], layer.vera_B["default"][: W.shape[0]]
    return layer.vera_lambda_b["default"][:, None] * B @ (layer.vera_lambda_d["default"][:, None] * A)


def delora(layer, W):
    A, B = layer.delora_A["default"], layer.delora_B["default"]
    lengths = A.norm(dim=1) * B.norm(dim=0)
    return layer.delora_lambda["default"] / len(A) * (B / lengths) @ A * W.norm(dim=0)


def fourierft(layer, W):
    spectrum = torch.zeros_like(W)
    rows, columns = layer.indices["default"]
    spectrum[rows, columns] = layer.fourierft_spectrum["default"]
    u, v = (torch.arange(n, dtype=torch.float64) for n in W.shape)
    left, right = (torch.exp(2j * math.pi * torch.outer(x, x) / len(x)) for x in (u, v))
    return 150.0 * (left @ spectrum.to(left) @ right).real.float() / W.numel()


def loha(layer, W):
    parts = [getattr(layer, f"hada_w{i}_{x}")["default"] for i in (1, 2) for x in "ab"]
    return (parts[0] @ parts[1]) * (parts[2] @ parts[3])


def lokr(layer, W):
    right = layer.lokr_w2_a["default"] @ layer.lokr_w2_b["default"]
    return torch.kron(layer.lokr_w1["default"], right)


def hira(layer, W):
    return W * (layer.hira_B["default"] @ layer.hira_A["default"])


def ia3(layer, W):
    return W * layer.ia3_l["default"] - W


def hra(layer, W):
    turned = W
    for u in layer.hra_u["default"].T:
        turned = turned - 2 * torch.outer(turned @ u, u) / u.square().sum()
    return turned - W


def road(layer, W):
    """Pairs are the halves of a group."""
    theta, alpha = layer.road_theta["default"], layer.road_alpha["default"]
    first, second = W.view(-1, 2, 4, W.shape[1]).unbind(1)
    cos, sin = ((alpha * f).view(-1, 4, 1) for f in (theta.cos(), theta.sin()))
    return torch.stack([cos * first - sin * second, sin * first + cos * second], 1).view(W.shape) - W


def miss(layer, W):
    return layer.miss_block["default"].T.repeat(1, W.shape[1] // 8)


def c3a(layer, W):
    kernel = layer.c3a_kernel["default"]
    n = kernel.shape[-1]
    at = (torch.arange(n)[None] - torch.arange(n)[:, None]) % n
    blocks = kernel[:, :, at]
    return blocks.permute(0, 2, 1, 3).reshape(W.shape) / W.shape[1]


def gralora(layer, W):
    """Block (i, j) is made of part j of the i-th B, and part i of the j-th A."""
    A, B = layer.gralora_A["default"], layer.gralora_B["default"]  # (k, d_in/k, r), (k, r, d_out/k)
    k, part = len(A), A.shape[2] // len(A)
    rows = []
    for i in range(k):
        blocks = []
        for j in range(k):
            a = A[j][:, i * part : (i + 1) * part]
            b = B[i][j * part : (j + 1) * part]
            blocks.append((a @ b).T)
        rows.append(torch.cat(blocks, 1))
    return 2 * torch.cat(rows, 0)


EQUATIONS = {
    vera: {"rank": 16},
    delora: {"rank": 4},
    fourierft: {"entries": 64},
    loha: {"rank": 2},
    lokr: {"rank": 2},
    hira: {"rank": 4},
    ia3: {},
    hra: {"rank": 4},
    road: {"group": 8},
    miss: {"rank": 8},
    c3a: {"block": 8},
    gralora: {"rank": 4},
}


@pytest.mark.parametrize("equation", EQUATIONS, ids=lambda f: f.__name__)
def test_its_change_is_its_equation(filled, equation):
    tuned = filled(equation.__name__, **EQUATIONS[equation])
    changes = tuned.changes()
    assert changes
    for path, layer in tuned.tuner_layers().items():
        change = changes[path]
        assert change.norm > 1e-3, path
        expected = equation(layer, change.base)
        torch.testing.assert_close(change.delta, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("oft", {"block": 8, "exact": True}),
        ("oft", {"block": 8}),
        ("hra", {"rank": 4}),
        ("boft", {"block": 4}),
    ],
)
def test_rotations_of_the_input_keep_angles_between_neurons(filled, name, settings):
    size = (
        0.01 if name == "oft" and "exact" not in settings else 0.3
    )  # the series is orthogonal for small angles
    tuned = filled(name, size=size, **settings)
    for path, change in tuned.changes().items():
        W = change.tuned
        if name == "boft":
            W = W / tuned.tuner_layers()[path].boft_s["default"]
        assert change.relative_norm > 0.005
        gram = change.base @ change.base.T
        torch.testing.assert_close(W @ W.T, gram, rtol=0, atol=1e-4 * float(gram.diagonal().max()))


def test_deloras_change_is_bounded_by_its_lambda(filled):
    tuned = filled("delora", size=30.0, rank=4)
    for path, change in tuned.changes().items():
        bound = float(tuned.tuner_layers()[path].delora_lambda["default"].abs())
        assert (change.delta / change.base.norm(dim=0)).norm() <= bound * (1 + 1e-4)


def test_psoft_changes_only_the_principal_subspace(filled):
    tuned = filled("psoft", rank=8)
    for change in tuned.changes().values():
        U, _, Vh = torch.linalg.svd(change.base, full_matrices=False)
        outside = change.delta - U[:, :8] @ U[:, :8].T @ change.delta @ Vh[:8].T @ Vh[:8]
        assert outside.norm() < 1e-3 * change.norm


def test_osf_leaves_the_greatest_directions_after_steps(put, ids):
    tuned = put("osf", keep=0.5)
    optimiser = torch.optim.SGD(tuned.trainable().values(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        tuned.logits(ids).logsumexp(-1).mean().backward()
        optimiser.step()
    for path, change in tuned.changes().items():
        k = tuned.method.frozen_at(next(slot for slot in tuned.slots if slot.path == path))
        U, _, Vh = torch.linalg.svd(change.base, full_matrices=False)
        inside = U[:, :k].T @ change.delta @ Vh[:k].T
        assert change.norm > 1e-4
        assert inside.norm() < 0.01 * change.norm + 1e-4


def test_shira_and_randlora_keep_their_places_from_the_seed(put):
    for name, settings in (("shira", {"rank": 2}), ("randlora", {"rank": 8}), ("fourierft", {"entries": 32})):
        deltas = []
        for seed in (1, 1, 2):
            tuned = put(name, modules="q", seed=seed, **settings)
            with torch.no_grad():
                for parameter in tuned.trainable().values():
                    parameter.fill_(1.0)
            deltas.append(next(iter(tuned.changes().values())).delta)
            tuned.remove()
        assert torch.equal(deltas[0], deltas[1])
        assert not torch.equal(deltas[0], deltas[2])


def test_blocks_are_the_greatest_that_divide(put):
    assert greatest_divisor(32, [48, 32], "block") == 16
    assert greatest_divisor(7, [48], "block") == 6
    assert greatest_divisor(7, [48], "block", multiple_of=4) == 4
    with pytest.raises(InputError, match="no block of 2 to 5 divides 7"):
        greatest_divisor(5, [7, 14], "block")
    tuned = put("oft")  # asks for 32; inputs are 32 and 48
    assert {layer.oft_block_size["default"] for layer in tuned.tuner_layers().values()} == {16}


def test_norms_are_tuned_layer_by_layer_or_all(put, model):
    every = put("ln_tuning")
    assert len(every.slots) == 2 * model.n_layers + 1
    every.remove()
    one = put("ln_tuning", layers=[1])
    assert {slot.layer for slot in one.slots} == {1}
    assert len(one.slots) == 2


def test_only_the_tokens_asked_for_are_trained(filled, model, ids):
    other = torch.full_like(ids, 9)
    before, plain = model.logits(ids).detach(), model.logits(other).detach()
    tuned = filled("trainable_tokens", tokens=(7, int(ids[0, 0])))
    assert torch.equal(tuned.logits(other), plain)
    assert not torch.allclose(tuned.logits(ids)[0], before[0], atol=1e-3)


def test_a_prompt_is_embeddings_before_the_text(put, model, ids):
    tuned = put("prompt_tuning", length=4)
    prompt = next(iter(tuned.trainable().values()))
    found, final = tuned.logits(ids), tuned.final(ids)
    texts = tuned.generate(["The fox", "The old fox was"], max_new_tokens=3, do_sample=False)
    assert texts[0] == tuned.generate("The fox", max_new_tokens=3, do_sample=False)
    tuned.remove()
    inputs = torch.cat([prompt.expand(3, -1, -1), model.model.get_input_embeddings()(ids)], 1)
    expected = model.model(inputs_embeds=inputs).logits[:, 4:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.unembed(final), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
def test_prompts_go_before_padded_texts_and_can_be_trained_further(filled, model, ids, name, tmp_path):
    tuned = filled(name, length=4)
    assert tuned.context == model.context - 4
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    short = tuned.logits(ids[1:2, :6])
    torch.testing.assert_close(tuned.logits(ids, mask)[1:2, :6], short, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="pad it on the right"):
        tuned.logits(ids, mask.flip(1))
    with pytest.raises(SiteError, match="shift positions"):
        tuned.run(ids, sites=["blocks.0.hook_resid_post"])
    with pytest.raises(InputError, match="cannot be scaled"), tuned.scaled(0.5):
        pass
    with pytest.raises(InputError, match="cannot be merged"):
        tuned.merge(tmp_path / "merged")
    folder, before = tuned.save(tmp_path / "a"), tuned.logits(ids).detach()
    tuned.remove()
    with pytest.raises(InputError, match="shift positions"):
        HookedModel.from_pretrained(folder)
    again = adapters.load(folder, model)
    torch.testing.assert_close(again.logits(ids), before, rtol=0, atol=1e-6)
    again.logits(ids).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in again.trainable().values())
    again.remove()


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("hra", {"rank": 3}, "even"),
        ("hra", {"rank": 34}, "at most 32"),
        ("psoft", {"rank": 33}, "at most 32"),
        ("oft", {"block": 1}, "block"),
        ("road", {"variant": 3}, "1, 2 and 4"),
        ("road", {"group": 1}, "group"),
        ("boft", {"factors": 0}, "1 or more"),
        ("c3a", {"block": 1}, "c3a's block"),
        ("fourierft", {"entries": 99999}, "entries is 99999"),
        ("waveft", {"entries": 0}, "entries is 0"),
        ("gralora", {"rank": 3}, "multiple of k"),
        ("gralora", {"rank": 5, "k": 5}, "divide both sides"),
        ("miss", {"variant": "bone"}, "plain, mini, bat"),
        ("miss", {"variant": "bat", "rank": 5}, "squares"),
        ("miss", {"variant": "mini", "width": 5}, "5 columns"),
        ("vblora", {"top": 9, "vectors": 8}, "top is 9"),
        ("shira", {"rank": 16}, "more than"),
        ("osf", {"keep": 1.0}, "share"),
        ("lokr", {"factor": 0}, "factor 0"),
        ("vera", {"rank": 0}, "1 or more"),
        ("ln_tuning", {"modules": "q"}, "norms"),
        ("trainable_tokens", {}, "at least one"),
        ("trainable_tokens", {"tokens": (10**6,)}, "1000000 is not"),
        ("trainable_tokens", {"tokens": (5,), "modules": "q"}, "embedding"),
        ("prompt_tuning", {"length": 0}, "length is 0"),
        ("prefix_tuning", {"modules": "q"}, "before the text"),
    ],
)
def test_mistakes_are_named(model, ids, name, settings, match):
    before = model.logits(ids)
    with pytest.raises(InputError, match=match):
        adapters.get(model, name, **settings)
    assert torch.equal(model.logits(ids), before)


@pytest.mark.parametrize(
    "settings", [{"variant": "bat", "rank": 8}, {"variant": "mini", "width": 4, "rank": 8}]
)
def test_the_variants_of_miss(put, model, ids, settings):
    before = model.logits(ids)
    tuned = put("miss", **settings)
    assert torch.equal(tuned.logits(ids), before)
    assert tuned.n_trainable == tuned.method.count(model, tuned.slots)
