"""Steering is what it says: the right tokens, the right change, and nothing left behind."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerkit import HookedModel
from steerkit.errors import CheckpointError, InputError, NumericsError, SiteError
from steerkit.steering import (
    Add,
    AddMatrix,
    Clamp,
    Condition,
    Custom,
    Decay,
    LowRank,
    Project,
    Rotate,
    SteeringVector,
    WeightDelta,
    Where,
    Window,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.families import CAUSAL, build

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


def vector_of(model, scale=1.0, site=SITE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector.add({site: scale * torch.randn(model.d_model, generator=generator)})


def every_edit(model):
    generator = torch.Generator().manual_seed(1)
    d = model.d_model

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q = torch.linalg.qr(normal(d, 3))[0].T
    module = next(
        n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear) and "layers.1" in n
    )
    linear = model.model.get_submodule(module)
    return [
        Add(SITE, normal(d)),
        AddMatrix(SITE, normal(3, d)),
        Project.out(SITE, normal(2, d)),
        Clamp(SITE, normal(d), 2.0),
        Rotate(SITE, q[:2].contiguous(), 0.7),
        LowRank(SITE, q, normal(3, d) / d**0.5, normal(3)),
        WeightDelta(module, normal(2, linear.in_features) / 8, normal(linear.out_features, 2) / 8),
    ]


EDITS = ["add", "add_matrix", "project", "clamp", "rotate", "low_rank", "weight_delta"]
EACH_EDIT = pytest.mark.parametrize("kind", range(len(EDITS)), ids=EDITS)


def ids_of(model, text="The fox is happy. The red hat is beside the fox."):
    return torch.tensor([model.tokenizer(text)["input_ids"]])


def resid(model, ids, mask=None, site=SITE):
    with torch.no_grad():
        return model.run(ids, mask, sites=[site])[site]


def test_an_addition_adds_its_strength_times_the_vector_everywhere_but_at_bos(model):
    vector, ids = vector_of(model), ids_of(model)
    before = resid(model, ids)
    with model.steer(vector, strength=2.5):
        after = resid(model, ids)
    expected = before + 2.5 * vector.directions[SITE]
    expected[:, 0] = before[:, 0]
    torch.testing.assert_close(after, expected)
    assert int(ids[0, 0]) in model.special_ids


@EACH_EDIT
def test_an_edit_does_what_its_equation_says(model, kind):
    edit, ids = every_edit(model)[kind], ids_of(model)
    h, s = resid(model, ids).double(), 0.6
    with model.steer(SteeringVector((edit,)), strength=s, where=replace(Where(), bos=True)):
        steered = (model.logits(ids) if edit.of_module else resid(model, ids)).double()
    t = {name: tensor.double() for name, tensor in edit.tensors().items()}
    if edit.name == "add":
        expected = h + s * t["vector"]
    elif edit.name == "add_matrix":
        expected = h.clone()
        expected[:, 1:4] += s * t["matrix"]
    elif edit.name == "project":
        projector = (
            t["directions"].T @ torch.linalg.inv(t["directions"] @ t["directions"].T) @ t["directions"]
        )
        expected = h - s * h @ projector
    elif edit.name == "clamp":
        unit = t["direction"] / t["direction"].norm()
        assert torch.allclose(steered @ unit, (1 - s) * (h @ unit) + s * 2.0, atol=1e-4)
        expected = h + ((1 - s) * (h @ unit) + s * 2.0 - h @ unit)[..., None] * unit
    elif edit.name == "rotate":
        u, w = t["plane"]
        generator = torch.outer(w, u) - torch.outer(u, w)
        expected = h @ torch.linalg.matrix_exp(0.7 * s * generator).T
        torch.testing.assert_close(steered.norm(dim=-1), h.norm(dim=-1), rtol=1e-5, atol=1e-4)
    elif edit.name == "low_rank":
        expected = h + s * (h @ t["W"].T + t["b"]) @ t["R"]
    else:
        linear = model.model.get_submodule(edit.site)
        kept = linear.weight.detach().clone()
        with torch.no_grad():
            linear.weight += s * edit.B @ edit.A
            expected = model.logits(ids).double()
            linear.weight.copy_(kept)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)


@EACH_EDIT
def test_nothing_is_left_behind_also_after_an_error(model, kind):
    vector, ids = SteeringVector((every_edit(model)[kind],)), ids_of(model)
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    before, told = model.logits(ids), model.generate("The fox", max_new_tokens=8, do_sample=False)

    def fail():
        with model.steer(vector, strength=30.0):
            model.generate("The fox", max_new_tokens=4, do_sample=False)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert all(torch.equal(value, state[name]) for name, value in model.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    assert "generate" not in vars(model.model)
    assert torch.equal(model.logits(ids), before)
    assert model.generate("The fox", max_new_tokens=8, do_sample=False) == told


@EACH_EDIT
def test_strength_zero_changes_nothing(model, kind):
    vector, ids = SteeringVector((every_edit(model)[kind],)), ids_of(model)
    before = model.logits(ids)
    with model.steer(vector, strength=0.0):
        assert torch.equal(model.logits(ids), before)
    with model.steer(vector, strength=[0.0]):
        torch.testing.assert_close(model.logits(ids), before, rtol=0, atol=1e-5)


WHERES = {
    "everywhere": Where(),
    "prompt": Where.prompt_only(),
    "generation": Where.generation_only(),
    "positions": Where.positions(1, 3, -1, -2),
    "beyond the prompt": Where.spans((6, 9)),
    "f2+l2": Where.spans((0, 2), (-2, 0), generation=False),
    "from the last": Where.spans((-1, None)),
    "after": Where.after("fox"),
    "with bos": replace(Where(), bos=True),
    "decay": replace(Where(), schedule=Decay(2.0)),
    "window": replace(Where(), schedule=Window(2, 4)),
    "custom": replace(Where(), schedule=Custom(lambda step: 1.0 / (1 + step))),
}
PROMPTS = [
    "The fox met a red hen.",
    "One day a fox",
    "The happy fox was in the forest and it was raining there.",
]


def steered_tokens(model, prompts, where, use_cache, side="left", strength=1.0, **options):
    """Text generated greedily, and the strength that each token of each row was steered with, by position."""
    from steerkit.steering import vector as module

    found: list[dict] = [{} for _ in prompts]
    original = module._Application._edited

    def edited(self, edits, h, x):
        tokens = self.tracker.tokens
        weights = self._strength(tokens)
        if isinstance(weights, float):
            weights = torch.full((*tokens.position.shape, 1), weights)
        for row in range(len(prompts)):
            for column in range(h.shape[1]):
                if tokens.real[row, column]:
                    found[row][int(tokens.position[row, column])] = float(weights[row, column, 0])
        return original(self, edits, h, x)

    rows = [model.tokenizer(text)["input_ids"] for text in prompts]
    longest = max(map(len, rows))
    pad = [[model.pad_id] * (longest - len(row)) for row in rows]
    ids = torch.tensor([p + row if side == "left" else row + p for p, row in zip(pad, rows)])
    mask = torch.tensor(
        [
            [0] * len(p) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(p)
            for p, row in zip(pad, rows)
        ]
    )
    vector = vector_of(model, 0.3)
    with pytest.MonkeyPatch.context() as patch, model.steer(vector, strength=strength, where=where):
        patch.setattr(module._Application, "_edited", edited)
        out = model.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=model.pad_id,
            **options,
        )
    return out[:, longest:], found


@pytest.mark.parametrize("name", WHERES)
def test_the_same_tokens_are_steered_with_and_without_a_cache_in_any_batch(model, name):
    where = WHERES[name]
    cached, with_cache = steered_tokens(model, PROMPTS, where, True)
    plain, without = steered_tokens(model, PROMPTS, where, False)
    assert with_cache == without
    assert torch.equal(cached, plain)
    for row, prompt in enumerate(PROMPTS):
        alone, found = steered_tokens(model, [prompt], where, True)
        assert found[0] == with_cache[row]
        assert torch.equal(alone[0], cached[row])


def expected_weight(name, position, length):
    step = max(0, position - length + 1)
    if name == "positions":
        return float(position in (1, 3, length - 1, length - 2))
    if name == "beyond the prompt":
        return float(6 <= position < 9)
    if name == "f2+l2":
        return float(position < 2 or length - 2 <= position < length)
    if name == "from the last":
        return float(position >= length - 1)
    if name == "with bos":
        return 1.0
    if position == 0:
        return 0.0
    return {
        "everywhere": 1.0,
        "prompt": float(step == 0),
        "generation": float(step > 0),
        "decay": 0.5 ** (step / 2),
        "window": float(2 <= step < 4),
        "custom": 1 / (1 + step),
    }[name]


@pytest.mark.parametrize("name", [name for name in WHERES if name != "after"])
def test_the_tokens_that_are_steered_are_those_that_were_asked_for(model, name):
    _, found = steered_tokens(model, PROMPTS, WHERES[name], True)
    for row, prompt in enumerate(PROMPTS):
        length = len(model.tokenizer(prompt)["input_ids"])
        assert found[row].keys() == set(range(length + 5))
        for position, weight in found[row].items():
            assert weight == pytest.approx(expected_weight(name, position, length)), position


def test_after_a_marker_only_what_follows_its_last_occurrence(model):
    prompt = "The fox looks at the fox. There is a hat"
    ids = model.tokenizer(prompt)["input_ids"]
    fox = model.tokenizer("fox", add_special_tokens=False)["input_ids"]
    last = max(i for i, token in enumerate(ids) if [token] == fox)
    _, found = steered_tokens(model, [prompt], Where.after("fox"), True)
    assert {p for p, w in found[0].items() if w} == set(range(last + 1, len(ids) + 5))
    with (
        pytest.raises(InputError, match="does not occur in prompt 0"),
        model.steer(vector_of(model), where=Where.after("horse")),
    ):
        model.logits(torch.tensor([ids]))


def test_right_padding_in_a_plain_forward(model):
    rows = [model.tokenizer(text)["input_ids"] for text in PROMPTS]
    longest, vector = max(map(len, rows)), vector_of(model)
    ids = torch.tensor([row + [model.pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    for where in (Where(), Where.positions(-1), Where.spans((-3, None))):
        with model.steer(vector, strength=3.0, where=where):
            batched = model.logits(ids, mask)
            for i, row in enumerate(rows):
                alone = model.logits(torch.tensor([row]))
                torch.testing.assert_close(batched[i, : len(row)], alone[0], rtol=1e-4, atol=1e-4)


def test_prompt_lengths_part_a_whole_text_as_generation_would(model):
    prompt = model.tokenizer(PROMPTS[0])["input_ids"]
    vector, where = vector_of(model), Where.generation_only()
    with model.steer(vector, strength=2.0, where=where):
        out = model.model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True, min_new_tokens=6, pad_token_id=model.pad_id,
        )  # fmt: skip
    with model.steer(vector, strength=2.0, where=where, prompt_lengths=[len(prompt)]):
        whole = model.logits(out.sequences)
    torch.testing.assert_close(
        torch.stack(out.logits, 1)[0], whole[0, len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4
    )


def test_rows_have_their_own_strengths_also_as_beams_and_samples(model):
    ids = torch.cat([ids_of(model)] * 3)
    vector = vector_of(model)
    with model.steer(vector, strength=[0.0, 1.0, -2.0]):
        after = resid(model, ids)
    change = after - resid(model, ids)
    for row, strength in enumerate([0.0, 1.0, -2.0]):
        torch.testing.assert_close(
            change[row, 1:],
            strength * vector.directions[SITE].expand(ids.shape[1] - 1, -1),
            rtol=1e-4,
            atol=1e-4,
        )
    options = {
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
        "min_new_tokens": 6,
        "pad_token_id": model.pad_id,
    }
    with model.steer(vector, strength=[0.0, 2.0]):
        both = model.model.generate(input_ids=ids[:2], **options)
    for row, strength in enumerate([0.0, 2.0]):
        with model.steer(vector, strength=strength):
            assert torch.equal(model.model.generate(input_ids=ids[:1], **options)[0], both[row])
    with pytest.raises(InputError, match="2 strengths were given"), model.steer(vector, strength=[1.0, 2.0]):
        model.logits(ids)


def test_contexts_nest_and_vectors_of_different_rows_are_strengths_of_zero(model):
    ids, one, two = torch.cat([ids_of(model)] * 2), vector_of(model), vector_of(model, seed=5)
    with model.steer(one, strength=[1.0, 0.0]), model.steer(two, strength=[0.0, 1.0]):
        both = resid(model, ids)
    for row, vector in enumerate((one, two)):
        with model.steer(vector):
            torch.testing.assert_close(both[row], resid(model, ids)[row])


def test_edits_at_a_site_act_in_their_order(model):
    d, ids = model.d_model, ids_of(model)
    v = torch.randn(d, generator=torch.Generator().manual_seed(3))
    add, out = SteeringVector.add({SITE: v}), SteeringVector((Project.out(SITE, v),))
    unit = v / v.norm()
    with model.steer(add + out):
        assert float((resid(model, ids)[:, 1:] @ unit).abs().max()) < 1e-3
    with model.steer(out + add):
        torch.testing.assert_close(
            resid(model, ids)[:, 1:] @ unit, v.norm().expand(1, ids.shape[1] - 1), rtol=1e-3, atol=1e-3
        )


def test_a_condition_decides_for_each_text_once(model):
    texts = ["Anna is an angry bear.", "There is a brown hat beside the horse."]
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    site = "blocks.0.hook_resid_post"
    means = torch.stack([resid(model, torch.tensor([row]), site=site)[0, 1:].mean(0) for row in rows])
    direction = means[0] - means[1]
    cosines = torch.cosine_similarity(means, direction[None])
    condition = Condition(site, direction, float(cosines.mean()))
    vector = replace(vector_of(model, 3.0), condition=condition)
    plain = [model.generate(text, max_new_tokens=8, do_sample=False) for text in texts]
    with model.steer(replace(vector, condition=None)):
        always = [model.generate(text, max_new_tokens=8, do_sample=False) for text in texts]
    for batch in ([0, 1], [1, 0], [0], [1]):
        with model.steer(vector):
            told = model.generate([texts[i] for i in batch], max_new_tokens=8, do_sample=False)
        assert told == [always[i] if i == 0 else plain[i] for i in batch]
    assert all(steered != unsteered for steered, unsteered in zip(always, plain))


@pytest.mark.parametrize("family", CAUSAL)
def test_every_causal_family_with_and_without_a_cache(family):
    model = HookedModel.from_pretrained(build(family))
    vector = vector_of(model, 2.0)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 11, 12, 13, 14]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for where in (Where(), Where.generation_only(), Where.positions(2, -1)):
        with model.steer(vector, where=where):
            told = [
                model.model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **options)
                for cache in (True, False)
            ]
        assert torch.equal(*told)
    with torch.inference_mode():
        plain = model.logits(ids, mask)
        with model.steer(vector, strength=50.0):
            assert float((model.logits(ids, mask) - plain)[mask.bool()].abs().max()) > 1e-3
        assert torch.equal(model.logits(ids, mask), plain)


def test_a_marker_is_looked_for_in_the_prompt_only(model):
    marker = model.tokenizer("Anna", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([model.tokenizer("Anna is happy. Anna is happy.")["input_ids"]])
    vector, half = vector_of(model, 5.0), ids.shape[1] // 2
    with torch.inference_mode():
        with model.steer(vector, where=Where.after(marker), prompt_lengths=[half]):
            of_prompt = model.logits(ids)
        with model.steer(vector, where=Where.spans((2, None))):
            by_place = model.logits(ids)
    torch.testing.assert_close(of_prompt, by_place)


def test_arithmetic(model):
    a, b = vector_of(model), vector_of(model, seed=1)
    c = vector_of(model, site="blocks.2.hook_resid_post")
    combined = 2 * a - b / 4 + c
    torch.testing.assert_close(combined.directions[SITE], 2 * a.directions[SITE] - b.directions[SITE] / 4)
    assert combined.sites == (SITE, "blocks.2.hook_resid_post")
    assert a.cosine(3 * a) == pytest.approx(1)
    assert a.cosine(-a) == pytest.approx(-1)
    assert a.cosine(c) == 0
    assert a.unit().norm == pytest.approx(1)
    x, y = every_edit(model)[6], every_edit(model)[6]
    y = WeightDelta(y.site, y.A * 0.5 + 0.1, y.B - 0.2)
    dense = [
        float((p.double() * q.double()).sum())
        for p, q in ((x.B @ x.A, y.B @ y.A), (x.B @ x.A, x.B @ x.A), (y.B @ y.A, y.B @ y.A))
    ]
    cosine = SteeringVector((x,)).cosine(SteeringVector((y,)))
    assert cosine == pytest.approx(dense[0] / (dense[1] * dense[2]) ** 0.5, rel=1e-5)
    with pytest.raises(InputError, match="zero"):
        (a - a).unit()


def test_a_file_holds_everything(model, tmp_path):
    vector = SteeringVector(
        tuple(every_edit(model)),
        {"model": "storyworld", "fingerprint": model.fingerprint, "method": "test", "seed": 3},
        replace(Where.spans((0, 7), (-7, 0), generation=False), schedule=Decay(3.0)),
        Condition("blocks.0.hook_resid_post", torch.randn(model.d_model), 0.25, above=False),
    )
    found = SteeringVector.load((2 * vector).save(tmp_path / "new" / "v.safetensors"))
    assert found.provenance == vector.provenance
    assert found.where == vector.where
    assert torch.equal(found.condition.vector, vector.condition.vector)
    assert (found.condition.site, found.condition.threshold, found.condition.above) == (
        "blocks.0.hook_resid_post",
        0.25,
        False,
    )
    for own, other in zip((2 * vector).edits, found.edits):
        assert type(own) is type(other)
        assert own.settings() == other.settings()
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in own.tensors().items())
    with pytest.raises(InputError, match="cannot be saved"):
        replace(vector, where=WHERES["custom"]).save(tmp_path / "x")


def test_bad_files_are_refused(model, tmp_path):
    path = vector_of(model).save(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        SteeringVector.load(tmp_path / "none")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        SteeringVector.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="no steering vector of steerkit"):
        SteeringVector.load(path)


def test_bad_use_is_refused_with_a_clear_line(model):
    wide = SteeringVector.add({SITE: torch.randn(7)}, model="other")
    with (
        pytest.raises(InputError, match=r"7 wide at .* storyworld is 128 wide there: it was made for other"),
        model.steer(wide),
    ):
        pass
    stranger = replace(vector_of(model), provenance={"model": "gpt2", "fingerprint": "beef"})
    with pytest.raises(InputError, match="made for gpt2, and this is storyworld"), model.steer(stranger):
        pass
    with model.steer(stranger, other_model=True):
        pass
    with (
        pytest.raises(SiteError, match="does not exist"),
        model.steer(vector_of(model, site="blocks.9.hook_resid_post")),
    ):
        pass
    with pytest.raises(NumericsError, match="NaN or inf"):
        SteeringVector.add({SITE: torch.full((128,), torch.nan)})
    with (
        pytest.raises(InputError, match="must be finite"),
        model.steer(vector_of(model), strength=float("inf")),
    ):
        pass
    with pytest.raises(InputError, match="at least one edit"):
        SteeringVector(())
    with pytest.raises(InputError, match="nothing is left to do"):
        Where(prompt=False, generation=False)
    with (
        pytest.raises(InputError, match="does not know the marker 'hen'"),
        model.steer(vector_of(model), where=Where.after("hen")),
    ):
        pass
    with pytest.raises(InputError, match="zero or linearly dependent"):
        Project.out(SITE, torch.ones(2, 128))
