"""Measures of similarity: their definitions, closed forms, invariances, nulls, and what they refuse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.similarity import (
    CCA,
    MEASURES,
    PWCCA,
    RBFCKA,
    RSA,
    SVCCA,
    LinearCKA,
    MinibatchCKA,
    Pair,
    Procrustes,
    SimilarityWarning,
    TopRows,
    similarity,
)
from steerkit.errors import InputError, NumericsError

pytestmark = pytest.mark.filterwarnings("ignore::probes.similarity.SimilarityWarning")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(n: int, d: int, s: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """X ~ N(0, I) and X + s noise."""
    x = normal(n, d, seed=seed)
    return x, x + s * normal(n, d, seed=seed + 1000)


def value(x, y, measure, **options) -> float:
    return similarity(x, y, measure, interval=False, top_rows=None, **options)["x", "x"].value


def gram_cka(x: np.ndarray, y: np.ndarray, *, debiased: bool) -> float:
    """The definition, by n × n matrices."""

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        n = len(k)
        if not debiased:
            h = np.eye(n) - 1 / n
            return np.trace(k @ h @ other @ h)
        k, other, one = k - np.diag(np.diag(k)), other - np.diag(np.diag(other)), np.ones(n)
        pairs = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
        return np.trace(k @ other) + pairs - 2 / (n - 2) * (one @ k @ other @ one)

    k, other = x @ x.T, y @ y.T
    return hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))


# Definitions


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("route", ["moments", "gram"])
def test_the_streamed_cka_of_all_pairs_is_that_of_the_gram_matrices(route, debiased):
    a = {"one": 5 + normal(57, 6, seed=1), "two": normal(57, 90, seed=2) - 3}
    b = {"three": a["one"] @ normal(6, 4, seed=3) + 0.1, "four": normal(57, 5, seed=4)}
    fitter = LinearCKA(debiased=debiased, route=route).fitter()
    for rows in torch.arange(57).split([10, 1, 30, 16]):
        fitter.update({site: x[rows] for site, x in a.items()}, {site: y[rows] for site, y in b.items()})
    found = fitter.result()
    assert found.matrix.shape == (2, 2)
    for one, other in itertools.product(a, b):
        expected = gram_cka(a[one].numpy(), b[other].numpy(), debiased=debiased)
        assert found[one, other].value == pytest.approx(expected, abs=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 39), max_size=5, unique=True),
    measure=st.sampled_from(
        sorted(set(MEASURES) - {"minibatch_cka"})
    ),  # whose batches are part of its definition
)
def test_how_the_rows_are_cut_into_batches_makes_no_difference(cuts, measure):
    x, y = noisy(40, 3, 0.5)
    documents = torch.arange(40) // 4
    whole, parts = MEASURES[measure]().fitter(), MEASURES[measure]().fitter()
    whole.update(x, y, documents)
    for rows in torch.arange(40).tensor_split(sorted(cuts)):
        parts.update(x[rows], y[rows], documents[rows])
    one, other = whole.result()["x", "x"].interval, parts.result()["x", "x"].interval
    assert (one.estimate, one.low, one.high) == pytest.approx(
        (other.estimate, other.low, other.high), abs=1e-9
    )


@pytest.mark.parametrize("debiased", [True, False])
def test_float32_holds_its_digits_beside_a_large_mean(debiased):
    x, y = noisy(400, 8, 0.7)
    x, y = x + 100, y - 100
    expected = value(x, y, LinearCKA(debiased=debiased))
    found = value(x.float(), y.float(), LinearCKA(debiased=debiased, route="moments"), dtype=torch.float32)
    assert found == pytest.approx(expected, abs=1e-5)


def test_minibatch_cka_is_the_ratio_of_mean_hsics():
    x, y = noisy(96, 40, 0.7)
    fitter = MinibatchCKA(batch_size=32).fitter()
    fitter.update(x, y)

    def mean_hsic(p, q):
        total = 0.0
        for rows in torch.arange(96).split(32):
            k, other = p[rows] @ p[rows].T, q[rows] @ q[rows].T
            k.fill_diagonal_(0), other.fill_diagonal_(0)
            total += (
                (k @ other).trace() + k.sum() * other.sum() / (31 * 30) - 2 / 30 * (k.sum(0) @ other.sum(0))
            )
        return total

    expected = mean_hsic(x, y) / (mean_hsic(x, x) * mean_hsic(y, y)).sqrt()
    assert fitter.result()["x", "x"].value == pytest.approx(float(expected), abs=1e-10)


def test_minibatch_hsic_is_unbiased_where_the_biased_form_is_not():
    found = [
        value(normal(640, 100, seed=i), normal(640, 100, seed=50 + i), MinibatchCKA(32)) for i in range(10)
    ]
    assert abs(np.mean(found)) < 0.02
    assert value(normal(32, 100), normal(32, 100, seed=1), LinearCKA(debiased=False)) > 0.7


def test_rbf_cka_tends_to_the_linear_one_and_is_its_definition():
    x, y = noisy(61, 5, 0.5)
    assert value(x, y, RBFCKA(fraction=200)) == pytest.approx(value(x, y, LinearCKA()), abs=1e-3)
    kernels = []
    for side in (x, y):
        distances = torch.cdist(side, side).square()
        kernels.append(torch.exp(-distances / (2 * 0.4**2 * distances.median())).numpy())
    h = np.eye(61) - 1 / 61
    k, other = (h @ kernel @ h for kernel in kernels)
    expected = (k * other).sum() / np.linalg.norm(k) / np.linalg.norm(other)
    assert value(x, y, RBFCKA(fraction=0.4, debiased=False)) == pytest.approx(expected, abs=1e-10)


def test_rsa_is_the_correlation_of_the_upper_triangles():
    from scipy.stats import pearsonr, spearmanr

    x, y = noisy(50, 6, 0.7)
    upper = np.triu_indices(50, 1)
    cosines = [torch.nn.functional.normalize(side, dim=1).numpy() for side in (x, y)]
    one, other = ((unit @ unit.T)[upper] for unit in cosines)
    assert value(x, y, RSA()) == pytest.approx(pearsonr(one, other).statistic, abs=1e-10)
    assert value(x, y, RSA(correlation="spearman")) == pytest.approx(
        spearmanr(one, other).statistic, abs=1e-10
    )


def canonical(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ρ, the first side's variates), by QR."""
    q_x, _ = np.linalg.qr(x - x.mean(0))
    q_y, _ = np.linalg.qr(y - y.mean(0))
    left, correlations, _ = np.linalg.svd(q_x.T @ q_y)
    return correlations, q_x @ left[:, : len(correlations)]


