"""What the files of a dashboard hold, against plain, slow definitions; the page itself is tested in tests/browser."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch

from sae.architectures.topk import TopK
from sae.architectures.transcoder import Transcoder
from sae.dashboard import build
from sae.dashboard.ablation import ablations
from sae.dashboard.describe import Describer
from sae.dashboard.explain import Evidence, Explanations
from sae.dashboard.layout import layout
from sae.dashboard.pieces import shown_tokens
from sae.dashboard.preview import NEW_TOKENS, STRENGTHS, Preview
from sae.dashboard.second import Second
from sae.latents import WINDOW, collect_latents
from steerkit.data import load_documents
from steerkit.errors import InputError
from steerkit.models import HookedModel

SITE = "blocks.0.hook_resid_post"
D = 24
D_SAE = 70
DEAD = 66


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(width=D)


@pytest.fixture(scope="module")
def documents():
    stories = load_documents("storyworld")
    return load_documents([stories[i] for i in range(40)])


@pytest.fixture(scope="module")
def sae(model, documents):
    sae = TopK(D_SAE, k=5).build(D)
    acts = model.activations(documents[:8], [SITE])[SITE]
    sae.initialise(acts, acts.mean(0), torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_enc[DEAD:] = -1e3
    return sae


@pytest.fixture(scope="module")
def stats(model, sae, documents):
    return collect_latents(model, sae, documents, SITE, tokens=2_000, quiet=True)


@pytest.fixture(scope="module")
def texts(model):
    return shown_tokens(model.tokenizer, range(model.d_vocab))


def read(page):
    """(head, {shard: data}) of a written dashboard."""
    shards = {}
    head = re.search(r'<script>.*?window\.__shard\("head",(.*?)\);</script>', page.read_text(), re.DOTALL)
    for file in (page.parent / "data").glob("*.js"):
        text = file.read_text()
        shards[file.stem] = json.loads(text[text.index('",', text.index("window.__shard(")) + 2 : -2])
    return json.loads(head[1]), shards


@pytest.fixture(scope="module")
def written(model, sae, documents, stats, tmp_path_factory):
    other = TopK(30, k=5).build(D)
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec[torch.arange(29, -1, -1)])
    page = build(
        model,
        sae,
        documents,
        SITE,
        tmp_path_factory.mktemp("dash") / "dash",
        stats=stats,
        concepts={3: ("weather=snowy", 0.97)},
        ablate=True,
        steer="The fox",
        explainer=keyword_explainer(stats, ()),
        second=Second("runs/other", other, SITE, {"fvu": 0.1}),
        exports=("csv", "json", "neuronpedia"),
        quiet=True,
    )
    return page, *read(page)


def test_every_latent_has_its_record(written, stats, model):
    _, head, shards = written
    ids = head["table"]["id"]
    records = [r for i in range((len(ids) + 63) // 64) for r in shards[f"latents-{i}"]]
    assert ids == np.flatnonzero(stats.count).tolist()
    assert len(records) == len(ids) == len(head["map"]["x"]) == len(head["table"]["label"])
    rows = [row for i in range(len(head["row_shards"])) for row in shards[f"rows-{i}"]]
    for latent, record in zip(ids, records):
        for example, shown in zip(stats.examples(latent), record["examples"]):
            assert rows[shown[1]] == stats.row(example.row).tolist()
        for row, position, closeness in record["misses"]:
            assert 0 <= position < len(rows[row])
            assert closeness <= 0
        assert [c[0] for c in record["co"]] == [i for i in stats.together[latent] if i >= 0]
        assert sum(record["logit_hist"][2]) == model.d_vocab
        assert {"ablation", "steer", "explanation", "about"} <= record.keys()
    assert head["cooccurrence_tokens"] == stats.n_tokens


def test_the_second_sae_is_matched_by_its_decoder(written):
    _, head, _ = written
    second = head["second"]
    assert second["name"] == "runs/other"
    assert second["summary"]["fvu"] == 0.1
    for latent, match in zip(head["table"]["id"], head["table"]["match"]):
        if latent < 30:
            assert match == [29 - latent, 1.0]
    assert second["unmatched"] == sum(cosine < 0.7 for _, cosine in head["table"]["match"])


def test_a_second_sae_of_another_width_is_refused(model, sae, documents, stats, tmp_path):
    with pytest.raises(InputError, match="width 7"):
        build(
            model,
            sae,
            documents,
            SITE,
            tmp_path / "d",
            stats=stats,
            second=Second("x", TopK(9, k=2).build(7), SITE),
        )
    assert not (tmp_path / "d").exists()


def test_ablation_is_the_loss_with_the_latent_taken_out(model, sae, stats):
    found = ablations(model, sae, stats, range(D_SAE))
    assert set(found) == set(np.flatnonzero(stats.count).tolist())
    for latent in (0, 11, 30):
        examples = [e for e in stats.examples(latent) if e.interval == 0][:4]
        assert [k for k, _, _ in sorted(found[latent].examples)] == list(range(len(examples)))
        total, n = 0.0, 0
        for (_, first, shown), example in zip(sorted(found[latent].examples), examples):
            ids = torch.from_numpy(stats.row(example.row).astype(np.int64))[None]
            special = torch.tensor([[int(i) in model.special_ids for i in ids[0]]])
            active = []

            def remove(act, latent=latent, special=special, active=active):
                f = sae.encode(act)[..., latent].masked_fill(special, 0)
                active.append(f[0] > 0)
                return act - f[..., None] * sae.W_dec[latent]

            with torch.no_grad():
                clean = model.logits(ids)[0, :-1].log_softmax(-1)
                with model.hooks({SITE: remove}):
                    ablated = model.logits(ids)[0, :-1].log_softmax(-1)
            change = (clean - ablated).gather(1, ids[0, 1:, None])[:, 0]
            start = example.position + first
            np.testing.assert_allclose(shown, change[start : example.position + WINDOW + 1], atol=2e-4)
            assert example.window[first + WINDOW] > 0
            total, n = total + float(change[active[0][:-1]].sum()), n + int(active[0][:-1].sum())
        assert found[latent].n == n
        assert found[latent].total == pytest.approx(total, abs=1e-3)


def test_ablation_of_a_transcoder_acts_at_its_target(model, documents):
    target = "blocks.0.hook_mlp_out"
    sae = Transcoder(20, k=3, target_site=target, d_out=D).build(D)
    generator = torch.Generator().manual_seed(0)
    sae.initialise(torch.randn(9, D, generator=generator), torch.zeros(D), generator)
    site = "blocks.0.hook_resid_mid"
    stats = collect_latents(model, sae, documents, site, tokens=400, quiet=True)
    assert np.isnan(stats.encoder_cosine).all()
    latent = int(stats.count.argmax())
    _, first, shown = sorted(ablations(model, sae, stats, [latent])[latent].examples)[0]
    example = stats.examples(latent)[0]
    ids = torch.from_numpy(stats.row(example.row).astype(np.int64))[None]
    with torch.no_grad():
        f = sae.encode(model.run(ids, sites=[site])[site])[0, :, latent]
        f[[int(i) in model.special_ids for i in ids[0]]] = 0
        clean = model.logits(ids)[0, :-1].log_softmax(-1)
        with model.hooks({target: lambda act: act - f[None, :, None] * sae.W_dec[latent]}):
            ablated = model.logits(ids)[0, :-1].log_softmax(-1)
    change = (clean - ablated).gather(1, ids[0, 1:, None])[:, 0]
    start = example.position + first
    np.testing.assert_allclose(shown, change[start : example.position + WINDOW + 1], atol=2e-4)


def test_a_preview_is_the_greedy_continuation_and_its_divergence(model, sae, stats):
    latent = int(stats.count.argmax())
    record = Preview(model, sae, stats, "The fox")([latent, DEAD])
    assert record[1] is None
    rows = record[0]["rows"]
    assert [row[0] for row in rows] == [0, *STRENGTHS]
    assert rows[0][1:] == [model.generate("The fox", max_new_tokens=NEW_TOKENS, do_sample=False), 0.0]
    prompt = model.tokenizer("The fox")["input_ids"]
    ends = {model.tokenizer.eos_token_id, model.model.generation_config.eos_token_id}
    for strength, text, kl in rows[1:]:
        step = strength * stats.maximum[latent] * sae.W_dec[latent].detach()
        ids, divergences = list(prompt), []
        while len(divergences) < NEW_TOKENS:
            row = torch.tensor([ids])
            with torch.no_grad():
                base = model.logits(row)[0, -1].double().log_softmax(-1)
                with model.hooks({SITE: lambda act, step=step: act + step}):
                    own = model.logits(row)[0, -1].double().log_softmax(-1)
            divergences.append(float((own.exp() * (own - base)).sum()))
            ids.append(int(own.argmax()))
            if ids[-1] in ends:
                break
        assert text == model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert kl == pytest.approx(np.mean(divergences), rel=2e-3, abs=1e-6)


def test_models_that_predict_no_next_token_are_refused(sae, stats):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    bert = HookedModel.from_pretrained(BertModel(config).eval())
    with pytest.raises(InputError, match="no next token"):
        ablations(bert, sae, stats, [0])
    with pytest.raises(InputError, match="continues no text"):
        Preview(bert, sae, stats)


def keyword_explainer(stats, failing):
    """Says a latent's strongest token, and predicts 1 there and 0 elsewhere."""

    def keyword(evidence: Evidence):
        if evidence.latent in failing:
            raise RuntimeError("out of quota")
        word = evidence.tokens[0][0]
        return f"the word {word}", lambda tokens: [float(token == word) for token in tokens]

    return keyword


