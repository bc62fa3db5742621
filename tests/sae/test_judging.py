"""Measures that judge dictionaries by labels: closed forms, constructed cases with a known answer, invariances, nulls."""

import dataclasses

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import balanced_accuracy_score
from sklearn.tree import DecisionTreeClassifier

from sae.judging import Dictionary, Examples, absorption, monosemanticity, scr, sparse_probing, tpp
from sae.judging.dictionaries import fit_probes, pca, raw_basis, supervised, token_identity
from sae.judging.monosemanticity import Stumps
from sae.judging.sparse_probing import best_candidates
from steerkit.errors import InputError

N = 600


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def examples_of(labels, groups=None, **settings):
    """Boolean columns as families; the first 60 % of the documents are chosen on."""
    labels = {name: np.asarray(column) for name, column in labels.items()}
    n = len(next(iter(labels.values())))
    groups = np.arange(n) if groups is None else groups
    return Examples.of(labels, groups, groups < 0.6 * (groups.max() + 1), **settings)


def binary(generator, n=N):
    return np.where(generator.random(n) < 0.4, "yes", "no")


def noise(generator, m, n=N, density=0.3):
    """Sparse non-negative columns that know nothing."""
    return generator.random((n, m)) * (generator.random((n, m)) < density)


def knows(examples):
    """The labels of the first concept, as a column."""
    return examples.labels[:, :1].astype(float)


# what is judged


def test_two_valued_families_have_one_concept_and_others_the_commonest(generator):
    values = {
        "sex": binary(generator),
        "mood": generator.choice(["a", "b", "c", "d", "rare"], N, p=[0.4, 0.3, 0.17, 0.12, 0.01]),
        "word": np.where(generator.random(N) < 0.3, "said", ""),
    }
    found = examples_of(values)
    assert found.names == ("sex=no", "mood=a", "mood=b", "mood=c", "word=said")
    assert (found.labels[:, 1] == (values["mood"] == "a")).all()
    assert examples_of({"word": np.where(generator.random(N) < 0.3, None, "x")}).names == ("word=x",)