def test_cca_and_pwcca_are_their_definitions():
    x, y = normal(300, 6) @ normal(6, 6, seed=1), normal(300, 9, seed=2)
    y[:, :4] += x[:, :4]
    correlations, variates = canonical(x.numpy(), y.numpy())
    assert value(x, y, CCA()) == pytest.approx(correlations.mean(), abs=1e-9)
    assert value(x, y, CCA(statistic="squares")) == pytest.approx((correlations**2).mean(), abs=1e-9)
    weights = np.abs(variates.T @ (x - x.mean(0)).numpy()).sum(1)
    assert value(x, y, PWCCA()) == pytest.approx(weights @ correlations / weights.sum(), abs=1e-9)
    assert value(x, y, PWCCA()) != pytest.approx(value(y, x, PWCCA()), abs=1e-3)


def test_cca_is_that_of_scikit_learn():
    from sklearn.cross_decomposition import CCA as Reference

    x, y = noisy(400, 3, 0.8)
    x, y = x @ normal(3, 3, seed=5), y @ normal(3, 3, seed=6)
    pairs = Reference(n_components=3, max_iter=5000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    expected = np.mean([np.corrcoef(u, v)[0, 1] for u, v in zip(pairs[0].T, pairs[1].T)])
    assert value(x, y, CCA()) == pytest.approx(expected, abs=1e-5)


def test_svcca_keeps_components_by_variance_not_by_singular_values():
    """Of deviations 10, 3, 1, 1, 1, 1, 1 the first two hold 96 % of the variance, but only 72 % of the sum."""
    deviations = torch.tensor([10.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    scores = normal(500, 7)
    scores = torch.linalg.qr(
        scores - scores.mean(0)
    ).Q  # uncorrelated to rounding: principal components are the columns
    x, y = scores * deviations, normal(500, 4, seed=9)
    kept_y = torch.linalg.svd(y - y.mean(0), full_matrices=False).U[:, :4]
    expected, _ = canonical(x[:, :2].numpy(), kept_y.numpy())
    assert value(x, y, SVCCA(variance=0.95)) == pytest.approx(expected.mean(), abs=1e-9)
    whole, _ = canonical(x.numpy(), y.numpy())
    assert value(x, y, SVCCA(variance=1.0)) == pytest.approx(whole.mean(), abs=1e-9)


def test_procrustes_is_that_of_scipy():
    from scipy.linalg import orthogonal_procrustes
    from scipy.spatial import procrustes

    x, y = noisy(80, 5, 0.7)
    centred = [(side - side.mean(0)).numpy() for side in (x, y)]
    unit = [side / np.linalg.norm(side) for side in centred]
    found = value(x, y, Procrustes(held_out=False))
    assert found == pytest.approx(orthogonal_procrustes(*unit)[1], abs=1e-10)
    assert procrustes(x.numpy(), y.numpy())[2] == pytest.approx(1 - found**2, abs=1e-10)


def test_a_held_out_rotation_is_fitted_without_the_documents_that_it_is_scored_on():
    from scipy.linalg import orthogonal_procrustes

    x, y = noisy(60, 4, 0.7)
    y = y + 3
    documents = torch.arange(60) % 10
    fitter = Procrustes(folds=3).fitter(blocks=10)
    fitter.update(x, y, documents)
    sums = np.zeros(3)
    for fold in range(3):
        out = (documents % 3 == fold).numpy()
        p, q = x.numpy() - x.numpy()[~out].mean(0), y.numpy() - y.numpy()[~out].mean(0)
        turned = p[out] @ orthogonal_procrustes(p[~out], q[~out])[0]
        sums += (turned * q[out]).sum(), (p[out] ** 2).sum(), (q[out] ** 2).sum()
    assert fitter.result()["x", "x"].value == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]), abs=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shared=st.floats(0, 2))
