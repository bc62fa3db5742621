"""CLOVER: exactly the base at the start, and the singular values of each head's pair are those of its trained matrix."""

import pytest
import torch
import transformers

from steerkit import adapters
from steerkit.errors import InputError
from steerkit.loading import Loaded
from steerkit.models import HookedModel
from steerkit.sites import weight_of


def random_model(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return HookedModel(Loaded(model, None, "random", None, hasattr(model, "lm_head")))


@pytest.fixture(scope="module")
def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return random_model(transformers.GPT2LMHeadModel, config)


@pytest.fixture(scope="module")
def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return random_model(transformers.BertModel, config)


@pytest.fixture
def put():
    """Puts CLOVER with a random M into a model, and takes it out again."""
    made = []

    def put_into(base, **options):
        tuned = adapters.get(base, "clover", **options)
        made.append(tuned)
        edits = {path: layer.steerkit_edits["default"] for path, layer in tuned.tuner_layers().items()}
        return tuned, edits

    yield put_into
    for tuned in made:
        tuned.remove()


def fill(edits, size=0.3):
    generator = torch.Generator().manual_seed(1)
    for edit in edits.values():
        torch.nn.init.normal_(edit.M, std=size, generator=generator)


def outputs(model, ids):
    return (model.logits(ids) if model.has_lm_head else model.final(ids)).detach()


def weight(model, path):
    found = model.model.get_submodule(path)
    return weight_of(getattr(found, "base_layer", found)).detach().double()


def heads(rows, n):
    """(n, d_head, d)"""
    return rows.unflatten(0, (n, -1))


def assert_between_singular_vectors(M, before, after):
    """`after` is L (diag(s) + M) Rᵀ with L diag(s) Rᵀ = `before`, up to the signs that singular vectors have."""
    width = M.shape[-1]
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    U, S, Vh = U[..., :width], S[:, :width], Vh[:, :width]
    inside = U.mT @ after @ Vh.mT
    torch.testing.assert_close(U @ inside @ Vh, after, atol=1e-4, rtol=1e-4)
    found, M = inside - S.diag_embed(), M.detach().double()
    signs = (found * M).sign()[:, :, :1]
    torch.testing.assert_close(found, signs * M * signs.mT * signs[:, :1], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "modules"),
    [("model", ["o", "k", "up", "gate"]), ("bert", ["o", "k", "up"]), ("gpt2", ["o", "up"])],
    ids=["rotary and grouped", "bert", "fused"],
)
def test_it_starts_as_the_base_exactly_and_merges(name, modules, put, request):
    base = request.getfixturevalue(name)
    ids = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    before = outputs(base, ids)
    tuned, edits = put(base, modules=modules, width=16)
    assert torch.equal(outputs(tuned, ids), before)
    assert tuned.n_trainable == tuned.method.count(base, tuned.slots)
    fill(edits, 0.02)
    changed = outputs(tuned, ids)
    assert (changed - before).abs().max() > 1e-3
    tuned.peft.merge_adapter()
    torch.testing.assert_close(outputs(tuned, ids), changed, atol=1e-4, rtol=1e-4)
    tuned.peft.unmerge_adapter()


@pytest.mark.parametrize("name", ["model", "gpt2", "bert"], ids=["grouped", "fused", "bert"])
def test_output_and_value_have_the_trained_matrix_between_their_singular_vectors(name, put, request):
    base = request.getfixturevalue(name)
    _, edits = put(base, modules=["o"], layers=[1])
    fill(edits)
    ((path, edit),) = edits.items()
    out = weight(base, path)
    value = {
        "model": lambda: weight(base, "model.layers.1.self_attn.v_proj"),
        "gpt2": lambda: weight(base, "transformer.h.1.attn.c_attn")[64:],
        "bert": lambda: weight(base, "encoder.layer.1.attention.self.value"),
    }[name]()
    values = heads(value, len(value) // 8).repeat_interleave(32 // len(value), dim=0)  # four heads of 8
    pairs = [heads(W.T, 4).mT @ values for W in (out, out + edit.delta(out.float()).detach())]
    assert_between_singular_vectors(edit.M, *pairs)


def test_query_and_key_are_taken_together_where_positions_are_not_rotated(bert, put):
    _, edits = put(bert, modules=["k"], layers=[0])
    fill(edits)
    ((path, edit),) = edits.items()
    K, Q = weight(bert, path), weight(bert, path.replace("key", "query"))
    pairs = [heads(Q, 4).mT @ heads(W, 4) for W in (K, K + edit.delta(K.float()).detach())]
    assert_between_singular_vectors(edit.M, *pairs)


@pytest.mark.parametrize(("kind", "width"), [("k", 8), ("up", 24), ("gate", 24)])
def test_elsewhere_the_change_is_inside_of_what_each_head_reads(model, put, kind, width):
    _, edits = put(model, modules=[kind], layers=[0], width=30)
    fill(edits)
    ((path, edit),) = edits.items()
    W = weight(model, path)
    assert edit.M.shape == (len(W) // width, width, width)
    change = heads(edit.delta(W.float()).detach().double(), len(W) // width)
    basis = torch.linalg.qr(heads(W, len(W) // width).mT).Q
    torch.testing.assert_close(change @ basis @ basis.mT, change, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch.linalg.svdvals(change), torch.linalg.svdvals(edit.M.detach().double()), atol=1e-4, rtol=1e-4
    )


def test_a_head_that_lacks_directions_is_left_alone_in_them(bert, put):
    value = bert.model.get_submodule("encoder.layer.0.attention.self.value")
    kept = value.weight.detach().clone()
    try:
        value.weight.data[:4] = value.weight.data[4:8]  # head 0 writes four directions only
        _, edits = put(bert, modules=["o"], layers=[0])
        (edit,) = edits.values()
        fill(edits, 1.0)
        blocks = edit.blocks().detach()
        assert blocks.isfinite().all()
        assert torch.linalg.matrix_rank(blocks[0], rtol=1e-4) == 4
        assert blocks.abs().max() < 1e3
    finally:
        value.weight.data.copy_(kept)


def test_where_it_goes_is_checked(model, gpt2):
    with pytest.raises(InputError, match=r"clover goes to o, k, up and gate; .*q_proj is q"):
        adapters.get(model, "clover", modules=["q"])
    with pytest.raises(InputError, match="fused"):
        adapters.get(gpt2, "clover")
    with pytest.raises(InputError, match="width is 0"):
        adapters.get(model, "clover", width=0)