def test_explanations_are_scored_on_contexts_that_were_not_shown(stats, texts):
    latent = int(stats.count.argmax())
    seen = []

    def perfect(evidence):
        seen.extend(evidence.contexts)
        known = {}
        for example in stats.examples(latent):
            ids = stats.row(example.row)
            first, end = max(0, example.position - WINDOW), min(len(ids), example.position + WINDOW + 1)
            tokens = tuple(texts[i] for i in ids[first:end])
            known[tokens] = example.window[
                first - example.position + WINDOW : end - example.position + WINDOW
            ]
        return "perfect", lambda tokens: 7 * known.get(tuple(tokens), np.zeros(len(tokens)))

    [record] = Explanations(perfect, stats, texts)([latent])
    assert record["score"] == pytest.approx(1.0)
    assert record["detection"] in (1.0, None)
    assert record["n"] + len(seen) == len(stats.examples(latent)) + (stats.miss_row[latent] >= 0).sum()
    assert seen[0].activations[seen[0].tokens.index(texts[stats.token_ids[latent, 0]])] >= 0


def test_a_failing_explainer_is_reported_and_nothing_is_lost(stats, texts):
    alive = np.flatnonzero(stats.count)[:3].tolist()
    records = Explanations(keyword_explainer(stats, {alive[1]}), stats, texts)([*alive, DEAD])
    assert "RuntimeError: out of quota" in records[1]["text"]
    assert records[1]["score"] is None
    assert records[0]["text"].startswith("the word")
    assert records[0]["by"] == "keyword"
    assert records[3] is None
    [wrong] = Explanations(lambda evidence: ("x", lambda tokens: [0.0]), stats, texts)(alive[:1])
    assert "simulator gave" in wrong["text"]