def test_halves_must_not_share_documents(generator):
    labels = {"a": binary(generator)}
    with pytest.raises(InputError, match="both halves"):
        Examples.of(labels, np.arange(N) // 2, np.arange(N) < 301)
    with pytest.raises(InputError, match=r"600 labels for 599"):
        Examples.of(labels, np.arange(N - 1), np.arange(N - 1) < 300)
    with pytest.raises(InputError, match="common enough"):
        examples_of({"a": np.where(np.arange(N) < 9, "x", "y")})


# sparse probing


def test_a_latent_that_is_the_concept_probes_perfectly(generator):
    examples = examples_of({"a": binary(generator)})
    values = np.concatenate([noise(generator, 50), knows(examples) * 3.0, noise(generator, 50)], 1)
    for columns in (values, csr_array(values)):
        found = sparse_probing(Dictionary("x", columns), examples)
        assert found.candidates["a=no"][0] == 50
        assert found.accuracy[1].estimate == found.accuracy[5].estimate == 1.0
        # Not one of 240 documents told wrong: Clopper and Pearson's interval.
        assert found.accuracy[1].low == pytest.approx(0.025 ** (1 / 240))


def test_two_latents_tell_what_one_cannot(generator):
    first, second = generator.random((2, N)) < 0.3
    examples = examples_of({"either": np.where(first | second, "yes", "no")})
    values = np.stack([first, second, *noise(generator, 10).T], 1).astype(float)
    found = sparse_probing(Dictionary("x", csr_array(values)), examples, ks=(1, 2))
    either, scored = first | second, ~examples.chosen
    one = max(balanced_accuracy_score(either[scored], latent[scored]) for latent in (first, second))
    assert found.accuracy[1].estimate == pytest.approx(one)
    assert found.accuracy[2].estimate == 1.0


def test_latents_that_know_nothing_are_at_chance_on_other_documents_only(generator):
    families = {f"f{i}": binary(generator) for i in range(8)}
    found = sparse_probing(Dictionary("x", csr_array(noise(generator, 2000))), examples_of(families))
    for k in (1, 5):
        assert found.accuracy[k].low < 0.5 < found.accuracy[k].high
        assert found.in_sample[k] > found.accuracy[k].high
    assert found.in_sample[5] > 0.6


def test_intervals_are_clustered_by_document(generator):
    """Every document twenty times over says nothing new."""
    families = {"a": binary(generator)}
    noisy = noise(generator, 30) + 0.3 * (families["a"] == "no")[:, None]
    once = sparse_probing(Dictionary("x", noisy), examples_of(families), ks=(1,))
    again = {"a": np.repeat(families["a"], 20)}
    groups = np.repeat(np.arange(N), 20)
    many = sparse_probing(Dictionary("x", np.repeat(noisy, 20, axis=0)), examples_of(again, groups), ks=(1,))
    assert many.accuracy[1].estimate == pytest.approx(once.accuracy[1].estimate, abs=0.02)
    assert many.accuracy[1].standard_error == pytest.approx(once.accuracy[1].standard_error, rel=0.1)


def test_constant_candidates_are_never_chosen(generator):
    examples = examples_of({"a": binary(generator)})
    values = np.concatenate([np.zeros((N, 3)), np.full((N, 3), 2.0), noise(generator, 2)], 1)
    assert set(best_candidates(Dictionary("x", values), examples, 2)[0]) == {6, 7}
    with pytest.raises(InputError, match="at least one candidate"):
        sparse_probing(Dictionary("x", values), examples, ks=(0,))


# monosemanticity


def test_one_latent_for_the_concept_and_no_other_scores_one(generator):
    examples = examples_of({"a": binary(generator, 4000)})
    values = np.concatenate([noise(generator, 40, 4000), knows(examples)], 1)
    found = monosemanticity(Dictionary("x", csr_array(values)), examples)
    row = found.concepts[0]
    assert (row.candidate, row.accs_0, row.accs_cum) == (40, 1.0, (1.0,) * 5)
    assert row.global_ == 1.0
    assert row.local[1] == pytest.approx(min(2 * (1 - row.accs_p[1]), 1))
    assert found.score[1].estimate == pytest.approx((row.local[1] + 1) / 2)
    assert found.score[1].estimate > 0.95


def test_a_second_latent_that_says_the_same_costs_the_local_half(generator):
    examples = examples_of({"a": binary(generator, 2000)})
    values = np.concatenate([noise(generator, 40, 2000), knows(examples), 2 * knows(examples)], 1)
    found = monosemanticity(Dictionary("x", csr_array(values)), examples, ps=(1, 2))
    assert found.local[1] == 0.0
    assert found.score[1].estimate == 0.5
    assert found.score[2].estimate > 0.9


def test_a_concept_that_takes_two_latents_loses_the_global_part(generator):
    """y = a and b with P(a) = P(b) = q: the best stump has (1 + 1/(1 + q))/2, depth 2 all."""
    q, n = 0.7, 20_000
    a, b = generator.random((2, n)) < q
    examples = examples_of({"y": np.where(a & b, "yes", "no")})
    found = monosemanticity(
        Dictionary("x", np.stack([a, b, noise(generator, 1, n)[:, 0]], 1)), examples, ps=(1,)
    )
    row = found.concepts[0]
    stump = (1 + 1 / (1 + q)) / 2
    assert row.accs_0 == pytest.approx(stump, abs=0.01)
    assert row.accs_cum == (row.accs_0, 1.0, 1.0, 1.0, 1.0)
    assert row.global_ == pytest.approx(1 - 4 / 5 * (1 - row.accs_0))
    assert row.local[1] == pytest.approx(0, abs=0.02)


def test_latents_that_know_nothing_score_a_quarter(generator):
    families = {f"f{i}": binary(generator, 3000) for i in range(6)}
    found = monosemanticity(Dictionary("x", csr_array(noise(generator, 60, 3000))), examples_of(families))
    assert found.accs_0.estimate == pytest.approx(0.5, abs=0.02)
    assert found.score[1].estimate == pytest.approx(0.25, abs=0.03)
    assert found.in_sample[5] != pytest.approx(found.score[5].estimate, abs=1e-3)


@pytest.mark.parametrize("kind", ["sparse", "signed"])
def test_stumps_are_those_of_scikit_learn_with_the_best_taken_away_again_and_again(generator, kind):
    labels = binary(generator) == "yes"
    signal = 0.4 * labels[:, None] * (generator.random(15) < 0.5)
    values = (noise(generator, 15) + signal * (noise(generator, 15) > 0)).astype(np.float32)
    if kind == "signed":
        values = generator.normal(size=(N, 15)).astype(np.float32) + signal.astype(np.float32)
        values[generator.random((N, 15)) < 0.1] = 0
    dictionary = Dictionary("x", csr_array(values) if kind == "sparse" else values)
    part = np.arange(N) < 400
    ranked = Stumps(dictionary, part).ranked(labels[part], 6, 15)
    left = values.copy()
    for place in range(6):
        tree = DecisionTreeClassifier(max_depth=1, class_weight="balanced", random_state=0)
        tree.fit(left[part], labels[part])
        root = tree.tree_.feature[0]
        assert ranked.candidate[place] == root
        assert (ranked.predict(dictionary, place) == tree.predict(left)).all()
        left[:, root] = 0


def test_without_a_candidate_left_a_concept_is_at_chance(generator):
    examples = examples_of({"a": binary(generator)})
    found = monosemanticity(Dictionary("x", knows(examples)), examples)
    assert found.concepts[0].accs_p == {1: 0.5, 5: 0.5}
    assert found.score[1].estimate == 1.0


def test_bad_settings_are_named(generator):
    examples = examples_of({"a": binary(generator)})
    dictionary = Dictionary("x", noise(generator, 3))
    with pytest.raises(InputError, match="p is 0"):
        monosemanticity(dictionary, examples, ps=(0,))
    with pytest.raises(InputError, match="depth is 0"):
        monosemanticity(dictionary, examples, ps=(1,), depth=0)


# absorption


def word_world(generator, absorbed, *, specific=True, n=20_000, n_words=60):
    """Tokens of 200 documents; a fifth say the concept, by one of sixty words, each too rare to be a main latent itself.

    Latent 0 is general: it fires on all words but the first `absorbed`. Latent 1 + w is of word w; where the
    general one is silent it carries the concept too (or does not exist, without `specific`).
    """
    d = n_words + 4
    word = np.where(generator.random(n) < 0.2, generator.integers(0, n_words, n), -1)
    basis = np.linalg.qr(generator.normal(size=(d, d)))[0]
    label = word >= 0
    acts = 0.05 * generator.normal(size=(n, d)) + 2 * label[:, None] * basis[0]
    acts[label] += basis[1 + word[label]]
    values = np.zeros((n, n_words + 2))
    values[word >= absorbed, 0] = 2.0
    values[label, 1 + word[label]] = 1.0
    if not specific:
        values[:, 1 : 1 + absorbed] = 0.0
    values[:, -1] = generator.random(n) < 0.5
    directions = basis[: n_words + 2].copy()
    directions[1 : 1 + absorbed] += 2 * basis[0]
    examples = examples_of({"says": np.where(label, "it", "")}, np.arange(n) // (n // 200))
    return Dictionary("x", csr_array(values), directions, acts), examples, word


def built_rate(examples, word, absorbed):
    scored = ~examples.chosen & (word >= 0)
    return float((word[scored] < absorbed).mean())


@pytest.mark.parametrize("absorbed", [0, 1, 6, 30])
def test_absorption_is_found_at_the_rate_at_which_it_was_built(generator, absorbed):
    dictionary, examples, word = word_world(generator, absorbed)
    found = absorption(dictionary, examples)
    row = found.concepts[0]
    assert row.main == (0,)
    assert set(row.specific) == set(range(1, 1 + absorbed))
    assert found.rate.estimate == pytest.approx(built_rate(examples, word, absorbed), abs=1e-9)
    assert found.missed.estimate == found.rate.estimate
    assert found.rate.low <= found.rate.estimate < found.rate.high < found.rate.estimate + 0.06
    assert found.fraction.estimate == pytest.approx(found.rate.estimate, abs=0.1)


def test_silence_without_a_latent_that_speaks_instead_is_no_absorption(generator):
    dictionary, examples, word = word_world(generator, 6, specific=False)
    found = absorption(dictionary, examples)
    assert found.rate.estimate == 0.0
    assert found.missed.estimate == pytest.approx(built_rate(examples, word, 6), abs=1e-9)


def test_a_word_that_is_a_tenth_of_the_concept_is_a_split_and_not_absorbed(generator):
    """Its own latent raises the F1 by more than 0.03, so that it counts as one of the main latents."""
    dictionary, examples, _ = word_world(generator, 1, n_words=10)
    found = absorption(dictionary, examples)
    assert found.concepts[0].main == (0, 1)
    assert found.missed.estimate == found.rate.estimate == 0.0


def test_absorption_needs_silence_and_directions(generator):
    dictionary, examples, _ = word_world(generator, 1)
    with pytest.raises(InputError, match="no directions"):
        absorption(dataclasses.replace(dictionary, directions=None), examples)
    with pytest.raises(InputError, match="never silent"):
        absorption(dataclasses.replace(dictionary, values=dictionary.values.toarray()), examples)


# ablations


def two_attributes(generator, n=1500, d=12):
    """Activations that say t and s along two coordinates, a dictionary that has a latent for each, and noise."""
    t, s = generator.random((2, n)) < 0.5
    acts = generator.normal(size=(n, d)).astype(np.float32)
    acts[:, 0] += 6 * t
    acts[:, 1] += 6 * s
    rows = generator.normal(size=(40, d))
    rows[:, :2] = 0
    values = np.concatenate([6 * t[:, None], 6 * s[:, None], noise(generator, 40, n)], 1)
    directions = np.concatenate([np.eye(d)[:2], rows])
    examples = examples_of({"t": np.where(t, "yes", "no"), "s": np.where(s, "yes", "no")})
    return Dictionary("x", csr_array(values), directions, acts), examples


def test_ablating_the_spurious_latent_gives_the_accuracy_back(generator):
    dictionary, examples = two_attributes(generator)
    found = scr(dictionary, examples, ns=(1, 2))
    assert len(found.pairs) == 2
    assert found.base == pytest.approx(0.75, abs=0.1)
    assert found.oracle > 0.98
    assert found.score[1].estimate > 0.9
    assert abs(found.null[1]) < 0.05
    for accuracies in found.pairs.values():
        assert accuracies["ablated@1"] > accuracies["base"] + 0.1


def test_latents_that_know_nothing_give_nothing_back(generator):
    dictionary, examples = two_attributes(generator)
    nothing = dataclasses.replace(
        dictionary, values=dictionary.values[:, 2:], directions=dictionary.directions[2:]
    )
    found = scr(nothing, examples, ns=(1, 10))
    assert abs(found.score[1].estimate) < 0.02
    assert abs(tpp_of(nothing, generator).score[5].estimate) < 0.02


def test_a_latent_that_mixes_target_and_spurious_cannot_remove_the_spurious(generator):
    dictionary, examples = two_attributes(generator)
    columns = dictionary.values.toarray()[:, :2]
    both = np.array([[1.0, 1.0], [1.0, -1.0]])
    mixed = Dictionary("mixed", columns @ both / 2, both @ dictionary.directions[:2], dictionary.acts)
    clean = scr(dictionary, examples, ns=(1,)).score[1]
    assert scr(mixed, examples, ns=(1,)).score[1].high < clean.low


def families(generator, n=2000, d=12):
    kind = generator.choice(["a", "b", "c"], n)
    acts = generator.normal(size=(n, d)).astype(np.float32)
    onehot = np.stack([kind == name for name in "abc"], 1).astype(float)
    acts[:, :3] += 6 * onehot
    return kind, onehot, acts


def tpp_of(nothing, generator):
    kind, _, acts = families(generator)
    values = noise(generator, nothing.size, len(kind))
    return tpp(
        Dictionary("x", csr_array(values), nothing.directions, acts), examples_of({"k": kind}), ns=(5,)
    )


def test_one_latent_a_concept_perturbs_that_probe_and_no_other(generator):
    kind, onehot, acts = families(generator)
    examples = examples_of({"k": kind})
    clean = tpp(Dictionary("x", csr_array(6 * onehot), np.eye(12)[:3], acts), examples, ns=(1,))
    assert clean.accuracy > 0.98
    assert clean.on_target[1] > 0.15
    assert clean.score[1].estimate > 0.1
    shared = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1]])
    mixed = Dictionary("two concepts a latent", 6 * onehot @ shared, shared.T @ np.eye(12)[:3] / 2, acts)
    assert tpp(mixed, examples, ns=(1,)).score[1].high < clean.score[1].low
    everything = tpp(Dictionary("x", 6 * onehot, np.eye(12)[:3], acts), examples, ns=(3,))
    assert everything.on_target[3] > 0.4
    assert everything.score[3].estimate == pytest.approx(0, abs=0.05)