def test_the_angle_of_procrustes_is_a_metric(seed, shared):
    base = normal(30, 4, seed=seed)
    sides = [base * shared + normal(30, 4, seed=seed + i) for i in (1, 2, 3)]
    ab, ac, bc = (
        math.acos(min(1.0, value(p, q, Procrustes(held_out=False))))
        for p, q in itertools.combinations(sides, 2)
    )
    assert ac <= ab + bc + 1e-9


# Invariances


def transformed(kind: str, x: torch.Tensor) -> torch.Tensor:
    d = x.shape[1]
    if kind == "orthogonal":
        return x @ torch.linalg.qr(normal(d, d, seed=77)).Q
    if kind == "scaling":
        return -7.5 * x
    if kind == "translation":
        return x + 4 * normal(d, seed=78)
    return x @ normal(d, d, seed=79) * torch.logspace(0, 2, d, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["orthogonal", "scaling", "linear", "translation"])
@pytest.mark.parametrize("name", sorted(MEASURES))
def test_a_measure_has_the_invariances_that_it_declares_and_no_others(name, kind):
    x, y = noisy(120, 5, 0.6)
    x, y = x + 0.5, y @ normal(5, 4, seed=3)
    documents = torch.arange(120) // 3
    measure = MEASURES[name]()
    plain = value(x, y, measure, documents=documents)
    side_a = value(transformed(kind, x), y, measure, documents=documents)
    if getattr(measure.invariances, kind):
        assert side_a == pytest.approx(plain, abs=1e-8)
        assert value(x, transformed(kind, y), measure, documents=documents) == pytest.approx(plain, abs=1e-8)
    else:
        assert abs(side_a - plain) > 1e-3


def test_pwcca_does_not_mind_what_is_done_to_side_b():
    x, y = noisy(120, 5, 0.6)
    assert value(x, transformed("linear", y), PWCCA()) == pytest.approx(value(x, y, PWCCA()), abs=1e-8)


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_a_side_is_like_itself(name):
    x = normal(100, 6)
    assert value(x, x.clone(), name) == pytest.approx(1, abs=1e-8)


# Closed forms


@pytest.mark.parametrize("s", [0.4, 0.7, 1.5])
def test_noise_added_to_a_side_lowers_each_measure_by_its_closed_form(s):
    x, y = noisy(20_000, 16, s)
    for measure, expected in (
        (LinearCKA(), 1 / (1 + s**2)),
        (MinibatchCKA(), 1 / (1 + s**2)),
        (CCA(), 1 / math.sqrt(1 + s**2)),
        (SVCCA(), 1 / math.sqrt(1 + s**2)),
        (PWCCA(), 1 / math.sqrt(1 + s**2)),
        (Procrustes(), 1 / math.sqrt(1 + s**2)),
        (Procrustes(held_out=False), 1 / math.sqrt(1 + s**2)),
    ):
        assert value(x, y, measure) == pytest.approx(expected, abs=0.012), measure