def test_descriptions_name_tokens_and_places(stats, texts, model):
    words = Describer(stats, texts, model.special_ids)
    for latent in np.flatnonzero(stats.count):
        about, label = words.about(latent, ("mood=happy", 0.912)), words.label(latent)
        assert f"“{texts[stats.token_ids[latent, 0]].strip()}”" in about
        assert about.endswith("Tells mood=happy (AUROC 0.91).")
        assert len(label) <= 60
        where = re.search(r"(?:after|before) “(.+?)”", label)
        if where and "after" in label:
            top = [e for e in stats.examples(latent) if e.interval == 0]
            before = [texts[stats.row(e.row)[e.position - 1]].strip() for e in top if e.position]
            assert before.count(where[1]) >= 0.8 * len(top)
    assert words.label(DEAD) == "silent"


def test_thin_evidence_is_warned_of(stats, texts):
    words = Describer(stats, texts)
    for latent in range(D_SAE):
        warnings = words.warnings(latent)
        few = 0 < stats.count[latent] < 10
        assert any("only" in w and "token" in w for w in warnings) == few
        assert any(w.startswith("dense") for w in warnings) == (stats.density[latent] > 0.2)
        assert any(w.startswith("encoder") for w in warnings) == (stats.encoder_cosine[latent] < 0.2)