def test_ablation_leaves_what_the_dictionary_does_not_explain(generator):
    """The activations without the ablated candidates are x - Σ (f - f̄) d: with probes refitted by hand."""
    dictionary, examples = two_attributes(generator)
    found = tpp_or_scr_logits(dictionary, examples)
    w, b = fit_probes(dictionary.acts, examples)
    mean = dictionary.values[examples.chosen].toarray().mean(0)
    gone = [1]
    by_hand = dictionary.acts - (dictionary.values.toarray() - mean)[:, gone] @ dictionary.directions[gone]
    np.testing.assert_allclose(found, by_hand @ w + b, atol=1e-4)


def tpp_or_scr_logits(dictionary, examples):
    from sae.judging.scr import ablation_effect

    w, b = fit_probes(dictionary.acts, examples)
    mean = examples.chosen / examples.chosen.sum()
    return dictionary.acts @ w + b + ablation_effect(dictionary, np.array([1]), mean, w)


def test_what_cannot_be_ablated_or_told_apart_is_named(generator):
    dictionary, examples = two_attributes(generator)
    for measure in (scr, tpp):
        with pytest.raises(InputError, match="no directions"):
            measure(dataclasses.replace(dictionary, directions=None), examples)
        with pytest.raises(InputError, match="n is 0"):
            measure(dictionary, examples, ns=(0,))
    with pytest.raises(InputError, match="two labels"):
        scr(dictionary, examples_of({"t": examples.values["t"]}))
    with pytest.raises(InputError, match="two values"):
        tpp(dictionary, examples)


