"""Every method: fit, save, load, apply, generate, undo; and what its equation says."""

import json

import pytest
import torch

from steerkit import HookedModel, steering
from steerkit.errors import InputError, SiteError
from steerkit.steering import METHODS, Pair, Pairs, SteeringVector, load_pairs
from steerkit.steering.pairs import join
from steerkit.steering.reading import collect_pairs, read_pairs

SITE = "blocks.2.hook_resid_post"
N = 48


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def pairs():
    return load_pairs("storyworld:mood=happy", n=N)


@pytest.fixture(scope="module")
def sides(model, pairs):
    return collect_pairs(model, pairs, [SITE])[SITE]


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if not kind.needs])
def test_fit_save_load_apply_generate_undo(method, model, pairs, tmp_path):
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    ids = torch.tensor(
        [model.tokenizer("Anna is an angry bear. Every word that she says is true.")["input_ids"]]
    )
    plain = model.logits(ids)
    vector = steering.fit(model, pairs, method=method, site=SITE)
    assert vector.sites == (SITE,) if METHODS[method].of_sites else SITE not in vector.sites
    assert vector.provenance["method"] == method
    assert vector.provenance["n_pairs"] == N
    assert vector.provenance["data_sha256"] == pairs.fingerprint()
    loaded = SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    with model.steer(loaded, strength=8.0):
        steered = model.logits(ids)
        assert len(model.generate("Anna is", max_new_tokens=5)) > 0
    with model.steer(vector, strength=8.0):
        assert torch.equal(model.logits(ids), steered)
    assert float((steered - plain).abs().max()) > 0.05
    assert torch.equal(model.logits(ids), plain)
    assert all(torch.equal(value, state[name]) for name, value in model.model.state_dict().items())


def test_sides_are_read_where_they_are(model, pairs):
    few = Pairs(pairs[:5], "few")
    for read in ("mean", "last", 0, -2):
        found = collect_pairs(model, few, [SITE], read=read)[SITE]
        expected = []
        for pair in few:
            row = []
            for text in pair.texts():
                ids = model.tokenizer(text)["input_ids"]
                acts = model.run(torch.tensor([ids]), sites=[SITE])[SITE][0]
                own = acts[[i for i, token in enumerate(ids) if token not in model.special_ids]]
                row.append(own.mean(0) if read == "mean" else own[-1 if read == "last" else read])
            expected.append(torch.stack(row))
        expected = torch.stack(expected).detach()
        order = torch.cdist(found[0], expected[:, 0]).argmin(1)
        assert sorted(order.tolist()) == list(range(5))
        torch.testing.assert_close(found[0], expected[order, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], expected[order, 1], rtol=1e-4, atol=1e-4)


def test_batches_are_small_and_hold_every_pair_once(model, pairs):
    batches = list(read_pairs(model, pairs, [SITE], batch_tokens=1000))
    assert len(batches) > 5
    assert sum(len(positive[SITE]) for positive, _ in batches) == N
    for positive, negative in batches:
        assert positive[SITE].shape == negative[SITE].shape


def test_the_side_alone_is_read_after_a_prompt(model):
    pair = Pair("happy.", "angry.", "Anna feels")
    (positive, _), *rest = read_pairs(model, Pairs([pair], "one"), [SITE])
    assert not rest
    ids = model.tokenizer("Anna feels happy.")["input_ids"]
    acts = model.run(torch.tensor([ids]), sites=[SITE])[SITE][0].detach()
    torch.testing.assert_close(positive[SITE][0], acts[3:].mean(0), rtol=1e-4, atol=1e-4)
    assert len(ids) == 5
    assert (
        join("Anna feels", "happy.")
        == join("Anna feels ", "happy.")
        == join("Anna feels", " happy.")
        == "Anna feels happy."
    )


def direction(model, pairs, method, **settings):
    return steering.fit(model, pairs, method, SITE, **settings).directions[SITE].double()