@pytest.mark.parametrize(("n", "d_x", "d_y"), [(128, 768, 768), (256, 64, 1024), (512, 128, 128)])
def test_the_biased_cka_of_unrelated_sides_is_its_closed_form_and_the_debiased_about_zero(n, d_x, d_y):
    x, y = normal(n, d_x), normal(n, d_y, seed=1)
    assert value(x, y, LinearCKA(debiased=False)) == pytest.approx(
        math.sqrt(d_x * d_y / ((n + d_x) * (n + d_y))), abs=0.01
    )
    assert abs(value(x, y, LinearCKA())) < 0.02
    expected = similarity(x, y, LinearCKA(debiased=False), interval=False)["x", "x"].null.expected
    assert expected == pytest.approx(value(x, y, LinearCKA(debiased=False)), abs=0.01)


@pytest.mark.parametrize(
    "measure",
    [
        LinearCKA(route="moments"),
        LinearCKA(route="gram"),
        LinearCKA(debiased=False, route="moments"),
        LinearCKA(debiased=False, route="gram"),
        RBFCKA(),
        RSA(),
        RSA(correlation="spearman"),
        CCA(statistic="squares"),
    ],
    ids=repr,
)
def test_the_expected_null_is_the_mean_over_all_permutations(measure):
    x, y = noisy(5, 2, 0.5)
    fitter = measure.fitter(interval=False)
    fitter.update(x, y)
    expected = fitter.result()["x", "x"].null.expected
    values = []
    for order in itertools.permutations(range(5)):
        fitter = measure.fitter(interval=False)
        fitter.update(x, y[list(order)])
        values.append(fitter.result()["x", "x"].value)
    assert np.mean(values) == pytest.approx(expected, abs=1e-9)


# Nulls, sinks, masks


def test_permuting_tokens_finds_relations_and_permuting_documents_is_not_taken_in_by_documents():
    """Sides that share nothing but that rows come in documents: tokens permuted, they look related; documents permuted, not."""
    x, y = noisy(100, 6, 0.7)
    found = similarity(x, y, LinearCKA(), interval=False, permutations=39, permute="token")["x", "x"]
    assert found.null.p_value == 1 / 40
    assert abs(found.null.expected) < 0.02
    assert found.null.high < found.value
    drawn: dict[str, list[Pair]] = {"token": [], "document": []}
    documents = torch.arange(80) // 8
    for seed in range(20):
        x, y = (
            normal(10, 3, seed=seed + part)[documents] + 0.3 * normal(80, 3, seed=seed + part + 500)
            for part in (0, 100)
        )
        for permute, kept in drawn.items():
            found = similarity(
                x,
                y,
                LinearCKA(route="gram"),
                documents=documents,
                permute=permute,
                permutations=19,
                interval=False,
            )
            kept.append(found["x", "x"])
    significant = {
        permute: sum(pair.null.p_value <= 0.05 for pair in kept) for permute, kept in drawn.items()
    }
    assert significant["token"] > 10
    assert significant["document"] <= 4
    values = np.mean([pair.value for pair in drawn["document"]])
    assert np.mean([pair.null.expected for pair in drawn["document"]]) == pytest.approx(values, abs=0.04)
    assert np.mean([pair.null.expected for pair in drawn["token"]]) == pytest.approx(0, abs=0.02)
    assert values > 0.1


def test_a_few_tokens_of_outstanding_norm_are_found_and_left_out_beside():
    x, y = normal(1000, 16), normal(1000, 16, seed=1)
    x[::50, 0], y[::50, 3] = 300.0, 300.0
    with pytest.warns(SimilarityWarning, match="stand out by their norm"):
        found = similarity(x, y, interval=False)
    assert found.n_sinks == 20
    assert found["x", "x"].value > 0.99
    assert abs(found.without_sinks["x", "x"].value) < 0.02
    assert found.changed_by_sinks() == [("x", "x")]
    by_share = similarity(x, y, interval=False, top_rows=TopRows(share=0.02))
    assert by_share.without_sinks.matrix == pytest.approx(found.without_sinks.matrix)
    assert similarity(x[1:50], y[1:50]).without_sinks is None


