"""Sixteen thousand latents: everything still answers. `scripts/bench_dashboard_page.py` says how fast."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

N = 16_384


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "bench_dashboard_page.py"
    spec = importlib.util.spec_from_file_location("bench_dashboard_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def large(script, dashboard, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "dash"
    return script.made_up(dashboard.parent, folder, N)


def test_table_map_and_pages_answer(visit, large):
    page = visit(large)
    assert page.text_content("#found") == f"{N:,} latents"
    assert page.locator("#rows .row").count() < 100
    page.evaluate("document.getElementById('scroll').scrollTop = 1e9")
    page.wait_for_selector(f"#rows .row[aria-rowindex='{N + 1}']")
    box = page.locator("#map canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 120, middle[1] + 40, steps=20)
    page.mouse.up()
    for _ in range(5):
        page.mouse.wheel(0, -300)
    page.fill("#search", "#16383")
    assert page.text_content("#found") == f"1 latent of {N:,}"
    page.keyboard.press("Enter")
    page.wait_for_selector("#name:text-is('Latent 16383')")
    page.wait_for_function("document.querySelectorAll('#strongest .peak').length === 20")


def test_every_kind_of_time_is_measured(browser, script, large, capsys):
    times = script.measure(browser, large, rounds=1)
    with capsys.disabled():
        print(f"\n{N:,} latents, milliseconds: {times}")
    assert set(times) == {"overview", "plots", "search", "map frame", "latent, new", "latent, next"}
    assert all(0 < value < 60_000 for values in times.values() for value in values)
