"""Many SAEs in one pass: each is what it would be alone, and the report says what came of them."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

import sae
from sae.sweep import summarise, sweep_page
from sae.trainer import fit_all
from steerkit import storyworld
from steerkit.checkpoints import Checkpoints
from steerkit.errors import CheckpointError, InputError, NumericsError, SiteError
from steerkit.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import LABELS, OTHER, SITE, SparseStream

FIRST, SECOND = "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"
SETTINGS = {"batch_size": 256, "block_tokens": 1024, "held_out_tokens": 400, "log_every": 4}
JOBS = [
    *(sae.Job(SECOND, sae.TopK(48, k=k), seed) for k in (2, 6) for seed in (0, 1, 2)),
    sae.Job(SECOND, sae.Gated(48, target_l0=4.0)),
    sae.Job(FIRST, sae.BatchTopK(32, k=3), name="of the first"),
]
SIDE_BY_SIDE = {
    "gated": sae.Job(SITE, sae.Gated(64, target_l0=4.0), seed=3),
    "batch_topk": sae.Job(OTHER, sae.BatchTopK(48, k=4), seed=0),
    "jumprelu": sae.Job(SITE, sae.JumpReLU(64, target_l0=4.0)),
    "guided": sae.Job(SITE, sae.Guided(64, k=4, labels=LABELS), seed=1),
    "transcoder": sae.Job(SITE, sae.Transcoder(64, k=4, target_site=OTHER)),
    "crosscoder": sae.Job(f"{SITE},{OTHER}", sae.Crosscoder(64, k=4)),
}
BATCH, STEPS = 128, 24
CONFIG = sae.TrainConfig(batch_size=BATCH, log_every=5, dead_after=6 * BATCH)


def stream(nan_at=None):
    made = SparseStream("heavy", batch_size=BATCH)
    made.nan_at = nan_at
    return made


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def weights(run):
    return load_file(run.path / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def texts():
    return [story.text for story in storyworld.sample(50, seed=4)]


@pytest.fixture(scope="module")
def swept(model, texts, tmp_path_factory):
    """The runs of a pass, by their directories' names, and the directory of the pass."""
    out = tmp_path_factory.mktemp("sweep") / "s"
    made = sae.train_many(model, texts, JOBS, 4096, out, quiet=True, **SETTINGS)
    return {run.path.name: run for run in made}, out


# -- what is trained -------------------------------------------------------------------------------------------------


def test_saes_side_by_side_are_what_each_is_alone():
    together = fit_all(stream(), SIDE_BY_SIDE, STEPS * BATCH, config=CONFIG)
    for name, job in SIDE_BY_SIDE.items():
        seeded = CONFIG.with_({} if job.seed is None else {"seed": job.seed})
        alone, _ = sae.fit(stream(), job.site, job.arch, STEPS * BATCH, config=seeded)
        assert equal(together[name][0].state_dict(), alone.state_dict()), name


def test_a_run_of_a_pass_is_the_run_that_train_makes(swept, model, texts, tmp_path):
    runs, _ = swept
    one = [sae.Job(SECOND, sae.TopK(48, k=2), 1)]
    (alone,) = sae.train_many(model, texts, one, 4096, tmp_path / "one", quiet=True, **SETTINGS)
    # The pass reads another site too: the same tokens, as long as no token is a sink at either.
    assert equal(weights(runs[f"topk-{SECOND}-k2-seed1"]), weights(alone))
    of_train = sae.train(
        model, texts, SECOND, sae.Gated(48, target_l0=4.0), 4096, tmp_path / "g", quiet=True, **SETTINGS
    )
    gated = next(run for name, run in runs.items() if name.startswith("gated"))
    assert equal(weights(gated), weights(of_train))
    timed = {"tokens_per_second", "peak_memory_mb", "seconds"}
    found, expected = (
        {key: value for key, value in run.summary.items() if key not in timed} for run in (gated, of_train)
    )
    assert found == expected
    assert {p.name for p in gated.path.iterdir()} == {p.name for p in of_train.path.iterdir()}
    assert gated.config == of_train.config