# invariances


@pytest.mark.parametrize("measure", [sparse_probing, monosemanticity, scr, tpp])
def test_neither_order_nor_scale_of_the_latents_matters(generator, measure):
    """Scales are powers of two, so that not even rounding differs; deep in a tree, where few examples are left, the order
    breaks ties."""
    kind, onehot, acts = families(generator, 900)
    values = np.concatenate([noise(generator, 20, 900), onehot * generator.random((900, 3))], 1)
    directions = np.concatenate([generator.normal(size=(20, 12)), np.eye(12)[:3]])
    labels = {"k": kind, "other": binary(generator, 900)}
    examples = examples_of(labels, min_groups=5)
    order, scale = generator.permutation(23), 2.0 ** generator.integers(-8, 9, 23)
    plain = measure(Dictionary("x", csr_array(values), directions, acts), examples)
    turned = measure(
        Dictionary("x", csr_array((values * scale)[:, order]), (directions / scale[:, None])[order], acts),
        examples,
    )
    for name in ("accuracy", "score"):
        if isinstance(getattr(plain, name, None), dict):
            for key, interval in getattr(plain, name).items():
                assert getattr(turned, name)[key].estimate == pytest.approx(
                    interval.estimate, abs=2e-3 if measure is monosemanticity else 1e-9
                )
    if measure is monosemanticity:
        assert (turned.accs_0, turned.local) == (plain.accs_0, plain.local)