def test_rows_outside_the_mask_do_not_count():
    x, y = noisy(60, 4, 0.5)
    mask = (torch.arange(60) % 3 > 0).reshape(6, 10)
    documents = torch.arange(6)[:, None].expand(6, 10)
    spoilt = x.clone()
    spoilt[~mask.flatten()] = math.nan
    found = similarity(spoilt.reshape(6, 10, 4), y.reshape(6, 10, 4), mask=mask, documents=documents)
    kept = mask.flatten()
    assert (
        found["x", "x"].interval
        == similarity(x[kept], y[kept], documents=documents.flatten()[kept])["x", "x"].interval
    )


def test_pairs_are_all_matched_or_listed():
    a = {"p": normal(40, 3), "q": normal(40, 4, seed=1)}
    b = {"q": normal(40, 5, seed=2), "r": normal(40, 3, seed=3)}
    whole = similarity(a, b)
    assert whole.sites_a == ("p", "q")
    assert whole.sites_b == ("q", "r")
    for measure in (LinearCKA(route="moments"), LinearCKA(route="gram"), MinibatchCKA()):
        reference = similarity(a, b, measure)
        matched, listed = (
            similarity(a, b, measure, pairs="matched"),
            similarity(a, b, measure, pairs=[("p", "r")]),
        )
        assert list(matched.pairs) == [("q", "q")]
        assert matched["q", "q"].value == pytest.approx(reference["q", "q"].value)
        assert listed["p", "r"].value == pytest.approx(reference["p", "r"].value)
        assert np.isnan(listed.matrix[0, 0])


def test_a_result_is_saved_as_json(tmp_path):
    import json

    x, y = noisy(40, 3, 0.5)
    similarity(x, y, permutations=3).save(tmp_path / "cka.json")
    read = json.loads((tmp_path / "cka.json").read_text())
    assert read["measure"] == "linear_cka"
    assert read["pairs"][0]["estimate"] == pytest.approx(similarity(x, y)["x", "x"].value)


def test_activations_bring_their_documents():
    from steerkit.activations import collect
    from steerkit.models import HookedModel

    model = HookedModel.from_pretrained("storyworld")
    texts = ["The fox sleeps.", "Anna is happy and she sings.", "The red ball is in the box."]
    sites = [f"blocks.{layer}.hook_resid_post" for layer in (0, 2)]
    acts = collect(model, texts, sites, drop_sinks=False)
    found = similarity(acts, acts)
    assert found.n_documents == 3
    assert found[sites[0], sites[0]].value == pytest.approx(1)
    assert found[sites[0], sites[1]].value == pytest.approx(found[sites[1], sites[0]].value)
    with pytest.raises(InputError, match="not of the same tokens"):
        similarity(acts, collect(model, texts[:2], sites, drop_sinks=False))


# Memory