def test_the_model_runs_once_for_all(model, texts, tmp_path):
    calls = {"embedded": 0, "predicted": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    handles = [
        model.model.get_input_embeddings().register_forward_hook(count("embedded")),
        model.model.get_output_embeddings().register_forward_hook(count("predicted")),
    ]
    reading = []
    try:
        for jobs in (JOBS[:1], JOBS[:6]):
            calls.update(embedded=0, predicted=0)
            sae.train_many(model, texts, jobs, 2048, tmp_path / str(len(jobs)), quiet=True, **SETTINGS)
            reading.append(calls["embedded"] - calls["predicted"])  # forwards for training end at the site
    finally:
        for handle in handles:
            handle.remove()
    assert reading[0] == reading[1] > 0


def test_seeds_differ_in_the_weights_alone(swept):
    runs, _ = swept
    first, second = (runs[f"topk-{SECOND}-k2-seed{seed}"] for seed in (0, 1))
    assert not torch.allclose(weights(first)["W_enc"], weights(second)["W_enc"])
    assert second.config["training"]["seed"] == 1
    origin = json.loads((second.path / "provenance.json").read_text())
    assert origin["seed"] == 1
    assert origin["pass"] == {"seed": 0, "jobs": list(runs)}


# -- interruptions ---------------------------------------------------------------------------------------------------


def test_an_interrupted_pass_ends_bit_identical(tmp_path):
    def fitted(name, of):
        runs = {job: Run.open(tmp_path / name / job, "train sae", {}, resume=True) for job in SIDE_BY_SIDE}
        made = fit_all(
            of,
            SIDE_BY_SIDE,
            STEPS * BATCH,
            config=CONFIG,
            runs=runs,
            checkpoints=Checkpoints(tmp_path / name / "checkpoint"),
            checkpoint_seconds=0.0,
        )
        lines = {
            job: [{**line, "tokens_per_second": 0} for line in run.metrics()] for job, run in runs.items()
        }
        return made, lines

    whole, logged = fitted("whole", stream())
    for at in (7, 16):
        with pytest.raises(NumericsError):
            fitted("cut", stream(nan_at=at))
    cut, logged_in_parts = fitted("cut", stream())
    for name in SIDE_BY_SIDE:
        assert equal(whole[name][0].state_dict(), cut[name][0].state_dict()), name
    assert logged == logged_in_parts


def test_a_checkpoint_of_other_jobs_is_refused(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoint")
    two = {name: SIDE_BY_SIDE[name] for name in ("gated", "guided")}
    fit_all(stream(), two, STEPS * BATCH, config=CONFIG, checkpoints=kept)
    other = {name: SIDE_BY_SIDE[name] for name in ("gated", "jumprelu")}
    with pytest.raises(CheckpointError, match="SAEs gated, guided, here they are gated, jumprelu"):
        fit_all(stream(), other, STEPS * BATCH, config=CONFIG, checkpoints=kept)


def test_a_finished_pass_is_given_as_it_is(swept, model, texts):
    runs, out = swept
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = sae.train_many(model, texts, JOBS, 4096, out, quiet=True, resume=True, **SETTINGS)
    assert [run.path for run in again] == [run.path for run in runs.values()]
    assert [run.summary for run in again] == [run.summary for run in runs.values()]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_pass_that_was_cut_before_its_report_gets_it(swept, model, texts):
    runs, out = swept
    kept = {name: (out / name).read_text() for name in ("summary.json", "report.html")}
    for name in kept:
        (out / name).unlink()
    sae.train_many(model, texts, JOBS, 4096, out, quiet=True, resume=True, **SETTINGS)
    assert (out / "summary.json").read_text() == kept["summary.json"]
    assert (out / "report.html").exists()


# -- the report ------------------------------------------------------------------------------------------------------


def test_the_summary_has_every_sae_and_every_setting(swept):
    runs, out = swept
    summary = json.loads((out / "summary.json").read_text())
    assert not (out / "checkpoint").exists()
    assert [line["run"] for line in summary["results"]] == list(runs)
    for line, job in zip(summary["results"], JOBS):
        of_run = runs[line["run"]].summary
        assert line["site"] == job.site
        assert line["seed"] == (job.seed or 0)
        assert line["settings"] == json.loads(json.dumps(job.arch.to_dict()))
        for key in ("l0", "fvu", "ce_recovered", "delta_ce", "kl", "dead_fraction"):
            assert line[key] == of_run[key], key
    assert [(g["arch"], g["sparsity"], g["seeds"]) for g in summary["groups"]] == [
        ("topk", "k 2", [0, 1, 2]),
        ("topk", "k 6", [0, 1, 2]),
        ("gated", "L0 4", [0]),
        ("batch_topk", "k 3", [0]),
    ]


def test_intervals_over_seeds_are_students_and_of_one_seed_those_of_the_documents(swept):
    _, out = swept
    summary = json.loads((out / "summary.json").read_text())
    lines = {line["run"]: line for line in summary["results"]}
    for group in summary["groups"]:
        for key in ("fvu", "ce_recovered", "delta_ce"):
            values = [lines[run][key] for run in group["runs"]]
            found = group[key]
            assert found["mean"] == pytest.approx(statistics.mean(values))
            if len(values) == 1:
                of_run = lines[group["runs"][0]]["intervals"][key]
                assert (found["low"], found["high"]) == (of_run["low"], of_run["high"])
                assert (found["over"], found["sd"]) == ("documents", None)
                continue
            half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
            assert found["sd"] == pytest.approx(statistics.stdev(values))
            assert found["low"] == pytest.approx(found["mean"] - half)
            assert found["high"] == pytest.approx(found["mean"] + half)
            assert found["over"] == "seeds"


def test_the_report_draws_every_site_and_needs_no_network(swept):
    _, out = swept
    page = (out / "report.html").read_text()
    for text in (
        FIRST,
        SECOND,
        "8 SAEs of 2 sites",
        "4,096 tokens",
        "means of 3 seeds",
        "k 2",
        "k 6",
        "L0 4",
    ):
        assert text in page, text
    assert page.count("CE recovered against L0") == 2
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)


def made_up(l0, recovered):
    return {"l0": l0, "ce_recovered": recovered, "fvu": 1 - recovered, "tokens": 100}


def test_pareto_is_what_no_other_of_the_site_beats(tmp_path):
    def job(k, site="a"):
        return sae.Job(site, sae.TopK(64, k=k), 0)

    found = {
        "best": (job(8), made_up(8.0, 0.9)),
        "worse": (job(9), made_up(9.0, 0.8)),
        "sparser": (job(4), made_up(4.0, 0.7)),
        "elsewhere": (job(16, "b"), made_up(16.0, 0.5)),
    }
    summary = summarise(found)
    assert [group["pareto"] for group in summary["groups"]] == [True, False, True, True]
    without = summarise({n: (j, {**s, "ce_recovered": None}) for n, (j, s) in found.items()})
    assert [group["pareto"] for group in without["groups"]] == [True, False, True, True]
    page = sweep_page(without, tmp_path / "p.html").read_text()
    assert "FVU against L0" in page
    assert "CE recovered against L0" not in page


# -- names and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "names"),
    [
        ([sae.Job("a", sae.TopK(64, k=4))], ["topk"]),
        ([sae.Job("a", sae.TopK(64, k=k)) for k in (4, 8)], ["topk-k4", "topk-k8"]),
        ([sae.Job(s, sae.TopK(64, k=4)) for s in ("a/b", "c")], ["topk-a_b", "topk-c"]),
        ([sae.Job("a", sae.TopK(d, k=4), s) for d in (64, 96) for s in (0, 1)],
         ["topk-d64-seed0", "topk-d64-seed1", "topk-d96-seed0", "topk-d96-seed1"]),
        ([sae.Job("a", sae.TopK(64, k=4)), sae.Job("a", sae.Gated(64, target_l0=4.0))], ["topk", "gated"]),
        ([sae.Job("a", sae.Gated(64, target_l0=4.0)), sae.Job("a", sae.Gated(64, target_l0=2.5))],
         ["gated-l0_4", "gated-l0_2.5"]),
        ([sae.Job("a", sae.TopK(64, k=4), name="mine"), sae.Job("b", sae.TopK(64, k=4))], ["mine", "topk-b"]),
    ],
)  # fmt: skip
def test_names_say_what_differs(jobs, names):
    assert sae.job_names(jobs) == names


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([], "at least one job"),
        ([JOBS[0], JOBS[0]], "the same, or have the same name: topk"),
        (
            [sae.Job("a", sae.TopK(8, k=1), name="x"), sae.Job("b", sae.TopK(8, k=1), name="x")],
            "same name: x",
        ),
        ([sae.Job("a", sae.TopK(8, k=1), name="../x")], "cannot be called '../x'"),
        ([sae.Job("a", sae.TopK(8, k=1), name="checkpoint")], "cannot be called 'checkpoint'"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(jobs, message, model, texts, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        sae.train_many(model, texts, jobs, 4096, tmp_path / "out", quiet=True, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_an_unknown_site_is_named_before_anything_is_written(model, texts, tmp_path):
    jobs = [JOBS[0], sae.Job("blocks.7.hook_resid_pre", sae.TopK(8, k=1))]
    with pytest.raises(SiteError, match=r"blocks\.7\.hook_resid_pre"):
        sae.train_many(model, texts, jobs, 4096, tmp_path / "out", quiet=True, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_another_pass_is_refused(swept, model, texts):
    _, out = swept
    with pytest.raises(InputError, match="finished run"):
        sae.train_many(model, texts, JOBS, 4096, out, quiet=True, **SETTINGS)
    with pytest.raises(InputError, match="holds another run: jobs"):
        sae.train_many(model, texts, JOBS[:2], 4096, out, quiet=True, resume=True, **SETTINGS)
    with pytest.raises(InputError, match="holds another run: kind is 'train sae' there"):
        sae.train_many(
            model, texts, JOBS, 4096, out / f"topk-{SECOND}-k2-seed0", quiet=True, resume=True, **SETTINGS
        )
    with pytest.raises(InputError, match="holds another run: kind is 'sweep sae' there"):
        sae.train(model, texts, SECOND, JOBS[0].arch, 4096, out, quiet=True, resume=True, **SETTINGS)
