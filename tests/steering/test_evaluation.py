"""Evaluation without a judge: the divergence is exact, draws are fair and the same for all, and what is broken is called broken."""

import json
import math
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from steerkit import HookedModel, storyworld
from steerkit.errors import InputError
from steerkit.steering import (
    Bench,
    Condition,
    Decay,
    Propensity,
    Scored,
    SteeringVector,
    StoryAttribute,
    Where,
    Words,
    fit,
    load_pairs,
    story_prompts,
)
from steerkit.steering.effects import Rated, apply_effect, harmonic_mean
from steerkit.steering.evaluation import binary_kl, different, repeated, total_variation
from steerkit.steering.sampling import Draws, _generated, _stepwise, divergence, encode_prompts, sample
from steerkit.steering.story import tally

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.families import build

STORIES = Path(__file__).parents[2].parent / "shared/models/stories260k"
SITE = "blocks.1.hook_resid_post"
PROMPTS = ["Anna is a", "This is the story of Tom, a", "There was a", "On Monday, Tom walks to the"]
HAPPY = StoryAttribute("mood", "happy")
WHERES = {
    "everywhere": None,
    "prompt": Where.prompt_only(),
    "generation": Where.generation_only(),
    "decay": Where(schedule=Decay(half_life=2)),
    "last of the prompt": Where.positions(-1),
}


def words_tokenizer(n: int = 97) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w1", pad_token="w2", eos_token="w0")


@pytest.fixture(scope="module")
def story():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def llama():
    return HookedModel.from_pretrained(build("llama"), tokenizer=words_tokenizer())


@pytest.fixture(scope="module")
def gpt2():
    return HookedModel.from_pretrained(build("gpt2"), tokenizer=words_tokenizer())


KEYS = {
    "effect", "effect_ci", "effect_base", "kl", "kl_ci", "kl_per_token", "kl_p95", "perplexity_ratio", "repetition", "distinct_2",
    "side_effects", "grammaticality", "n",
}  # fmt: skip
CASES = ["story", "llama", "gpt2"]


@pytest.fixture(params=CASES)
def case(request):
    """(model, prompts of different lengths, a vector that does something)"""
    model = request.getfixturevalue(request.param)
    prompts = PROMPTS if request.param == "story" else ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14"]
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    length = 10.0 if request.param == "story" else 1.0
    return model, prompts, SteeringVector.add({SITE: length * direction / direction.norm()})


def log_probs(model, ids):
    with torch.no_grad():
        return model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)


# closed forms


@given(st.floats(0, 1), st.floats(0.01, 0.99))
def test_the_floor_is_the_divergence_of_two_coins(q, p):
    expected = sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)
    assert float(binary_kl(q, p)) == pytest.approx(expected, abs=1e-12)
    assert float(binary_kl(p, p)) == 0
    assert float(binary_kl(0.5, 0.0)) == math.inf


def test_repetition_and_distinct_n_by_hand():
    assert repeated("abcabc", 2) == (2, 5)  # ab bc ca ab bc
    assert repeated("aaaaaaaa", 4) == (4, 5)
    assert repeated("abc", 4) == (0, 0)
    assert different(["abab", "ba"], 2) == (2, 4)  # ab ba ab | ba
    assert different(["a"], 2) == (0, 0)


def test_total_variation_by_hand_and_its_null():
    own = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    base = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = total_variation(own, base)
    assert found.tv.estimate == pytest.approx(0.75 - 0.25)
    assert 0 < found.null < 0.5
    same = total_variation(own, own)
    assert (same.tv.estimate, same.null) == (0, 0)
    assert math.isnan(total_variation(own, 0 * own).tv.estimate)


# divergence


