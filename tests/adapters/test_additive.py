"""Tied-LoRA, QA-LoRA, BitFit, diff pruning: what is shared, grouped, biased, dropped."""

import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from edit_cases import edit_of, fill, linear, trained

from steerkit import adapters
from steerkit.adapters.methods.diff_pruning import HIGH, LOW, DiffPruning
from steerkit.adapters.methods.qa_lora import QALoRA
from steerkit.adapters.methods.tied_lora import TiedLoRA
from steerkit.adapters.training import train
from steerkit.errors import InputError
from steerkit.finetuning import FinetuneConfig
from steerkit.loading import Loaded
from steerkit.models import HookedModel
from steerkit.objectives import LanguageModelling


def edits_of(tuned):
    return {
        name: module
        for name, module in tuned.model.named_modules()
        if isinstance(module, adapters.tuner.Edit)
    }


# Tied-LoRA


def test_layers_of_one_kind_and_shape_share_their_factors(model):
    tuned = adapters.get(model, "tied_lora", rank=4)
    try:
        edits = edits_of(tuned)
        by_kind = {}
        for slot in tuned.slots:
            (edit,) = (e for name, e in edits.items() if f".{slot.path}." in f".{name}.")
            by_kind.setdefault(slot.kind, []).append(edit)
        assert all(len(own) == 2 for own in by_kind.values())  # two layers
        for one, other in by_kind.values():
            assert one.A is other.A
            assert one.B is other.B
            assert one.u is not other.u
        assert by_kind["k"][0].A is not by_kind["v"][0].A  # of equal shape, but another kind
    finally:
        tuned.remove()


def test_the_shared_factors_are_saved_once_and_shared_again_when_loaded(model, tmp_path):
    from safetensors.torch import load_file

    tuned = adapters.get(model, "tied_lora", rank=4, modules=["down"])
    try:
        saved = load_file(tuned.save(tmp_path / "a") / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in saved.values()) == tuned.n_trainable
    finally:
        tuned.remove()
    loaded = HookedModel.from_pretrained(tmp_path / "a")
    one, other = (m for m in loaded.model.modules() if isinstance(m, adapters.tuner.Edit))
    assert one.A is other.A


def test_tied_lora_of_one_layer_is_lora_with_two_gains():
    module, shared = linear(20, 28), {}
    edit = fill(edit_of(TiedLoRA(3), module, shared=shared, facts={"kind": "q"}), 0.5)
    other = edit_of(TiedLoRA(3), linear(20, 28, seed=1), path="n", shared=shared, facts={"kind": "q"})
    delta = torch.diag(edit.v) @ edit.B @ torch.diag(edit.u) @ edit.A
    torch.testing.assert_close(edit.delta(module.weight), delta)
    torch.testing.assert_close(other.delta(module.weight), edit.B @ edit.A)
    assert {name for name, _ in other.named_parameters()} == {"u", "v"}


# QA-LoRA


