"""Every tutorial runs from end to end, and the page that is shown is of the script as it is."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "build_tutorials.py"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_tutorials", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_tutorials"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])
def test_a_tutorial_runs_in_fast_mode(path, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = [text for cell, text in script.execute(path, fast=True) if not cell.is_text]
    assert any(said)


@pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])
def test_the_page_is_of_the_script(path, script):
    page, place = path.with_suffix(".md").read_text(), 0
    for cell in script.read(path):
        source = script.text_of(cell) if cell.is_text else cell.source.strip()
        found = page.find(source, place)
        assert found >= 0, (
            f"{path.name}:{cell.line} is not in the page: run scripts/build_tutorials.py {path.stem}"
        )
        place = found + len(source)


def test_a_cell_says_what_it_printed_and_its_last_value(script, tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        '# %% [markdown]\n# # Title\n\n# %% fast={"N": 2}\nN = 1\n# %%\nprint("said")\nN\n# %%\nN = None\nN\n'
    )
    assert [text for _, text in script.execute(path)] == ["", "", "said\n1", ""]
    executed = list(script.execute(path, fast=True))
    assert [text for _, text in executed] == ["", "", "said\n2", ""]
    page = script.page(path, executed, "Note.")
    assert page.startswith(
        '# Title\n\n```python\nN = 1\n```\n\n```python\nprint("said")\nN\n```\n\n```text\nsaid\n2\n```'
    )


def test_an_error_names_the_line_of_the_script(script, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("# %%\nfine = 1\n\n# %%\nfine\nraise KeyError('here')\n")
    with pytest.raises(KeyError) as caught:
        list(script.execute(path))
    assert (caught.traceback[-1].path.name, caught.traceback[-1].lineno + 1) == ("broken.py", 6)
    path.write_text("fine = 1\n# %%\n")
    with pytest.raises(ValueError, match=r"broken.py:1"):
        script.read(path)
