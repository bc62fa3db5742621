"""Trained steering methods: they learn what they should, and leave nothing behind."""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerkit import HookedModel, steering
from steerkit.errors import InputError, NumericsError
from steerkit.finetune import (
    DRRho,
    Example,
    OptimiseConfig,
    all_log_probs,
    cross_entropy,
    encode_texts,
    frozen,
    log_probs,
    optimise,
    with_reference,
)
from steerkit.steering.conditions import best_threshold
from steerkit.steering.methods.below import Below
from steerkit.steering.methods.learning import (
    PairExample,
    encode_pairs,
    preference,
    sides_of,
    steered_log_probs,
    with_margins,
    with_references,
)
from steerkit.steering.methods.reft import KINDS, _Part, orthonormal
from steerkit.steering.reading import collect_pairs

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.families import build

SITE = "blocks.2.hook_resid_post"
QUICK = {"lr": 0.02, "epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def storyworld():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def pairs():
    return steering.load_pairs("storyworld:mood=happy", n=64)


def mean_gap(model, pairs, vector, strength):
    """Mean over pairs of log p(positive) - log p(negative), from where they differ."""
    examples = encode_pairs(model, pairs)
    sides = [e.positive for e in examples] + [e.negative for e in examples]
    with torch.inference_mode():
        found = steered_log_probs(model, vector, sides, strength)
    positive, negative = found.chunk(2)
    return float((positive - negative).mean())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bipo", {"lr": 0.1, "epochs": 4, "batch_size": 8}),
        ("reft", QUICK),
        ("reft", {**QUICK, "objective": "preference", "kind": "direft"}),
        ("weight_arithmetic", {"lr": 2e-3, "epochs": 1, "batch_size": 8, "rank": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("objective", ""),
)
def test_training_moves_held_out_pairs_both_ways(storyworld, pairs, method, settings):
    before = {name: value.clone() for name, value in storyworld.model.state_dict().items()}
    flags = [p.requires_grad for p in storyworld.model.parameters()]
    vector = steering.fit(storyworld, pairs[:48], method=method, site=SITE, **settings)
    test = pairs[48:]
    base, up = (mean_gap(storyworld, test, vector, s) for s in (0.0, 1.0))
    assert up > base + 0.2
    if method in ("bipo", "weight_arithmetic"):
        assert mean_gap(storyworld, test, vector, -1.0) < base - 0.1
    assert all(torch.equal(before[name], value) for name, value in storyworld.model.state_dict().items())
    assert [p.requires_grad for p in storyworld.model.parameters()] == flags
    assert not any(tensor.requires_grad for edit in vector.edits for tensor in edit.tensors().values())
    assert vector.provenance["settings"]["batch_size"] == 8


def test_the_preference_loss_is_its_equation(storyworld, pairs):
    examples = with_references(storyworld, encode_pairs(storyworld, pairs[:6]))
    width = storyworld.site(SITE).width
    vector = steering.SteeringVector.add(
        {SITE: torch.randn(width, generator=torch.Generator().manual_seed(0))}
    )
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    with torch.inference_mode():
        found = preference(storyworld, lambda: vector, examples, beta=0.3, signs=signs)
        by_hand = []
        for example, sign in zip(examples, signs.tolist()):
            sides = []
            for side in (example.positive, example.negative):
                ids = torch.tensor([side.ids])
                base = storyworld.logits(ids).log_softmax(-1)
                with storyworld.steer(vector, strength=sign):
                    steered = storyworld.logits(ids).log_softmax(-1)
                places = range(side.start, len(side.ids))
                sides.append(
                    sum(float(steered[0, i - 1, side.ids[i]] - base[0, i - 1, side.ids[i]]) for i in places)
                )
            by_hand.append(-math.log(1 / (1 + math.exp(-0.3 * sign * (sides[0] - sides[1])))))
    assert float(found) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


def test_the_likelihood_is_that_of_the_sides_that_the_signs_ask_for(storyworld, pairs):
    examples = with_references(storyworld, encode_pairs(storyworld, pairs[:3]))
    signs = torch.tensor([1.0, -1.0, 1.0])
    vector = steering.SteeringVector.add({SITE: torch.full((storyworld.d_model,), 0.1)})
    with torch.inference_mode():
        plain, both = (
            preference(storyworld, lambda: vector, examples, beta=0.3, signs=signs, likelihood=weight)
            for weight in (0.0, 2.0)
        )
        sides = [e.positive if sign > 0 else e.negative for e, sign in zip(examples, signs)]
        found = steered_log_probs(storyworld, vector, sides, signs)
    lengths = torch.tensor([len(side) - side.start for side in sides])
    torch.testing.assert_close(both - plain, -2 * (found / lengths).mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_reft_parts_are_their_equations(kind):
    generator = torch.Generator().manual_seed(0)
    part = _Part(kind, 3, 16, generator)
    with torch.no_grad():
        for tensor in (part.R, part.b, *([part.W] * part.W.requires_grad)):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        R, read, b = part()
        h = torch.randn(5, 16, generator=generator)
        edited = steering.LowRank("site", R, read, b).apply(h[None], 1.0, None, None)[0]
        if kind in ("loreft", "consreft", "lobireft"):
            torch.testing.assert_close(R @ R.T, torch.eye(3), atol=1e-5, rtol=0)
        wanted = {
            "loreft": h + (h @ part.W.T + b - h @ R.T) @ R,
            "noreft": h + (h @ part.W.T + b - h @ R.T) @ R,
            "direft": h + (h @ part.W.T + b) @ R,
            "consreft": h + (b - h @ R.T) @ R,
            "lobireft": h + b @ R,
        }[kind]
        torch.testing.assert_close(edited, wanted)


def test_reft_starts_as_the_identity_but_for_consreft():
    h = torch.randn(1, 4, 16)
    for kind in KINDS:
        with torch.no_grad():
            edit = steering.LowRank("site", *_Part(kind, 2, 16, torch.Generator().manual_seed(1))())
        same = torch.allclose(edit.apply(h, 1.0, None, None), h, atol=1e-6)
        assert same == (kind != "consreft")


def test_orthonormal_keeps_what_is_orthonormal():
    rows = torch.linalg.qr(torch.randn(16, 4)).Q.T
    torch.testing.assert_close(orthonormal(rows), rows)


def test_log_probs_count_from_the_start_and_no_pads(storyworld):
    ids = [
        tuple(storyworld.tokenizer(text)["input_ids"])
        for text in ("Anna is happy.", "The fox is in the garden.")
    ]
    examples = [Example(ids[0], 2), Example(ids[1], 1)]
    with torch.inference_mode():
        together = log_probs(storyworld, examples)
        for example, found in zip(examples, together):
            logits = storyworld.logits(torch.tensor([example.ids])).log_softmax(-1)
            by_hand = sum(float(logits[0, i - 1, example.ids[i]]) for i in range(example.start, len(example)))
            assert float(found) == pytest.approx(by_hand, rel=1e-4)
    torch.testing.assert_close(all_log_probs(storyworld, examples, batch_tokens=1), together.cpu())


def test_weight_arithmetic_is_a_difference_of_fine_tunes(storyworld, pairs):
    settings = {"rank": 2, "lr": 2e-3, "epochs": 0.5, "batch_size": 8}
    both = steering.fit(storyworld, pairs[:16], method="weight_arithmetic", **settings)
    positive = steering.fit(storyworld, pairs[:16], method="weight_arithmetic", **settings, contrast=False)
    negative = steering.fit(
        storyworld,
        pairs[:16].swapped(),
        method="weight_arithmetic",
        **settings,
        contrast=False,
    )
    for joint, plus, minus in zip(both.edits, positive.edits, negative.edits):
        torch.testing.assert_close(
            joint.B @ joint.A, plus.B @ plus.A - minus.B @ minus.A, atol=1e-5, rtol=1e-3
        )
    assert (positive - negative).cosine(both) == pytest.approx(1.0, abs=1e-3)


def test_drrho_weights_are_their_equation_and_the_plain_mean_in_the_limit(storyworld):
    examples = with_reference(
        storyworld, encode_texts(storyworld, ["Anna is happy.", "Tom is in the garden."])
    )
    losses = torch.tensor([2.0, 1.0], requires_grad=True)
    reference = torch.tensor([-e.reference / (len(e) - 1) for e in examples])
    weigh = DRRho(tau=0.5, gamma=0.25)
    excess = (losses.detach() - reference) / 0.5
    torch.testing.assert_close(weigh.weights(losses, examples), 2 * excess.softmax(0))
    later = torch.tensor([0.5, 3.0])
    u = 0.75 * excess.exp().mean() + 0.25 * ((later - reference) / 0.5).exp().mean()
    torch.testing.assert_close(weigh.weights(later, examples), ((later - reference) / 0.5).exp() / u)
    torch.testing.assert_close(DRRho(tau=1e6)(losses, examples), losses.mean(), rtol=1e-4, atol=0)
    DRRho(tau=0.5)(losses, examples).backward()
    torch.testing.assert_close(losses.grad, excess.softmax(0))  # no gradient through the weights
    with pytest.raises(InputError, match="log-probability under a reference model"):
        DRRho()(losses, [Example((1, 2, 3)), Example((1, 2, 3))])
    with pytest.raises(InputError, match="tau"):
        DRRho(tau=0.0)


@pytest.fixture(scope="module")
def reference(storyworld):
    """Another model of the same tokens."""
    other = copy.deepcopy(storyworld.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return HookedModel.from_pretrained(other, tokenizer=storyworld.tokenizer)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bipo", {}),
        ("reft", {}),
        ("reft", {"objective": "preference"}),
        ("reft_r1", {}),
        ("weight_arithmetic", {"rank": 2}),
    ],
)
def test_every_trained_method_weighs_by_a_reference(storyworld, reference, pairs, method, settings):
    def fit(**more):
        vector = steering.fit(
            storyworld, pairs[:8], method, SITE, **{**QUICK, "batch_size": 4, **settings, **more}
        )
        return torch.cat([t.flatten() for edit in vector.edits for t in edit.tensors().values()]), vector

    plain, _ = fit()
    everywhere_alike, _ = fit(reference=reference, tau=math.inf)
    weighed, vector = fit(reference=reference, tau=0.1)
    assert (everywhere_alike - plain).norm() < 1e-4 * plain.norm()  # rounding
    assert (weighed - plain).norm() > 1e-3 * plain.norm()
    assert vector.provenance["settings"]["reference"] == reference.name
    assert vector.provenance["settings"]["tau"] == 0.1


def test_preferences_are_weighed_by_their_excess_in_both_directions(storyworld, reference, pairs):
    examples = with_margins(reference, with_references(storyworld, encode_pairs(storyworld, pairs[:4])))
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    v = torch.full((storyworld.d_model,), 0.05, requires_grad=True)

    def loss(batch, signs, weigh=None):
        with frozen(storyworld):
            return preference(
                storyworld,
                lambda: steering.SteeringVector.add({SITE: v}),
                batch,
                beta=0.3,
                signs=signs,
                weigh=weigh,
            )

    each = [loss([e], signs[i : i + 1]) for i, e in enumerate(examples)]
    theirs = torch.tensor([e.positive.reference - e.negative.reference for e in examples])
    judged = with_references(reference, examples)
    margins = torch.tensor([e.positive.reference - e.negative.reference for e in judged]) - theirs
    reached = -torch.nn.functional.logsigmoid(0.3 * margins)
    weights = 4 * ((torch.stack(each).detach() - reached) / 0.7).softmax(0)
    expected = torch.autograd.grad((weights * torch.stack(each)).mean(), v)[0]
    found = torch.autograd.grad(loss(examples, signs, DRRho(0.7)), v)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)  # no gradient through the weights


def test_a_reference_that_cannot_judge_is_refused(storyworld, pairs):
    other = HookedModel.from_pretrained(build("gpt2"))
    with pytest.raises(InputError, match="does not predict the 493 tokens"):
        steering.fit(storyworld, pairs[:4], "bipo", SITE, reference=other)
    with pytest.raises(InputError, match="takes no reference"):
        steering.fit(storyworld, pairs[:4], "antipasto", SITE, reference=other)


def test_the_loop_refuses_what_it_cannot_do(storyworld, pairs):
    v = torch.zeros(2, requires_grad=True)
    with pytest.raises(InputError, match="no examples"):
        optimise([v], [], lambda batch: v.sum(), OptimiseConfig())
    examples = [Example((1, 2, 3))] * 4
    with pytest.raises(NumericsError, match="loss is nan at step 0"):
        optimise([v], examples, lambda batch: (v / 0.0).sum() * 0.0, OptimiseConfig())
    assert torch.equal(v.detach(), torch.zeros(2))
    for settings in ({"lr": 0.0}, {"epochs": -1}, {"schedule": "steep"}, {"warmup": 2.0}):
        with pytest.raises(InputError, match=next(iter(settings))):
            OptimiseConfig(**settings)
    with pytest.raises(InputError, match="kind is 'lora'"):
        steering.fit(storyworld, pairs, method="reft", kind="lora")
    with pytest.raises(InputError, match="beginning of the other"):
        steering.fit(storyworld, [("Anna is", "Anna is happy")], method="bipo")
    with pytest.raises(InputError, match="rank is 1000"):
        steering.fit(storyworld, pairs[:4], method="reft", rank=1000)


def test_the_loop_sees_every_example_once_an_epoch_and_is_determined_by_the_seed():
    seen = []
    examples = [Example((1,) * (2 + i % 5)) for i in range(23)]
    v = torch.zeros(1, requires_grad=True)

    def loss(batch):
        seen.extend(id(e) for e in batch)
        return (v - len(batch)).square().sum()

    optimise([v], examples, loss, OptimiseConfig(epochs=1, batch_size=5))
    assert sorted(seen) == sorted(map(id, examples))
    first, seen = seen, []
    optimise([v], examples, loss, OptimiseConfig(epochs=1, batch_size=5))
    assert seen == first


def test_frozen_gives_flags_and_modes_back_after_an_error(storyworld):
    parameter = next(storyworld.model.parameters())
    storyworld.model.train()
    with pytest.raises(InputError), frozen(storyworld):
        encode_texts(storyworld, [""])
    with frozen(storyworld):
        assert not parameter.requires_grad
        assert not storyworld.model.training
    assert parameter.requires_grad
    assert storyworld.model.training
    storyworld.model.eval()


def test_cross_entropy_is_nats_a_counted_token(storyworld):
    examples = encode_texts(storyworld, ["Anna is happy.", "Tom is in the big garden."])
    with torch.inference_mode():
        found = cross_entropy(storyworld, examples)
        by_hand = [-float(p) / (len(e) - 1) for p, e in zip(log_probs(storyworld, examples), examples)]
    assert float(found) == pytest.approx(sum(by_hand) / 2, rel=1e-5)


def test_reft_r1_finds_what_mean_difference_finds_and_is_of_unit_direction(storyworld, pairs):
    vector = steering.fit(storyworld, pairs, method="reft_r1", site=SITE, epochs=2)
    largest = vector.provenance["max_activation"][SITE]
    assert vector.norm == pytest.approx(largest, rel=1e-4)
    test = pairs[48:]
    assert mean_gap(storyworld, test, vector, 0.5) > mean_gap(storyworld, test, vector, 0.0)


def test_the_unembedding_direction_boosts_the_words_of_the_positive_sides(storyworld, pairs):
    last = f"blocks.{storyworld.n_layers - 1}.hook_resid_post"
    vector = steering.fit(storyworld, pairs, method="unembedding", site=last)
    boosted = (vector.directions[last] @ storyworld.W_U.detach().float()).topk(12).indices
    words = {word.strip() for word in storyworld.tokenizer.convert_ids_to_tokens(boosted.tolist())}
    assert words & {
        "happy",
        "glad",
        "cheerful",
        "joyful",
        "merrily",
        "happily",
        "smiled",
        "delighted",
        "laughed",
        "jolly",
    }
    with pytest.raises(InputError, match="384 wide"):
        steering.fit(storyworld, pairs, method="unembedding", site="blocks.1.mlp.hook_post")


def test_iti_moves_the_heads_that_tell_the_sides_apart(storyworld, pairs):
    vector = steering.fit(storyworld, pairs, method="iti", heads=3)
    heads = vector.provenance["heads"]
    assert len(heads) == 3
    assert heads == sorted(heads, key=lambda head: -head["accuracy"])
    n = storyworld.n_heads
    moved = {
        (site, head)
        for site, v in vector.directions.items()
        for head, part in enumerate(v.unflatten(0, (n, -1)))
        if part.any()
    }
    assert moved == {(head["site"], head["head"]) for head in heads}
    sides = collect_pairs(storyworld, pairs, [heads[0]["site"]])[heads[0]["site"]]
    one = [side.unflatten(1, (n, -1))[:, heads[0]["head"]] for side in sides]
    shift = one[0].mean(0) - one[1].mean(0)
    unit = shift / shift.norm()
    expected = (torch.cat(one) @ unit).std() * unit
    torch.testing.assert_close(
        vector.directions[heads[0]["site"]].unflatten(0, (n, -1))[heads[0]["head"]], expected
    )
    for settings, message in (({"heads": 1000}, "heads is 1000"), ({"heads": 0}, "heads is 0")):
        with pytest.raises(InputError, match=message):
            steering.fit(storyworld, pairs, method="iti", **settings)


def test_a_condition_steers_only_what_it_finds(storyworld):
    pairs = steering.load_pairs("storyworld:tense=past", n=60)
    condition, score = steering.fit_condition(storyworld, pairs[:40])
    assert score > 0.9
    vector = replace(
        steering.SteeringVector.add({SITE: 5 * torch.ones(storyworld.d_model)}), condition=condition
    )
    right = 0
    for pair in pairs[40:]:
        for text, wanted in ((pair.positive, True), (pair.negative, False)):
            ids = torch.tensor([storyworld.tokenizer(text)["input_ids"]])
            with torch.inference_mode():
                plain = storyworld.logits(ids)
                with storyworld.steer(vector):
                    right += (not torch.equal(storyworld.logits(ids), plain)) == wanted
    assert right >= 34
    with pytest.raises(InputError, match="6 or more"):
        steering.fit_condition(storyworld, pairs[:4])


def test_the_best_threshold_is_that_of_all(storyworld):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels = torch.rand(13, generator=generator) < 0.5
        scores = torch.randint(0, 6, (13,), generator=generator).float() + labels
        threshold, found = best_threshold(scores, labels)

        def f1(cut, scores=scores, labels=labels):
            said = scores > cut
            return 2 * float((said & labels).sum()) / max(1.0, float(said.sum() + labels.sum()))

        assert f1(threshold) == pytest.approx(found)
        if labels.any():
            assert found == pytest.approx(max(f1(cut - 0.5) for cut in range(-1, 9)))


@pytest.mark.parametrize("family", ["storyworld", "gpt2", "llama", "neox", "opt"])
def test_blocks_below_are_left_out_without_a_trace_in_losses_and_gradients(family, storyworld):
    model = storyworld if family == "storyworld" else HookedModel.from_pretrained(build(family))
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(5, min(60, model.d_vocab), (n,), generator=generator).tolist() for n in (9, 12, 9, 7)
    ]
    examples = [Example(tuple(row), 3) for row in rows]
    batch = [
        PairExample(a, b)
        for a, b in zip(with_reference(model, examples[:2]), with_reference(model, examples[2:]))
    ]
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    site = f"blocks.{model.n_layers - 1}.hook_resid_mid"
    if site not in model.sites or not model.sites[site].verified:
        site = f"blocks.{model.n_layers - 1}.hook_resid_post"
    found = {}
    for below in (None, Below.of(model, sides_of(batch), [site])):
        v = torch.full((model.d_model,), 0.1, requires_grad=True)
        with frozen(model):
            loss = preference(
                model, lambda v=v: steering.SteeringVector.add({site: v}), batch, beta=0.5, below=below
            )
            loss.backward()
        found[below is None] = (loss.detach(), v.grad)
    assert below is not None or family not in ("storyworld", "llama")
    for one, other in zip(found[True], found[False]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(state[name], value) for name, value in model.model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_what_cannot_be_left_out_is_not(storyworld):
    examples = encode_texts(storyworld, ["Anna is happy."])
    assert Below.of(storyworld, examples, ["blocks.0.hook_resid_pre"]) is None
    assert Below.of(storyworld, examples, ["blocks.0.mlp.hook_post"]) is None
    assert Below.of(storyworld, examples, [SITE], memory=10) is None
    assert Below.of(storyworld, examples, ["blocks.1.hook_mlp_out", SITE]).site == "blocks.0.hook_resid_post"
    assert Below.of(storyworld, examples, [SITE]).site == SITE