def test_absorption_does_not_depend_on_order_and_scale(generator):
    dictionary, examples, _ = word_world(generator, 6)
    order, scale = generator.permutation(62), 2.0 ** generator.integers(-8, 9, 62)
    values = csr_array((dictionary.values.toarray() * scale)[:, order])
    turned = dataclasses.replace(
        dictionary, values=values, directions=(dictionary.directions / scale[:, None])[order]
    )
    plain, found = absorption(dictionary, examples), absorption(turned, examples)
    assert (found.rate, found.missed, found.f1) == (plain.rate, plain.missed, plain.f1)
    assert [order[latent] for latent in found.concepts[0].main] == list(plain.concepts[0].main)


# baselines


def test_the_raw_basis_has_as_many_candidates_all_of_them_orthogonal_in_their_turn(generator):
    acts = generator.normal(size=(N, 8))
    found = raw_basis(acts, np.arange(N) < 300, 20)
    assert found.size == 20
    np.testing.assert_allclose(found.directions[:8], np.eye(8))
    np.testing.assert_allclose(found.directions[8:16] @ found.directions[8:16].T, np.eye(8), atol=1e-6)
    assert raw_basis(acts, np.arange(N) < 300, 3).size == 8


def test_principal_components_are_those_of_the_chosen_examples(generator):
    acts = generator.normal(size=(N, 8)) * np.arange(8, 0, -1)
    chosen = np.arange(N) < 300
    found = pca(acts, chosen)
    np.testing.assert_allclose(found.values @ found.directions + acts[chosen].mean(0), acts, atol=1e-9)
    spread = found.values[chosen].std(0)
    assert (np.diff(spread) < 0).all()


