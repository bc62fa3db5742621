"""Runs that are interrupted end as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae
from steerkit.checkpoints import Checkpoints, read_tensors, write_tensors
from steerkit.errors import CheckpointError, InputError, NumericsError
from steerkit.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import LABELS, OTHER, SITE, SparseStream

ARCHS = [
    sae.Gated(64, target_l0=4.0),
    sae.SqrtL1(64, target_l0=4.0),
    sae.L1(64, l1=0.5),
    sae.TopK(64, k=4),
    sae.BatchTopK(64, k=4),
    sae.JumpReLU(64, target_l0=4.0),
    sae.PAnneal(64, target_l0=4.0),
    sae.Matryoshka(64, k=4),
    sae.HierarchicalTopK(64, k=4),
    sae.Guided(64, k=4, labels=LABELS),
    sae.Transcoder(64, k=4, target_site=OTHER, skip=True),
    sae.Crosscoder(64, k=4),
]
SITES = {"crosscoder": f"{SITE},{OTHER}"}
EACH = pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
BATCH = 128
CONFIG = sae.TrainConfig(batch_size=BATCH, log_every=5, dead_after=6 * BATCH)
TOKENS = 30 * BATCH


class Interrupting(SparseStream):
    """Sends this process a signal while batch `at` is asked for."""

    at: int | None = None
    number = signal.SIGINT

    def __next__(self):
        if self.batches == self.at:
            self.at = None
            os.kill(os.getpid(), self.number)
        return super().__next__()


def fitted(arch, out, stream=None, resume=False, **options):
    run = Run.open(out, "train sae", arch.to_dict(), resume=resume)
    stream, site = stream or SparseStream("heavy", batch_size=BATCH), SITES.get(arch.name, SITE)
    return sae.fit(stream, site, arch, TOKENS, config=CONFIG, run=run, **options)[0]


def same(left, right):
    pairs = zip(left.state_dict().items(), right.state_dict().items())
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_every_architecture_is_resumed():
    assert {arch.name for arch in ARCHS} == set(sae.REGISTRY)


@EACH
def test_an_interrupted_run_ends_bit_identical(arch, tmp_path):
    number = (signal.SIGINT, signal.SIGTERM)[ARCHS.index(arch) % 2]
    whole = fitted(arch, tmp_path / "whole")
    stream = Interrupting("heavy", batch_size=BATCH)
    stream.at, stream.number = 13, number
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        fitted(arch, tmp_path / "cut", stream)
    assert signal.getsignal(number) == before
    assert Checkpoints(tmp_path / "cut/checkpoint").load()[1]["steps"] == 14
    assert same(fitted(arch, tmp_path / "cut", resume=True), whole)


@EACH
def test_metrics_are_the_same_after_a_resume(arch, tmp_path):
    def lines(name):
        kept = Run.load(tmp_path / name).metrics()
        return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in kept]

    fitted(arch, tmp_path / "whole")
    stream = SparseStream("heavy", batch_size=BATCH)
    stream.nan_at = 23
    with pytest.raises(NumericsError):
        fitted(arch, tmp_path / "cut", stream, checkpoint_seconds=0.0)
    Run.load(tmp_path / "cut").log({"step": 29, "tokens": 29 * BATCH, "loss": -1.0})
    fitted(arch, tmp_path / "cut", resume=True)
    assert lines("cut") == lines("whole")
    assert [line["step"] for line in lines("cut")] == [5, 10, 15, 20, 25, 30]


def test_nan_in_the_activations_names_batch_and_site_and_keeps_the_last_checkpoint(tmp_path):
    stream = SparseStream(batch_size=BATCH)
    stream.nan_at = 7
    with pytest.raises(NumericsError, match=r"batch 7 at site"):
        fitted(ARCHS[0], tmp_path / "r", stream, checkpoint_seconds=0.0)
    tensors, state = Checkpoints(tmp_path / "r/checkpoint").load()
    assert state["steps"] == 7
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_resume_without_a_checkpoint_starts_afresh(tmp_path):
    whole = fitted(ARCHS[0], tmp_path / "a")
    assert same(fitted(ARCHS[0], tmp_path / "b", resume=True), whole)


def test_resume_with_other_settings_is_refused(tmp_path):
    fitted(ARCHS[0], tmp_path / "r")
    with pytest.raises(InputError, match="holds another run: "):
        fitted(ARCHS[1], tmp_path / "r", resume=True)
    with pytest.raises(InputError, match="Continue it with --resume"):
        fitted(ARCHS[0], tmp_path / "r")


def interrupted_at(out, steps, arch=ARCHS[0]):
    stream = SparseStream("heavy", batch_size=BATCH)
    stream.nan_at = steps
    with pytest.raises(NumericsError):
        fitted(arch, out, stream, checkpoint_seconds=0.0)
    return Checkpoints(out / "checkpoint").files()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def edit_state(path):
    content = path.read_bytes()
    assert content.count(b"gradient_norm") == 1
    path.write_bytes(content.replace(b"gradient_norm", b"gradient_morn"))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, edit_state, empty])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(damage, tmp_path, capsys):
    whole = fitted(ARCHS[0], tmp_path / "whole")
    older, newest = interrupted_at(tmp_path / "r", 17)
    damage(newest)
    assert Checkpoints(tmp_path / "r/checkpoint").load()[1]["steps"] == 16
    assert "damaged" in capsys.readouterr().err
    assert same(fitted(ARCHS[0], tmp_path / "r", resume=True), whole)
    damage(older := interrupted_at(tmp_path / "s", 9)[0])
    damage(older.with_name("step-0000000009.safetensors"))
    with pytest.raises(CheckpointError, match="damaged"):
        fitted(ARCHS[0], tmp_path / "s", resume=True)


def test_a_checkpoint_holds_what_was_saved(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(2.5)}
    write_tensors(tmp_path / "x", tensors, {"pi": 3.141592653589793, "list": [1, 2], "none": None})
    found, state = read_tensors(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert state == {"pi": 3.141592653589793, "list": [1, 2], "none": None}
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(tmp_path / "y")


def test_leftovers_of_a_kill_in_the_middle_of_a_write_do_no_harm(tmp_path):
    (interrupted := interrupted_at(tmp_path / "r", 5))[0].with_name(
        ".step-0000000006.safetensors.1.2.tmp"
    ).write_bytes(b"half")
    fitted(ARCHS[0], tmp_path / "r", resume=True)
    assert not list(interrupted[0].parent.glob(".*"))


def test_sigkill_at_any_moment_changes_nothing(tmp_path):
    script = Path(__file__).with_name("synthetic.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    seed = str(int.from_bytes(os.urandom(4)))
    done = subprocess.run(
        [sys.executable, script, tmp_path, seed], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    whole, killed, kills = done.stdout.split()[-3:]
    assert int(kills) >= 2, "the run was over before it could be killed twice"
    assert killed == whole, f"seed {seed}, killed {kills} times"
