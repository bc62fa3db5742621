"""The page of benchmarks says what was measured, and is of the records that lie beside it."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script():
    path = ROOT / "scripts" / "make_benchmarks_page.py"
    spec = importlib.util.spec_from_file_location("make_benchmarks_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_of_the_records(script):
    assert (ROOT / "docs" / "benchmarks.md").read_text() == script.page(), (
        "run scripts/make_benchmarks_page.py"
    )


def test_a_record_keeps_what_was_printed_and_its_json(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "bench_it.py").write_text(
        '"""How fast it is.\n\nMore.\n"""\nimport sys\nprint("fast  2.0")\nprint(\'{"option": "\' + sys.argv[1] + \'"}\')\n'
    )
    record = script.run("bench_it", ["--so"])
    assert (record["printed"], record["json"]) == ("fast  2.0", {"option": "--so"})
    assert json.loads(json.dumps(record)) == record
    section = script.section(record)
    assert section.startswith("## How fast it is\n\n`python scripts/bench_it.py --so`, 20")
    assert section.endswith("```text\nfast  2.0\n```\n")