def test_a_supervised_probe_is_its_own_best_candidate_and_is_erased_by_ablating_it(generator):
    dictionary, examples = two_attributes(generator)
    probes = supervised(dictionary.acts, examples)
    found = sparse_probing(probes, examples, ks=(1,))
    assert found.accuracy[1].estimate > 0.98
    assert [best[0] for best in found.candidates.values()] == [0, 1]
    w, _ = fit_probes(dictionary.acts, examples)
    erased = dictionary.acts - (probes.values @ np.diag([1, 0])) @ probes.directions
    assert (erased @ w[:, 0]).std() < 1e-3


def test_token_identity_counts_tokens():
    pool = csr_array(np.array([[0.5, 0.5, 0], [0, 0, 1.0]]))
    np.testing.assert_allclose(
        token_identity(np.array([2, 0, 2]), pool).values.toarray(), [[0.5, 0, 0.5], [0, 0, 1]]
    )


def test_results_are_saved_and_printed(generator, tmp_path):
    import json

    dictionary, examples = two_attributes(generator)
    kind, onehot, acts = families(generator)
    results = [
        sparse_probing(dictionary, examples),
        monosemanticity(dictionary, examples),
        scr(dictionary, examples, ns=(1,)),
        tpp(Dictionary("x", 6 * onehot, np.eye(12)[:3], acts), examples_of({"k": kind}), ns=(1,)),
        absorption(*word_world(generator, 1)[:2]),
    ]
    for number, result in enumerate(results):
        result.save(tmp_path / f"{number}.json")
        assert json.loads((tmp_path / f"{number}.json").read_text()) == json.loads(
            json.dumps(result.to_dict())
        )
        assert result.name in repr(result)