@pytest.mark.parametrize("n", [1, 2, 9, 10, 300])
def test_the_map_has_a_place_for_each_and_is_the_same_again(n):
    directions = np.random.default_rng(0).normal(size=(n, 12)).astype(np.float32)
    x, y, _ = layout(directions)
    assert len(x) == len(y) == n
    assert min(x.min(), y.min()) >= 0
    assert max(x.max(), y.max()) <= 1_000
    again = layout(directions)
    np.testing.assert_array_equal(x, again[0])
    np.testing.assert_array_equal(y, again[1])


@pytest.mark.parametrize("most", [4_000, 100])
def test_the_map_keeps_clusters_together(most, monkeypatch):
    monkeypatch.setattr("sae.dashboard.layout.MOST", most)
    monkeypatch.setattr("sae.dashboard.layout.LANDMARKS", 150)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 20))
    which = rng.integers(0, 5, 600)
    x, y, method = layout(centres[which] + 0.1 * rng.normal(size=(600, 20)))
    assert ("between" in method) == (most < 600)
    places = np.stack([x, y], 1)
    distance = ((places[:, None] - places[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, 1 << 30)
    assert (which[distance.argmin(1)] == which).mean() > 0.98


def test_exports_hold_every_latent(written, stats, model, texts):
    page, head, _ = written
    assert head["exports"] == ["export/latents.csv", "export/latents.json", "export/neuronpedia/batch-0.json"]
    folder = page.parent / "export"
    with (folder / "latents.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    latents = json.loads((folder / "latents.json").read_text())
    batch = json.loads((folder / "neuronpedia" / "batch-0.json").read_text())
    ids = head["table"]["id"]
    assert [int(line["id"]) for line in table] == [latent["id"] for latent in latents] == ids
    assert [feature["feature_index"] for feature in batch["features"]] == ids
    for latent, feature in zip(latents, batch["features"]):
        i = latent["id"]
        assert latent["density"] == pytest.approx(stats.density[i], rel=1e-3)
        assert latent["tokens"] == [texts[t] for t in stats.token_ids[i] if t >= 0]
        assert sum(feature["freq_hist_data_bar_heights"]) == stats.count[i]
        assert sum(feature["logits_hist_data_bar_heights"]) == model.d_vocab
        assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
        assert feature["neg_values"] == sorted(feature["neg_values"])
        assert len(feature["activations"]) == len(stats.examples(i))
        for activation in feature["activations"]:
            peak = activation["values"][activation["qualifying_token_index"]]
            assert peak == max(activation["values"])
            assert len(activation["values"]) == len(activation["tokens"])


def test_an_interrupted_dashboard_leaves_the_earlier_one(model, sae, documents, stats, tmp_path):
    out = tmp_path / "dash"
    page = build(model, sae, documents, SITE, out, stats=stats, latents="top:5", quiet=True)
    before = {file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def impatient(evidence):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, sae, documents, SITE, out, stats=stats, explainer=impatient, quiet=True)
    assert {file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert page.exists()
    assert list(tmp_path.iterdir()) == [out]


def test_unknown_exports_are_refused(model, sae, documents, stats, tmp_path):
    with pytest.raises(InputError, match="no export 'pdf'"):
        build(model, sae, documents, SITE, tmp_path / "d", stats=stats, exports=("pdf",))
    with pytest.raises(InputError, match="no place for exports"):
        build(
            model, sae, documents, SITE, tmp_path / "d.html", stats=stats, exports=("csv",), single_file=True
        )