@pytest.mark.parametrize(("group", "used"), [(1, 1), (4, 4), (8, 7), (32, 28)])
def test_the_change_of_qa_lora_is_constant_within_groups(group, used):
    module = linear(20, 28)
    edit = trained(edit_of(QALoRA(3, group=group), module), module)
    assert edit.group == used
    delta = edit.delta(module.weight).view(20, -1, used)
    assert torch.equal(delta, delta[:, :, :1].expand_as(delta))
    assert torch.linalg.matrix_rank(delta[:, :, 0]) == min(3, 28 // used)
    x = torch.randn(5, 28, generator=torch.Generator().manual_seed(1))
    wanted = F.linear(x, module.weight + edit.delta(module.weight), module.bias)
    torch.testing.assert_close(edit(x, module), wanted, atol=1e-5, rtol=1e-5)


def test_with_groups_of_one_qa_lora_is_lora():
    module = linear(20, 28)
    edit = fill(edit_of(QALoRA(3, alpha=12, group=1), module), 0.5)
    torch.testing.assert_close(edit.delta(module.weight), 12 / 3 * edit.B @ edit.A)


# BitFit


@pytest.fixture(scope="module")
def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HookedModel(Loaded(transformers.BertModel(config).eval(), None, "bert", None, False))


def test_bitfit_trains_all_biases_of_the_blocks_norms_too(bert):
    tuned = adapters.get(bert, "bitfit")
    try:
        biases = 4 * 32 + 48 + 32 + 2 * 32  # q, k, v, o, up, down, two norms
        assert tuned.n_trainable == 2 * biases == tuned.method.count(bert, tuned.slots)
        assert {slot.kind for slot in tuned.slots} == {"q", "k", "v", "o", "up", "down", "norm"}
        for edit in edits_of(tuned).values():
            fill(edit, 0.3)
        ids = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
        changed = tuned.final(ids).detach()
        merged = tuned.peft.merge_and_unload()
        torch.testing.assert_close(merged(ids).last_hidden_state, changed, atol=1e-5, rtol=1e-5)
    finally:
        tuned.remove()


def test_modules_without_a_bias_are_skipped(model):
    tuned = adapters.get(model, "bitfit")
    try:
        assert {slot.kind for slot in tuned.slots} == {"q", "k", "v"}
    finally:
        tuned.remove()
    with pytest.raises(InputError, match="no biases there"):
        adapters.get(model, "bitfit", modules="ffn")


# diff pruning


def test_the_expected_number_of_open_gates_is_its_closed_form():
    """Louizos et al. 2018, eq. 12 and the mass at 1, against drawn gates."""
    torch.manual_seed(0)
    edit = edit_of(DiffPruning(l0=1.0, gate=0.7), linear(300, 300))
    open_gates = torch.stack([edit.gates(drawn=True) > 0 for _ in range(5)]).float()
    full_gates = torch.stack([edit.gates(drawn=True) == 1 for _ in range(5)]).float()
    n = open_gates.numel()
    expected = 1 / (1 + math.exp(-(0.7 - math.log(-LOW / HIGH))))
    assert float(edit.penalty()) == pytest.approx(expected * 300 * 300, rel=1e-5)
    full = (1 - LOW) / (HIGH - LOW)
    expected_full = 1 / (1 + math.exp(-(0.7 - math.log(full / (1 - full)))))
    for found, p in ((open_gates, expected), (full_gates, expected_full)):
        assert float(found.mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_gates_are_drawn_in_training_only():
    module = linear(20, 28)
    edit = fill(edit_of(DiffPruning(), module), 1.0)
    x = torch.randn(5, 28)
    assert not torch.equal(edit.train()(x, module), edit(x, module))
    assert torch.equal(edit.eval()(x, module), edit(x, module))
    torch.testing.assert_close(
        edit(x, module),
        F.linear(x, module.weight + edit.delta(module.weight), module.bias),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("kept", [0.005, 0.3, 1.0])
def test_projection_keeps_the_greatest_changes_of_all_modules_and_goes_on_with_them(model, kept):
    method = DiffPruning(kept=kept, prune_at=0.5, gate=1.0)
    tuned = adapters.get(model, method)
    try:
        edits = list(edits_of(tuned).values())
        for i, edit in enumerate(edits):
            fill(edit, 0.1 * (i + 1), seed=i)

        def changes():
            return torch.cat([edit.change().detach().flatten() for edit in edits])

        before = changes()
        method.after_step(tuned.model, 3, 10)
        assert torch.equal(changes(), before)
        method.after_step(tuned.model, 4, 10)  # the fifth step of ten
        after = changes()
        n_kept = int(kept * len(before))
        chosen = before.abs().topk(n_kept).indices
        assert int((after != 0).sum()) == int((before[chosen] != 0).sum()) <= n_kept
        assert torch.equal(after[chosen], before[chosen])
        assert torch.equal(
            torch.cat([e.gates(drawn=True).flatten() for e in edits]) > 0, _mask(after, chosen)
        )
        ids = torch.arange(5, 12)[None]
        optimiser = torch.optim.AdamW(method.groups(tuned.model, 1e-2, 0.1))
        for _ in range(3):
            optimiser.zero_grad()
            (tuned.logits(ids).square().mean() + method.regulariser(tuned.model)).backward()
            optimiser.step()
        trained_on = changes()
        assert not torch.equal(trained_on, after)
        assert not trained_on[~_mask(after, chosen)].any()
        method.finish(tuned.model)
        assert torch.equal(changes(), trained_on)
    finally:
        tuned.remove()


def test_the_trainer_leaves_the_kept_share_whatever_was_best(model):
    """At this learning rate the first evaluation is the best, before anything is dropped."""
    texts = ["The fox took the red ball.", "The cat took the blue ball.", "The hen sat. The hen sang."] * 3
    objective = LanguageModelling(model, texts[:6], texts[6:], texts[6:])
    tuned = adapters.get(model, DiffPruning(kept=0.01, gate=1.0), layers=[0])
    try:
        config = FinetuneConfig(lr=0.5, epochs=3, batch_size=2, eval_every=1)
        outcome = train(tuned, objective, config)
        assert outcome.best is not None
        assert outcome.best[0] < 0.8 * outcome.steps
        changes = torch.cat([edit.change().detach().flatten() for edit in edits_of(tuned).values()])
        assert 0 < int((changes != 0).sum()) <= int(0.01 * len(changes))
    finally:
        tuned.remove()


def _mask(changes, chosen):
    mask = torch.zeros(len(changes), dtype=torch.bool)
    mask[chosen] = True
    return mask


def test_gates_have_their_own_learning_rate(model):
    tuned = adapters.get(model, "diff_pruning", layers=[0])
    try:
        weights, gates = tuned.method.groups(tuned.model, 1e-3, 0.1)
        assert (weights["lr"], gates["lr"], gates["weight_decay"]) == (1e-3, 0.1, 0.0)
        given = {id(p) for group in (weights, gates) for p in group["params"]}
        assert given == {id(p) for p in tuned.trainable().values()}
    finally:
        tuned.remove()


@pytest.mark.parametrize("settings", [{"kept": 0.0}, {"prune_at": 1.5}])
def test_shares_are_shares(settings):
    with pytest.raises(InputError, match="it is a share"):
        DiffPruning(**settings)
