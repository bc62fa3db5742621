"""The dashboard in a real browser, opened from disk."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from steerkit.errors import InputError
from tests.browser.pages import DEAD, MALICIOUS


def column(page, place: int) -> list[str]:
    return page.eval_on_selector_all(
        "#rows .row",
        f"rows => rows.map((row) => (row.children[{place}].querySelector('a') ?? row.children[{place}]).textContent)",
    )


def test_overview_shows_summary_and_latents(visit, dashboard):
    page = visit(dashboard, plots=True)
    assert page.text_content("#title") == page.title() == "Latents of a tiny model"
    tiles = page.text_content("#tiles")
    assert "0.035" in tiles
    assert "98.3 %" in tiles
    assert page.text_content("#found") == "60 latents"
    page.wait_for_selector("#density-plot .bars")


def test_sorting(visit, dashboard):
    page = visit(dashboard)
    shares = [float(text.removesuffix(" %")) for text in column(page, 1)]
    assert shares == sorted(shares, reverse=True)
    page.click("#columns button[data-key=id]")
    assert [int(i) for i in column(page, 0)][:5] == [0, 1, 2, 3, 4]
    page.click("#columns button[data-key=id]")
    assert column(page, 0)[0] == str(DEAD - 1)
    page.click("#columns button[data-key=auroc]")
    assert column(page, 0)[0] == "3"


def test_search(visit, dashboard):
    page = visit(dashboard)
    page.fill("#search", "SNOWY #3")
    assert column(page, 0) == ["3"]
    page.fill("#search", "nothing-has-this")
    assert "No latent matches" in page.text_content("#rows")
    assert page.text_content("#found") == "0 latents of 60"


def test_deep_link_shows_the_latent(visit, dashboard, parts):
    stats = parts[3]
    page = visit(dashboard, "#latent=3", plots=True)
    page.wait_for_selector("#histogram .bars")
    assert page.text_content("#latent h2") == "Latent 3"
    assert "weather=snowy (AUROC 0.970)" in page.text_content(".facts")
    n = len(stats.examples(3))
    page.wait_for_function(f"document.querySelectorAll('.text .peak').length === {n}")
    values = page.eval_on_selector_all(".context .value", "all => all.map((e) => Number(e.textContent))")
    assert values[0] == pytest.approx(stats.maximum[3], abs=0.01)
    assert page.locator(".columns table").count() == 5
    page.hover(".text .peak")
    assert page.text_content("#tip").endswith(page.text_content(".context .value"))


def test_a_click_on_a_context_shows_the_whole_row(visit, dashboard):
    page = visit(dashboard, "#latent=3")
    page.wait_for_selector(".text .peak")
    before = page.locator(".context").first.locator(".text span").count()
    page.locator(".context").first.click()
    assert page.locator(".context").first.locator(".text span").count() > before


def test_keys_and_links_lead_to_other_latents(visit, dashboard):
    page = visit(dashboard)
    ids = column(page, 0)
    page.click("#rows .row >> nth=1")
    page.wait_for_function(f"document.querySelector('#latent h2')?.textContent === 'Latent {ids[1]}'")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('#latent h2')?.textContent === 'Latent {ids[2]}'")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"document.querySelector('#latent h2')?.textContent === 'Latent {ids[1]}'")
    page.click(".near a >> nth=0")
    page.wait_for_function(f"document.querySelector('#latent h2')?.textContent !== 'Latent {ids[1]}'")
    page.keyboard.press("Escape")
    page.wait_for_selector("#overview", state="visible")


@pytest.mark.parametrize(
    ("fragment", "text"),
    [(f"#latent={DEAD}", "is dead"), ("#latent=99999", "no such latent"), ("#latent=x<b>", "no such latent")],
)
def test_latents_without_a_page(visit, dashboard, fragment, text):
    page = visit(dashboard, fragment)
    page.wait_for_selector(".friendly")
    assert text in page.text_content(".friendly")


def test_tokens_are_text_whatever_they_hold(visit, dashboard, parts):
    stats = parts[3]
    shown = MALICIOUS.replace("\u2028", "◌").strip()
    page = visit(dashboard)
    assert shown in page.text_content("#rows")
    latent = next(e for e in range(DEAD) if stats.token_ids[e][0] >= 0)
    page.goto(dashboard.resolve().as_uri() + f"#latent={latent}")
    page.wait_for_selector(".text .peak")
    assert shown in page.text_content("#latent")
    assert page.locator("img").count() == 0


def test_control_characters_are_shown(visit, dashboard, parts):
    """Byte-level vocabularies have a token that is NUL."""
    model, _, _, stats = parts
    comma = model.tokenizer.convert_tokens_to_ids(",")
    examples = [(latent, example) for latent in range(DEAD) for example in stats.examples(latent)]
    latent = next(latent for latent, example in examples if stats.row(example.row)[example.position] == comma)
    page = visit(dashboard, f"#latent={latent}")
    page.wait_for_selector(".text .peak")
    page.wait_for_function(
        "[...document.querySelectorAll('.text')].every((text) => text.textContent !== '…')"
    )
    assert "␀" in page.eval_on_selector_all(".text .peak", "peaks => peaks.map((peak) => peak.textContent)")


def test_the_table_tells_what_it_is(visit, dashboard):
    """Headers, cells and links by their roles, as a screen reader finds them."""
    page = visit(dashboard)
    table = page.get_by_role("table", name="Latents")
    headers = table.get_by_role("columnheader")
    assert headers.nth(0).inner_text() == "Latent"
    assert page.locator("[aria-sort=descending]").inner_text().startswith("Density")
    rows = table.get_by_role("row")
    assert rows.nth(1).get_by_role("cell").count() == headers.count()
    latent = rows.nth(1).get_by_role("link").inner_text()
    rows.nth(1).click(position={"x": 400, "y": 10})
    page.wait_for_selector(f"h2:text-is('Latent {latent}')")


def test_dark_follows_the_system_and_the_switch(visit, dashboard):
    page = visit(dashboard, scheme="dark")

    def brightness():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    assert brightness() < 150
    page.click("[data-switch-theme]")
    assert brightness() > 600
    page.reload()
    assert brightness() > 600


def test_single_file(visit, make, tmp_path):
    path = make(tmp_path / "one.html", single_file=True, latents=[3, DEAD])
    assert path == tmp_path / "one.html"
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.html"]
    page = visit(path, "#latent=3", plots=True)
    page.wait_for_selector("#histogram .bars")
    page.wait_for_selector(".text .peak")
    page.goto(path.as_uri() + f"#latent={DEAD}")
    page.wait_for_selector(".columns .friendly")
    page.goto(path.as_uri() + "#latent=5")
    page.wait_for_selector("text=not in this dashboard")
    make(path, single_file=True, latents=[3])


def test_a_page_of_figures(visit, tmp_path):
    import plotly.graph_objects as go

    from steerkit.plots import page as write_page

    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="</script><b>"))
    path = write_page("Steering <1>", ["<h2>Part</h2>", figure], tmp_path / "sub" / "report.html")
    page = visit(path, scheme="dark", plots=True)
    page.wait_for_selector(".figure .scatterlayer")
    assert page.text_content("h1") == "Steering <1>"
    assert (tmp_path / "sub" / "plotly.min.js").stat().st_size > 1e6


def test_files_are_few_and_small(dashboard, parts):
    folder = dashboard.parent
    data = sum(file.stat().st_size for file in (folder / "data").iterdir())
    assert data < 10_000 * 60
    assert len(list(folder.rglob("plotly.min.js"))) == 1
    assert "http" not in (folder / "index.html").read_text().replace("http-equiv", "")


def test_replaces_its_own_output_and_nothing_else(make, tmp_path):
    first = make(tmp_path / "dash", latents="top:5")
    assert json.loads((first.parent / "steerkit-dashboard.json").read_text())["latents"] == 5
    make(tmp_path / "dash", latents="top:3")
    assert json.loads((first.parent / "steerkit-dashboard.json").read_text())["latents"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["dash"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        make(foreign)
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(InputError, match="no dashboard"):
        make(tmp_path / "page.html", single_file=True)


@pytest.mark.parametrize("latents", ["tops", "top:0", [1000], [-1], []])
def test_bad_choices_of_latents(make, tmp_path, latents):
    with pytest.raises(InputError):
        make(tmp_path / "dash", latents=latents)
    assert not (tmp_path / "dash").exists()


def test_a_single_file_that_is_too_large_is_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("sae.dashboard.pages"), "SINGLE_FILE_BYTES", 4_000_000)
    with pytest.raises(InputError, match="leave out --single-file"):
        make(tmp_path / "dash", single_file=True)
    assert not (tmp_path / "dash").exists()