def test_of_one_token_it_is_the_divergence_of_the_next_token_distributions(case):
    model, prompts, vector = case
    found = Bench(model, prompts, Words({"w5"}), max_new_tokens=1, samples=2).measure(vector, 4.0)
    by_hand = []
    for prompt in prompts:
        ids = model.tokenizer(prompt)["input_ids"]
        base = log_probs(model, ids)[-1]
        with model.steer(vector, strength=4.0):
            steered = log_probs(model, ids)[-1]
        by_hand.append(float((steered.exp() * (steered - base)).sum()))
    assert found.kl.estimate == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert found.kl.estimate > 0.01
    assert found.kl_per_token.estimate == pytest.approx(found.kl.estimate)
    assert found.kl_p95.estimate == pytest.approx(max(by_hand), rel=1e-4)


class Forced(LogitsProcessor):
    """Makes `generate` write these tokens."""

    def __init__(self, tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        forced = torch.zeros_like(scores)
        forced[:, self.tokens[self.step]] = 1.0
        self.step += 1
        return forced


@pytest.mark.parametrize("where", WHERES.values(), ids=WHERES)
def test_the_distributions_are_those_that_generation_had(case, where):
    model, prompts, vector = case

    def steered(lengths):
        return model.steer(vector, strength=3.0, where=where, prompt_lengths=list(lengths))

    drawn = sample(model, encode_prompts(model, prompts), steered, samples=2, max_new_tokens=6, seed=4)
    scores = divergence(model, drawn, steered)
    for row, (prompt, new) in enumerate(zip(drawn.prompts, drawn.new)):
        with model.steer(vector, strength=3.0, where=where), torch.no_grad():
            out = model.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=len(new),
                logits_processor=LogitsProcessorList([Forced(new)]),
                do_sample=False,
                pad_token_id=model.pad_id,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert out.sequences[0, len(prompt) :].tolist() == list(new)
        own = torch.cat(out.logits).double().log_softmax(-1)
        base = log_probs(model, [*prompt, *new])[len(prompt) - 1 : -1]
        here = scores.row == row
        np.testing.assert_allclose(scores.kl[here], (own.exp() * (own - base)).sum(-1), rtol=1e-3, atol=1e-5)
        token = torch.tensor(new)[:, None]
        np.testing.assert_allclose(scores.own[here], own.gather(1, token)[:, 0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(scores.base[here], base.gather(1, token)[:, 0], rtol=1e-3, atol=1e-4)


def test_where_a_condition_fails_there_is_no_divergence(story):
    prompts = ["Anna is a happy girl. Anna smiles. She is a", "Tom is a sad fox. He weeps. Tom"]
    condition = fit(story, load_pairs("storyworld:mood=happy", n=100), site=SITE).directions[SITE]
    means = []
    for prompt in prompts:
        acts = story.activations([prompt], [SITE], drop_sinks=False)[SITE].mean(0)
        means.append(float(torch.cosine_similarity(acts, condition, dim=0)))
    assert means[0] > means[1]
    direction = torch.randn(story.d_model, generator=torch.Generator().manual_seed(3))
    vector = replace(
        SteeringVector.add({SITE: direction}), condition=Condition(SITE, condition, sum(means) / 2)
    )

    def steered(lengths):
        return story.steer(vector, strength=2.0, prompt_lengths=list(lengths))

    drawn = sample(story, encode_prompts(story, prompts), steered, samples=3, max_new_tokens=6)
    kl = np.bincount(divergence(story, drawn, steered).row, weights=divergence(story, drawn, steered).kl)
    assert (kl[:3] > 0.01).all()
    assert (kl[3:] < 1e-9).all()


def test_strength_zero_costs_nothing_and_draws_the_same_texts(case):
    model, prompts, vector = case
    bench = Bench(model, prompts, Words({"w5", "happy"}), max_new_tokens=8, samples=2)
    found = bench.measure(vector, 0.0)
    assert (found.kl.estimate, found.kl.high, found.kl_p95.estimate) == (0, 0, 0)
    assert found.texts == bench.base.texts
    assert found.effect == bench.base.effect == found.effect_base
    assert found.perplexity_ratio.estimate == 1
    assert (found.change.low, found.change.high) == (0, 0)


def test_sampled_log_ratios_agree_with_it(story):
    vector = fit(story, load_pairs("storyworld:mood=happy", n=100), site=SITE)

    def steered(lengths):
        return story.steer(vector, strength=24.0, prompt_lengths=list(lengths))

    prompts = encode_prompts(story, PROMPTS)
    drawn = sample(story, prompts, steered, samples=60, max_new_tokens=10)
    scores = divergence(story, drawn, steered)
    excess = np.bincount(scores.row, weights=scores.own - scores.base - scores.kl)
    assert np.bincount(scores.row, weights=scores.kl).mean() > 0.1
    assert abs(excess.mean()) < 3 * excess.std(ddof=1) / math.sqrt(len(excess))


def test_neither_batch_size_nor_padding_changes_it(case):
    model, prompts, vector = case
    effect = Words({"w5", "happy"})
    together, alone = (
        Bench(model, prompts, effect, max_new_tokens=6, samples=2, batch_size=size).measure(vector, 2.0)
        for size in (64, 1)
    )
    assert together.texts == alone.texts
    assert together.kl.estimate == pytest.approx(alone.kl.estimate, rel=1e-3)
    assert together.perplexity_ratio.estimate == pytest.approx(alone.perplexity_ratio.estimate, rel=1e-3)


def test_the_prompt_that_steers_is_compared_with_the_bare_one(story):
    found = Bench(story, PROMPTS, HAPPY, max_new_tokens=1).measure_prompted("Write a happy story.")
    by_hand = []
    for prompt in PROMPTS:
        own = log_probs(story, story.tokenizer(f"Write a happy story. {prompt}")["input_ids"])[-1]
        base = log_probs(story, story.tokenizer(prompt)["input_ids"])[-1]
        by_hand.append(float((own.exp() * (own - base)).sum()))
    assert found.kl.estimate == pytest.approx(np.mean(by_hand), rel=1e-3)


def test_any_context_can_be_measured(story):
    vector = SteeringVector.add({SITE: torch.ones(story.d_model) / 8})
    bench = Bench(story, PROMPTS, HAPPY, max_new_tokens=10)
    by_context = bench.measure_with(lambda: story.steer(vector, strength=2.0))
    assert by_context.to_dict() == bench.measure(vector, 2.0).to_dict()
    assert bench.measure_with(nullcontext).kl.estimate == 0


def test_an_adapter_is_measured_against_the_model_without_it():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(build("llama"), config)
    model = HookedModel.from_pretrained(tuned, tokenizer=words_tokenizer())
    tuned.base_model.disable_adapter_layers()

    @contextmanager
    def adapted():
        tuned.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            tuned.base_model.disable_adapter_layers()

    found = Bench(model, ["w5 w6", "w7"], Words({"w5"}), max_new_tokens=1).measure_with(adapted)
    by_hand = []
    for prompt in ("w5 w6", "w7"):
        ids = model.tokenizer(prompt)["input_ids"]
        base = log_probs(model, ids)[-1]
        with adapted():
            own = log_probs(model, ids)[-1]
        by_hand.append(float((own.exp() * (own - base)).sum()))
    assert found.kl.estimate == pytest.approx(np.mean(by_hand), rel=1e-3)
    assert found.kl.estimate > 0.01


def test_the_end_of_the_text_counts_and_nothing_after_it(story):
    (told,) = storyworld.sample(1, seed=5)
    prompt = "".join(told.tokens[:-3])[1:]
    bench = Bench(story, [prompt], HAPPY, samples=8, max_new_tokens=24)
    eos = story.tokenizer.eos_token_id
    drawn = sample(
        story, encode_prompts(story, [prompt]), lambda n: nullcontext(), samples=20, max_new_tokens=24
    )
    ended = [new for new in drawn.new if eos in new]
    assert len(ended) > 10
    assert all(new.index(eos) == len(new) - 1 for new in ended)
    assert bench.base.n_tokens < 8 * 24
    assert all("</s>" not in text for _, text in bench.base.texts)


# draws


def test_tokens_are_drawn_with_their_probabilities():
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(4000, 1)
    for temperature in (1.0, 0.5):
        draws = Draws([(1, i) for i in range(4000)], temperature, frozenset(), torch.device("cpu"))
        counts = draws(None, scores).argmax(-1).bincount(minlength=4) / 4000
        expected = (scores[0] / temperature).softmax(-1)
        assert ((counts - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()


def test_seeds_decide(story):
    bench = [Bench(story, PROMPTS, HAPPY, max_new_tokens=8, seed=seed).base for seed in (1, 1, 2)]
    assert bench[0].to_dict() == bench[1].to_dict()
    assert bench[0].texts == bench[1].texts != bench[2].texts
    assert len({text for _, text in bench[0].texts}) > len(PROMPTS)


def test_the_models_own_generation_settings_do_not_interfere(llama):
    plain = Bench(llama, ["w5 w6"], Words({"w5"}), max_new_tokens=12).base.texts
    settings = llama.model.generation_config
    try:
        settings.repetition_penalty, settings.top_k, settings.temperature, settings.do_sample = (
            1.8,
            2,
            0.1,
            True,
        )
        assert Bench(llama, ["w5 w6"], Words({"w5"}), max_new_tokens=12).base.texts == plain
    finally:
        settings.repetition_penalty = settings.top_k = settings.temperature = settings.do_sample = None


def test_without_the_models_own_generate_the_draws_are_the_same(case):
    model, prompts, vector = case
    ids = encode_prompts(model, prompts)
    found = []
    for way in (_generated, _stepwise):
        draws = Draws([(0, i) for i in range(len(ids))], 1.0, frozenset({0}), model.device)
        with model.steer(
            vector, strength=2.0, where=Where.generation_only(), prompt_lengths=[len(row) for row in ids]
        ):
            with torch.no_grad():
                rows = way(model, ids, draws, 6)
        found.append([row[: row.index(0)] if 0 in row else row for row in rows])
    assert found[0] == found[1]


# what is broken


@pytest.mark.parametrize("name", ["story", "gpt2"])
def test_numbers_beyond_all_bounds_are_reported(name, request):
    model = request.getfixturevalue(name)
    bench = Bench(model, PROMPTS if name == "story" else ["w5 w6", "w7"], Words({"happy"}), max_new_tokens=5)
    found = bench.measure(SteeringVector.add({SITE: 10 * torch.ones(model.d_model)}), 3e38)
    assert "NaN" in found.destroyed
    assert math.isnan(found.effect.estimate)
    assert math.isnan(found.kl.estimate)
    assert bench.base.destroyed is None
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["kl"] is None
    assert told["destroyed"] == found.destroyed
    assert told.keys() == bench.base.to_dict().keys()


def test_nothing_but_repetition_is_reported(story):
    last = f"blocks.{story.n_layers - 1}.hook_resid_post"
    token = story.tokenizer.convert_tokens_to_ids(" happy")
    vector = SteeringVector.add({last: story.W_U[:, token].detach()})
    found = Bench(story, PROMPTS, HAPPY, temperature=0.05).measure(vector, 1000.0)
    assert "repetition" in found.destroyed
    assert found.repetition.estimate == pytest.approx(36 / 37)
    assert found.kl.estimate > 20


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "Anna is"}, "list"),
        ({"effect": None}, "effect"),
        ({"effect": Scored(" ", lambda p, c: [])}, "effect"),
        ({"samples": 0}, "samples"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_settings(story, settings, said):
    with pytest.raises(InputError, match=said):
        Bench(story, **{"prompts": PROMPTS, "effect": HAPPY, **settings})


def test_bad_input(story):
    with pytest.raises(InputError, match="context"):
        Bench(story, PROMPTS, HAPPY, max_new_tokens=300).base  # noqa: B018
    with pytest.raises(InputError, match="no language-model head"):
        Bench(HookedModel.from_pretrained(build("llama").model, tokenizer=words_tokenizer()), ["w5"], HAPPY)
    with pytest.raises(InputError, match="tokenizer"):
        Bench(HookedModel.from_pretrained(build("llama")), ["w5"], HAPPY)
    with pytest.raises(InputError, match="numbers for"):
        Bench(story, PROMPTS, Scored("short", lambda p, c: [1.0]), max_new_tokens=2).base  # noqa: B018
    with pytest.raises(InputError, match="blank"):
        Bench(story, PROMPTS, HAPPY).measure_prompted(" ")
    with pytest.raises(InputError, match="binary"):
        apply_effect(Scored("loud", lambda p, c: [2.0], binary=True), ["a"], ["b"])


# effects


def test_a_story_attribute_is_what_most_words_of_the_continuation_say():
    texts = [" happy fox. Tom weeps sadly. Tom weeps sadly.", " happy fox.", " zzz zzz.", ""]
    assert HAPPY(["Tom is a"] * 4, texts).tolist() == [0, 1, 0, 0]
    sad = StoryAttribute("mood", "sad")
    assert sad(["Tom is a sad fox. Tom is a"], [" happy fox."]).tolist() == [0]  # the prompt does not count
    with pytest.raises(InputError, match="Did you mean 'mood'"):
        StoryAttribute("moood", "happy")
    with pytest.raises(InputError, match="Did you mean 'happy'"):
        StoryAttribute("mood", "hapy")
    with pytest.raises(InputError, match="voice"):
        StoryAttribute("voice", "speech")


def test_honesty_is_the_share_of_true_claims_after_the_prompt():
    (told,) = storyworld.sample(1, seed=11, cue="liar")
    marks = [i for i, token in enumerate(told.tokens) if token == "."]
    prompt = "".join(told.tokens[: marks[3] + 1])[1:]
    rest = told.text[len(prompt) :]
    claims = storyworld.Judge().judge(told.text).claims
    assert len(claims) >= 2
    assert all(claim.true is False for claim in claims)
    effects = [StoryAttribute("honesty", value) for value in ("truthful", "liar")]
    assert [effect([prompt], [rest])[0] for effect in effects] == [0, 1]
    assert math.isnan(effects[0]([told.text], [""])[0])


def test_words_are_whole_and_of_any_case():
    found = Words({"glad", "so so"})(
        ["", "", "", ""], ["I am GLAD.", "gladly", "it was so so, really", "so. so"]
    )
    assert found.tolist() == [1, 0, 1, 0]
    for blank in (set(), {" "}, "glad"):
        with pytest.raises(InputError):
            Words(blank)


def test_a_judges_ratings_become_their_harmonic_mean():
    ratings = [[2, 2, 2], [1, 2, 2], [0, 2, 2], [1, 1, 1]]
    np.testing.assert_allclose(harmonic_mean(ratings), [2, 1.5, 0, 1])
    np.testing.assert_allclose(Rated("AxBench", lambda p, c: ratings)([""] * 4, [""] * 4), [2, 1.5, 0, 1])
    for wrong in ([[3, 1, 1]], [1, 2], [[-1, 0]]):
        with pytest.raises(InputError):
            harmonic_mean(wrong)


# what is measured beside


def test_prompting_has_its_effect_at_no_less_than_the_floor(story):
    bench = Bench(story, story_prompts(story, "mood", "happy", 16), HAPPY, max_new_tokens=25)
    found = bench.measure_prompted("Tell a happy story in the past tense.")
    q, p = found.effect.estimate, bench.base.effect.estimate
    assert q > 0.8
    assert p < 0.4
    assert found.floor.estimate == pytest.approx(float(binary_kl(q, min(max(p, 0.5 / 64), 1 - 0.5 / 64))))
    assert found.cost.estimate == pytest.approx(found.kl.estimate - found.floor.estimate)
    assert found.change.estimate == pytest.approx(q - p)
    assert found.change.low > 0.3
    assert found.kl.estimate > found.floor.estimate > 0.5
    tense = found.side_effects["tense"]
    assert tense.tv.low > tense.null
    assert tense.tv.estimate > 3 * tense.null
    assert "mood" not in found.side_effects
    assert found.grammaticality.estimate > 0.9
    assert (
        found.consistency.estimate < bench.base.consistency.estimate
    )  # the prompts are in the present tense, too
    assert found.to_dict().keys() >= KEYS
    assert found.to_dict()["n"] == len(found.texts) == 64


def test_a_text_that_contradicts_its_prompt_is_not_consistent():
    prompt = "Tom is a happy fox. On Monday, Tom walks to the park in the wind. Tom"
    assert storyworld.Judge().judge(prompt).grammatical == 1
    texts = [
        " weeps sadly.",
        " smiles happily. On Tuesday, Tom walks to the park in the wind.",
        " smiles happily.",
    ]
    assert tally([prompt] * 3, texts).consistent.tolist() == [[0, 1], [0, 1], [1, 1]]
    assert tally([prompt] * 3, texts, meant="mood").consistent.tolist() == [[1, 1], [0, 1], [1, 1]]
    found = tally([prompt] * 2, [" smiles happily. Zzz zzz. Tom", ""])
    assert found.grammar.tolist() == [[1, 2], [0, 0]]
    assert found.values["mood"].sum(1).tolist() == [1, 0]


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the TinyStories Llama in {STORIES}")
def test_a_real_model_is_made_to_speak_of_dogs():
    model = HookedModel.from_pretrained(STORIES)
    nouns = [("dog", "tree"), ("puppy", "flower"), ("dog", "ball"), ("dog", "car")]
    texts = [
        (f"Once upon a time, there was a {a}. The {a}", f"Once upon a time, there was a {b}. The {b}")
        for a, b in nouns
    ]
    vector = fit(model, texts, site="blocks.3.hook_resid_post")
    prompts = ["One day, Tim and his", "Lily saw a big", "Once upon a time, there was a"]
    bench = Bench(model, prompts, Words({"dog", "puppy", "dogs"}), samples=8)
    found = bench.measure(vector, 2.0)
    assert found.change.low > 0.2
    assert found.kl.estimate > found.floor.estimate
    assert bench.base.perplexity_ratio.estimate == 1
    assert found.perplexity_ratio.estimate > 1
    assert found.side_effects == {}
    assert math.isnan(found.grammaticality.estimate)
    assert all(text[0] in " ,.'" or text[0].islower() for _, text in found.texts)


def test_unknown_samples_do_not_count(story):
    def known_when_long(prompts, continuations):
        return [1.0 if "a" in text else math.nan for text in continuations]

    found = Bench(story, PROMPTS, Scored("a", known_when_long, binary=True), max_new_tokens=3).base
    share = np.mean(["a" in text for _, text in found.texts])
    assert 0 < share < 1
    assert found.known == pytest.approx(share)
    assert found.effect.estimate == 1
    assert found.effect.low == pytest.approx(0.025 ** (1 / len({p for p, t in found.texts if "a" in t})))


def test_more_samples_of_the_same_prompts_do_not_make_certain(story):
    effect = Scored(
        "of the prompt", lambda prompts, texts: [float(prompt == PROMPTS[0]) for prompt in prompts]
    )
    few, many = (Bench(story, PROMPTS, effect, max_new_tokens=1, samples=n).base.effect for n in (2, 20))
    assert (few.low, few.high) == (many.low, many.high)
    assert few.high - few.low > 0.5


def test_one_prompt_has_figures_and_no_intervals(story):
    found = Bench(story, PROMPTS[:1], HAPPY, max_new_tokens=4).base
    assert found.kl.estimate == 0
    assert math.isnan(found.kl.low)


# propensity


@pytest.mark.parametrize("where", WHERES.values(), ids=WHERES)
def test_a_propensity_is_the_log_odds_of_the_two_sides(case, where):
    model, prompts, vector = case
    sides = ("happy fox.", "sad fox.") if model.name == "storyworld" else ("w20 w21", "w22")
    pairs = load_pairs([{"prompt": p, "positive": sides[0], "negative": sides[1]} for p in prompts])
    bench = Bench(model, prompts, Propensity(pairs, "log_odds"), max_new_tokens=2)
    found = bench.measure(vector, 3.0, where)
    odds, target = [], []
    for prompt in prompts:
        n = len(model.tokenizer(prompt)["input_ids"])
        log_p = []
        for side in sides:
            ids = model.tokenizer(f"{prompt} {side}")["input_ids"]
            with model.steer(vector, strength=3.0, where=where, prompt_lengths=[n]):
                table = log_probs(model, ids)
            log_p.append(float(sum(table[i - 1, ids[i]] for i in range(n, len(ids)))))
        odds.append(log_p[0] - log_p[1])
        target.append(log_p[0])
    assert found.effect.estimate == pytest.approx(np.mean(odds), abs=1e-4)
    assert found.propensity["log_prob"].estimate == pytest.approx(np.mean(target), abs=1e-4)
    assert found.propensity["preferred"].estimate == np.mean([o > 0 for o in odds])
    assert found.effect_base.estimate != found.effect.estimate
    assert math.isnan(found.floor.estimate)


def test_a_propensity_without_prompts_and_with_a_prefix(story):
    pairs = load_pairs("storyworld:mood=happy", n=6)
    preferences = Propensity(pairs).measure(story)
    ids = story.tokenizer(pairs[2].positive)["input_ids"]
    by_hand = float(log_probs(story, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum())
    assert preferences.positive[2] == pytest.approx(by_hand, abs=1e-3)
    prefixed = Propensity(pairs).measure(story, prefix="Write a happy story.")
    assert (prefixed.positive - prefixed.negative > 0).all()
    with pytest.raises(InputError, match="Did you mean 'log_odds'"):
        Propensity(pairs, "logodds")


# prompts


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("mood", "happy"), ("honesty", "truthful"), ("honesty", "liar"), ("tense", "past")],
)
def test_story_prompts_seldom_lead_to_the_value_by_themselves(story, attribute, value):
    most = 0.5 if attribute == "tense" else 0.35
    prompts = story_prompts(story, attribute, value, 12, max_base_rate=most)
    assert len(set(prompts)) == 12
    if attribute == "mood":
        assert prompts == story_prompts(story, attribute, value, 12)
        assert prompts != story_prompts(story, attribute, value, 12, seed=1)
    found = Bench(story, prompts, StoryAttribute(attribute, value), samples=2, seed=9).base
    assert found.effect.estimate < most + 0.15
    judged = [storyworld.Judge().judge(prompt) for prompt in prompts]
    if attribute == "honesty":
        assert found.known > 0.9
        assert not any(judgement.claims for judgement in judged)
    else:
        assert not any(judgement.evidence[attribute] for judgement in judged)


def test_story_prompts_that_do_not_exist(story, llama):
    with pytest.raises(InputError, match="beginnings"):
        story_prompts(story, "tense", "present", 4, max_base_rate=0.1)
    with pytest.raises(InputError, match="StoryWorld"):
        story_prompts(llama, "mood", "happy", 4)
    with pytest.raises(InputError, match="mood"):
        story_prompts(story, "mood", "gleeful", 4)
    with pytest.raises(InputError, match="honesty"):
        story_prompts(story, "cue", "liar", 4)