def test_closed_forms(model, pairs, sides):
    positive, negative = (side.double() for side in sides)
    difference = positive.mean(0) - negative.mean(0)
    torch.testing.assert_close(direction(model, pairs, "mean_diff"), difference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(direction(model, pairs, "mean_centring"), difference / 2, rtol=1e-4, atol=1e-5)
    assert float(direction(model, pairs, "mean_diff", normalize=True).norm()) == pytest.approx(1, abs=1e-5)
    top = torch.linalg.svd(positive - negative, full_matrices=False).Vh[0]
    found = direction(model, pairs, "pca")
    torch.testing.assert_close(found, top * torch.sign(top @ difference), rtol=1e-3, atol=1e-4)
    centred = torch.cat([positive - positive.mean(0), negative - negative.mean(0)])
    within = centred.T @ centred / len(centred)
    mixed = 0.7 * within + 0.3 * within.trace() / 128 * torch.eye(128, dtype=torch.float64)
    solved = torch.linalg.solve(mixed, difference)
    found = direction(model, pairs, "lda", shrinkage=0.3)
    assert float(torch.cosine_similarity(found, solved, dim=0)) == pytest.approx(1, abs=1e-5)
    everything = torch.cat([positive, negative])
    everything = everything - everything.mean(0)
    total = everything.T @ everything / len(everything)
    values, vectors = torch.linalg.eigh(
        0.7 * total + 0.3 * total.trace() / 128 * torch.eye(128, dtype=torch.float64)
    )
    root = vectors @ torch.diag(values**-0.5) @ vectors.T @ difference
    found = direction(model, pairs, "whitened", shrinkage=0.3)
    assert float(torch.cosine_similarity(found, root, dim=0)) == pytest.approx(1, abs=1e-5)
    for method in ("lda", "whitened", "random"):
        assert float(direction(model, pairs, method).norm()) == pytest.approx(
            float(difference.norm()), rel=1e-4
        )


@pytest.mark.parametrize(
    ("method", "aggregator"), [("mean_diff", "mean"), ("pca", "pca"), ("logistic", "logistic")]
)
def test_directions_are_those_of_steering_vectors(method, aggregator, model, pairs, sides):
    aggregators = pytest.importorskip("steering_vectors.aggregators")
    theirs = getattr(aggregators, f"{aggregator}_aggregator")()(*sides).double()
    ours = direction(model, pairs, method)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


def test_centring_the_differences_would_lose_what_they_have_in_common(model):
    # A constant shift with a little noise across it: PCA about the mean finds the noise, PCA about the origin the shift.
    from steerkit.steering.methods.pca import PCA

    generator = torch.Generator().manual_seed(0)
    negative = torch.randn(200, 16, generator=generator)
    difference = torch.zeros(200, 16)
    difference[:, 0] = 1.0
    difference[:, 1] = 0.5 * torch.randn(200, generator=generator)
    fitter = PCA().fitter(16)
    fitter.update(negative + difference, negative)
    found = fitter.direction()
    assert float(found[0]) > 0.9
    centred = difference - difference.mean(0)
    assert abs(float(torch.linalg.svd(centred).Vh[0][0])) < 0.1


def test_act_add_is_the_difference_position_by_position(model):
    pairs = Pairs([Pair("Anna feels happy", "Anna feels very angry")], "one")
    vector = steering.fit(model, pairs, "act_add", "blocks.1.hook_resid_pre")
    (edit,) = vector.edits
    rows = [model.tokenizer(text)["input_ids"] for text in ("Anna feels happy", "Anna feels very angry")]
    acts = [
        model.run(torch.tensor([row]), sites=["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"][
            0
        ].detach()
        for row in rows
    ]
    assert edit.start == 1
    assert len(edit.matrix) == 4
    torch.testing.assert_close(edit.matrix[:3], acts[0][1:4] - acts[1][1:4], rtol=1e-4, atol=1e-4)
    assert float(edit.matrix[0].abs().max()) < 1e-4  # the first word is the same


def test_swapped_sides_give_the_opposite_vector_and_shuffled_ones_little(model, pairs):
    for method in ("mean_diff", "pca", "lda", "logistic"):
        ours, theirs = direction(model, pairs, method), direction(model, pairs.swapped(), method)
        assert float(torch.cosine_similarity(ours, -theirs, dim=0)) > 0.999
    null = direction(model, pairs.shuffled_sides(), "mean_diff")
    assert float(null.norm()) < 0.5 * float(direction(model, pairs, "mean_diff").norm())


def test_mean_centring_against_text_in_general(model, pairs, sides, tmp_path):
    from steerkit.activations import collect

    texts = [pair.negative for pair in pairs]
    found = direction(model, pairs, "mean_centring", baseline=texts, tokens=2000)
    (tmp_path / "t.txt").write_text("\n".join(texts))
    vector = steering.fit(model, pairs, "mean_centring", SITE, baseline=tmp_path / "t.txt", tokens=2000)
    assert SteeringVector.load(vector.save(tmp_path / "v")).provenance["settings"]["baseline"] == "t.txt"
    mean = collect(model, texts, SITE, max_tokens=2000)[SITE].double().mean(0)
    torch.testing.assert_close(found, sides[0].double().mean(0) - mean, rtol=1e-4, atol=1e-4)


FILES = {
    "plain.jsonl": '{"positive": "a b", "negative": "c"}\n{"positive": "d", "negative": "e"}\n',
    "prompt.jsonl": '{"prompt": "q", "positive": "a", "negative": "c"}\n',
    "bipo.csv": "question,matching,not_matching\nwhy,yes,no\n",
    "caa.jsonl": json.dumps(
        {"question": "Q?", "answer_matching_behavior": " (A", "answer_not_matching_behavior": " (B"}
    )
    + "\n",
}


def test_files_of_pairs(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    found = {name: load_pairs(tmp_path / name) for name in FILES}
    assert [p.texts() for p in found["plain.jsonl"]] == [("a b", "c"), ("d", "e")]
    assert found["prompt.jsonl"][0].texts() == ("q a", "q c")
    assert found["bipo.csv"][0] == Pair("yes", "no", "why")
    assert found["caa.jsonl"][0].texts() == ("Q? (A", "Q? (B")
    assert len(load_pairs(tmp_path / "plain.jsonl", n=1)) == 1
    assert load_pairs([("a", "b"), {"positive": "c", "negative": "d"}])[1] == Pair("c", "d")


def test_splits_keep_prompts_together(pairs):
    train, validation, test = pairs.split(0.5, 0.25)
    assert (len(train), len(validation), len(test)) == (N // 2, N // 4, N // 4)
    assert {p.positive for part in (train, validation, test) for p in part} == {p.positive for p in pairs}
    repeated = Pairs([Pair(f"a{i}", f"b{i}", f"q{i % 4}") for i in range(40)], "r")
    one, two = repeated.split(0.5)
    assert not {p.prompt for p in one} & {p.prompt for p in two}
    assert [p.positive for p in repeated.split(0.5, seed=1)[0]] != [p.positive for p in one]


def test_bad_pairs_and_settings_are_one_clear_line(model, pairs, tmp_path):
    (tmp_path / "x.csv").write_text("text,label\nhello,1\n")
    for make, message in [
        (lambda: load_pairs([]), "has no pairs"),
        (lambda: load_pairs([("a", "")]), "negative side of pair 0 of pairs is blank"),
        (lambda: load_pairs([("a", "a")]), "Both sides of pair 0 of pairs are the same"),
        (lambda: load_pairs(["ab"]), r"give \(positive, negative\)"),
        (lambda: load_pairs(tmp_path / "x.csv"), "needs the columns of one of these layouts"),
        (lambda: load_pairs(tmp_path / "none.csv"), "does not exist"),
        (lambda: load_pairs("storyworld:moo=happy"), "Did you mean 'mood'"),
        (lambda: load_pairs("storyworld:mood=hungry"), "mood has no value 'hungry'"),
        (lambda: steering.fit(model, pairs, "mean_dif"), "Did you mean 'mean_diff'"),
        (lambda: steering.fit(model, pairs, "lda", shrink=2), "Did you mean 'shrinkage'"),
        (lambda: steering.fit(model, pairs, "lda", shrinkage=0.0), "lies above 0"),
        (
            lambda: steering.fit(model, pairs, "mean_diff", SITE, read="first"),
            "it is 'mean', 'last' or an index",
        ),
        (lambda: steering.fit(model, pairs, "mean_diff", SITE, read=999), "has no token 999"),
        (lambda: steering.fit(model, [("a " * 400, "b")], "mean_diff", SITE), "exceeds the context"),
        (lambda: pairs.split(0.5, 0.6), "add up to less than 1"),
        (lambda: Pairs(pairs[:2], "two").split(0.9), "too few for 2 parts"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
    with pytest.raises(SiteError, match="does not exist"):
        steering.fit(model, pairs, "mean_diff", "blocks.9.hook_resid_post")