def held(thing: object, seen: set[int]) -> int:
    """Numbers in all tensors that hang on an object."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return thing.numel()
    if isinstance(thing, dict):
        return sum(held(part, seen) for part in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(held(part, seen) for part in thing)
    return held(vars(thing), seen) if hasattr(thing, "__dict__") else 0


@pytest.mark.parametrize(
    "measure",
    [LinearCKA(), MinibatchCKA(), CCA(), Procrustes(), RBFCKA(max_rows=50), RSA(max_rows=50)],
    ids=repr,
)
def test_memory_is_flat_in_the_number_of_rows(measure):
    fitter = measure.fitter()
    sizes = []
    for batch in range(40):
        x, y = noisy(40, 5, 0.5, seed=batch)
        fitter.update({"p": x, "q": x}, {"p": y, "q": y}, torch.full((40,), batch))
        sizes.append(held(fitter, set()))
    assert max(sizes[20:]) <= max(sizes[:20])
    found = fitter.result()
    assert found.n_rows == (50 if isinstance(measure, (RBFCKA, RSA)) else 1600)
    assert found["p", "q"].value == pytest.approx(1 / 1.25, abs=0.25)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", sorted(MEASURES))
def test_a_gpu_gives_the_same(name):
    x, y = noisy(200, 6, 0.5)
    documents = torch.arange(200) // 5
    here, there = (similarity(*sides, name, documents=documents) for sides in ((x, y), (x.cuda(), y.cuda())))
    one, other = here["x", "x"].interval, there["x", "x"].interval
    assert (one.estimate, one.low) == pytest.approx((other.estimate, other.low), abs=1e-8)


# Bad input


def test_too_few_rows_for_canonical_correlations_are_refused_or_told_of():
    with pytest.raises(
        InputError, match=r"p – q: 20 rows .* too few for canonical correlations of 12 and 12"
    ):
        similarity({"p": normal(20, 12)}, {"q": normal(20, 12, seed=1)}, CCA(), interval=False)
    with pytest.warns(SimilarityWarning, match=r"100 rows are few for 24 .* mean ρ² is 0\.12"):
        similarity(normal(100, 12), normal(100, 12, seed=1), CCA())


@pytest.mark.parametrize("route", ["moments", "gram"])
def test_a_biased_cka_of_few_rows_tells_its_bias(route):
    x, y = normal(100, 50), normal(100, 50, seed=1)
    with pytest.warns(SimilarityWarning, match=r"100 rows are few .* biased CKA is 0\.3\d on average"):
        similarity(x, y, LinearCKA(debiased=False, route=route))


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_constant_activations_are_refused_by_name(name):
    with pytest.raises(InputError, match="Activations at flat are constant"):
        similarity({"x": normal(60, 3)}, {"flat": torch.full((60, 3), 0.1)}, name)


@pytest.mark.parametrize("name", sorted(MEASURES))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_refused_by_name(name, bad):
    y = normal(20, 3)
    y[4, 1] = bad
    with pytest.raises(NumericsError, match="NaN or inf at here in 1 of 20 rows"):
        similarity({"x": normal(20, 3)}, {"here": y}, name)


def test_sides_that_do_not_match_are_refused():
    x, y = noisy(20, 3, 0.5)
    with pytest.raises(InputError, match=r"\[19, 20\] rows"):
        similarity(x, y[1:])
    with pytest.raises(InputError, match="No site is on both sides"):
        similarity({"p": x}, {"q": y}, pairs="matched")
    with pytest.raises(InputError, match="p – r cannot be compared"):
        similarity({"p": x}, {"q": y}, pairs=[("p", "r")])
    with pytest.raises(InputError, match="list of pairs is empty"):
        similarity({"p": x}, {"q": y}, pairs=[])
    with pytest.raises(InputError, match="3 rows: a similarity needs at least four"):
        similarity(x[:3], y[:3])
    with pytest.raises(InputError, match="0 rows: a similarity needs at least four"):
        similarity(x, y, mask=torch.zeros(20, dtype=torch.bool))
    with pytest.raises(InputError, match="Did you mean 'linear_cka'"):
        similarity(x, y, "linear_ckA")
    with pytest.raises(InputError, match="at least two documents"):
        similarity(x, y, Procrustes(), documents=np.array(["one"] * 20))
    with pytest.raises(InputError, match="1 rows are zero"):
        similarity(x * (torch.arange(20) > 0)[:, None], y, RSA())
    with pytest.raises(InputError, match="larger fraction"):
        similarity(x, y, RBFCKA(fraction=0.001))
    fitter = LinearCKA().fitter()
    fitter.update(x, y)
    with pytest.raises(InputError, match="other sites or widths"):
        fitter.update(x[:, :2], y)
    with pytest.raises(InputError, match="document numbers"):
        fitter.update(x, y, torch.arange(3))
    with pytest.raises(InputError, match="integers"):
        fitter.update(x, y, torch.zeros(20))


def test_rows_that_are_equally_unlike_have_no_debiased_cka():
    with pytest.raises(InputError, match="x – x: 0 / 0"):
        similarity(torch.eye(4), torch.eye(4), LinearCKA(route="gram"), interval=False)


def test_a_buffer_that_is_written_again_does_not_change_what_was_taken_in():
    x, y = noisy(20, 3, 0.5)
    expected = similarity(x, y, RSA(), interval=False)["x", "x"].value
    fitter = RSA().fitter(interval=False)
    buffer = x.clone()
    fitter.update(buffer, y)
    buffer.zero_()
    assert fitter.result()["x", "x"].value == pytest.approx(expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RBFCKA(fraction=0),
        lambda: SVCCA(variance=1.5),
        lambda: Procrustes(folds=1),
        lambda: MinibatchCKA(batch_size=3),
        lambda: LinearCKA().fitter(blocks=1),
        lambda: LinearCKA().fitter(level=95),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(InputError):
        make()
