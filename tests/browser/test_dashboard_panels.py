"""What a dashboard shows when the back end has measured everything: hand-made data in the pages of a small one.

All text in it is as an attacker would have it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.browser.pages import DEAD, MALICIOUS, rewrite

LATENT = 3
SHOWN = MALICIOUS.replace("\u2028", "◌")
UNSTEERED = "A cat sat on the mat."
CHINESE = 50_001
"""Two tokens that share a character."""


@pytest.fixture(scope="module")
def full(dashboard, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "dash"
    shutil.copytree(dashboard.parent, folder)
    rewrite(folder / "index.html", _head)
    first = rewrite(folder / "data" / "latents-0.js", lambda records: [_record(record) for record in records])
    row, position = first[LATENT]["examples"][0][1:3]

    def with_chinese(rows):
        rows[row][position - 1 : position + 1] = [CHINESE, CHINESE + 1]
        return rows

    rewrite(folder / "data" / "rows-0.js", with_chinese)
    rewrite(
        folder / "data" / "tokens.js",
        lambda tokens: {
            "ids": [*tokens["ids"], CHINESE, CHINESE + 1],
            "text": [*tokens["text"], "\udc00e4b8", "\udc00ad"],
        },
    )
    return folder / "index.html"


def _head(head):
    n = len(head["table"]["id"])
    here = head["table"]["id"].index(LATENT)
    far = [i != here for i in range(n)]
    head["title"] = MALICIOUS
    head["map"] = {
        "x": [1000 * (i % 2) if away else 500 for i, away in enumerate(far)],
        "y": [1000 * (i % 3 > 0) if away else 500 for i, away in enumerate(far)],
        "method": MALICIOUS,
    }
    head["table"]["label"] = [f"{MALICIOUS} number {i}" for i in head["table"]["id"]]
    head["table"]["warn"] = [int(i in (LATENT, 7)) for i in head["table"]["id"]]
    head["table"]["match"] = [None if i % 2 else [i, 0.9 if i else 0.2] for i in head["table"]["id"]]
    head["second"] = {
        "name": MALICIOUS,
        "site": "x",
        "d_sae": 9,
        "unmatched": 31,
        "summary": {"l0": 77.5, "kl": 0.25},
    }
    head["exports"] = ["export/latents.csv", *(f"export/neuronpedia/batch-{i}.json" for i in range(2))]
    return head


def _record(record):
    first = record["examples"][0]
    return record | {
        "logit_hist": [-1, 2, [1, 10, 100, 10, 0, 1]],
        "misses": [[first[1], first[2], -0.25], [first[1], 0, None]],
        "co": [[5, 0.5, 1.25, 321], [DEAD, 0.1, -2, 4]],
        "ablation": {"mean": 0.125, "n": 40, "examples": [[0, 0, [0.5, -0.25, 0]]]},
        "steer": {
            "prompt": MALICIOUS,
            "unit": MALICIOUS,
            "rows": [
                [0, UNSTEERED, 0],
                [-1, "No.", 0.5],
                [1, "A cat ran\n" + MALICIOUS, 1.5],
                [2, "Dogs.", 3],
            ],
        },
        "about": "About " + MALICIOUS,
        "explanation": {
            "text": "Explained " + MALICIOUS,
            "by": MALICIOUS,
            "score": 0.5,
            "n": 12,
            "detection": 0.75,
        },
        "warn": ["Thin " + MALICIOUS],
    }


def open_latent(visit, full, **options):
    page = visit(full, f"#latent={LATENT}", **options)
    page.wait_for_function(
        "[...document.querySelectorAll('.context .text')].every((text) => text.children.length)"
    )
    page.wait_for_selector(".text .peak")
    return page


def test_every_panel_shows_and_nothing_is_html(visit, full):
    page = open_latent(visit, full, plots=True)
    shown = page.text_content("#latent")
    for start in ("About ", "Explained ", "Thin "):
        assert start + SHOWN in shown
    assert "correlation 0.50 with the activations on 12 contexts" in shown
    assert "tells 75 % of active and silent ones apart" in shown
    assert "+0.125 nats a token" in shown
    assert page.text_content("#misses .value") == "−0.25"
    together = page.text_content(".together")
    assert "321" in together
    assert "dead" in together
    page.wait_for_selector("#logit-histogram .bars")
    assert page.locator("#latent img, #latent b img").count() == 0
    assert page.title() == f"Latent {LATENT} · {SHOWN}"


def test_panels_without_data_are_left_out(visit, dashboard, tmp_path):
    shutil.copytree(dashboard.parent, tmp_path / "dash")
    needed = ("hist", "near", "tokens", "examples")
    rewrite(
        tmp_path / "dash" / "data" / "latents-0.js",
        lambda records: [{key: record[key] for key in needed} for record in records],
    )
    page = open_latent(visit, tmp_path / "dash" / "index.html")
    for panel in (
        ".about",
        ".pair",
        ".explanation",
        ".warnings",
        ".steering",
        "#misses",
        ".together",
        "#logit-histogram",
    ):
        assert page.locator(panel).count() == 0, panel
    assert page.locator("button:text('Δ loss')").count() == 0


def test_steering_shows_strengths_beside_the_unsteered_text(visit, full):
    page = open_latent(visit, full)
    plain, steered = page.locator(".said").nth(0), page.locator(".said").nth(1)
    assert plain.inner_text() == UNSTEERED
    assert page.locator(".tick").all_inner_texts() == ["−1", "0", "+1", "+2"]
    page.focus("#strength")
    page.keyboard.press("Home")
    assert steered.inner_text() == "No."
    assert "0.50 nats" in page.inner_text(".dial .facts")
    page.keyboard.press("ArrowRight")
    assert steered.inner_text() == UNSTEERED
    assert steered.locator("em").inner_text() == ""
    page.click(".tick:text('+1')")
    assert steered.text_content() == "A cat ran↵" + SHOWN
    assert steered.locator("em").text_content().startswith("ran↵")
    assert page.get_attribute("#strength", "aria-valuetext") == "+1"
    assert page.text_content("#name") == f"Latent {LATENT}"


def test_contexts_are_recoloured_by_change_of_loss(visit, full):
    page = open_latent(visit, full)
    coloured = ".text span[style*=background]"
    by_activation = page.locator(coloured).count()
    page.click("button:text('Δ loss')")
    assert page.locator(coloured).count() == 2
    rise, fall = (page.locator(coloured).nth(i).get_attribute("style") for i in (0, 1))
    assert "--rise" in rise
    assert "--fall" in fall
    assert page.locator(".context .value").first.inner_text() == "+0.250"
    page.hover(".text span[style*=background]")
    assert "+0.500 nats" in page.text_content("#tip")
    page.keyboard.press("c")
    assert page.locator(coloured).count() == by_activation


def test_contexts_widen_to_whole_rows(visit, full, parts):
    page = open_latent(visit, full)
    stats = parts[3]
    lengths = [len(stats.row(example.row)) for example in stats.examples(LATENT)]
    page.keyboard.press("w")
    counts = page.eval_on_selector_all(
        "#strongest .text, [id^=fifth] .text",
        "texts => texts.map((text) => text.querySelectorAll('[data-token]').length)",
    )
    assert counts == lengths
    page.keyboard.press("j")
    page.wait_for_function(f"document.querySelector('#name').textContent !== 'Latent {LATENT}'")
    assert page.get_attribute("button:text('Whole row')", "aria-pressed") == "true"


def test_a_character_in_two_tokens_is_shown_whole(visit, full):
    page = open_latent(visit, full)
    spans = page.locator("#strongest .context").first.locator("[data-token]")
    shown = spans.evaluate_all(
        f"spans => spans.filter((s) => s.dataset.token >= {CHINESE}).map((s) => s.textContent)"
    )
    assert shown == ["中", "‧"]


def test_the_map_says_what_a_point_is_and_opens_it(visit, full):
    page = visit(full)
    box = page.locator("#map canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.wait_for_timeout(300)
    page.mouse.move(*middle)
    page.wait_for_selector("#tip", state="visible")
    tip = page.text_content("#tip")
    assert tip.startswith(f"Latent {LATENT}")
    assert f"{SHOWN} number {LATENT}" in tip
    page.mouse.down()
    page.mouse.move(middle[0] + 90, middle[1], steps=4)
    page.mouse.up()
    page.mouse.move(*middle)
    page.wait_for_selector("#tip", state="hidden")
    assert page.locator("#overview").is_visible()
    page.click("button:text('Reset')")
    page.wait_for_timeout(300)
    for colouring in ("concept", "match", "warning", "density"):
        page.select_option("#map select", colouring)
    page.mouse.click(*middle)
    page.wait_for_selector(f"#name:text-is('Latent {LATENT}')")


def test_searches_are_links(visit, full):
    page = visit(full, "#search=number+onerror&sort=id.up")
    ids = page.eval_on_selector_all("#rows .id a", "links => links.map((a) => Number(a.textContent))")
    assert ids[:10] == list(range(10))
    page.fill("#search", "weather=snowy")
    assert page.evaluate("location.hash") == "#search=weather%3Dsnowy&sort=id.up"
    page.click("#rows .row")
    page.wait_for_selector(f"#name:text-is('Latent {LATENT}')")
    page.click("a:text('Table')")
    page.wait_for_selector("#overview", state="visible")
    assert page.input_value("#search") == "weather=snowy"
    assert page.text_content("#found") == "1 latent of 60"
    page.click(".home")
    assert page.input_value("#search") == ""
    assert page.text_content("#found") == "60 latents"


def test_filters(visit, full):
    page = visit(full, "#filter=warned")
    assert page.text_content("#found") == "2 latents of 60"
    page.select_option("#filter", "unmatched")
    assert page.text_content("#found") == "31 latents of 60"
    assert page.evaluate("location.hash") == "#filter=unmatched"
    page.select_option("#filter", "matched")
    assert page.text_content("#found") == "29 latents of 60"


def test_a_second_sae_stands_beside_the_first(visit, full):
    page = visit(full)
    tiles = page.locator("#tiles > div").evaluate_all(
        "tiles => tiles.map((tile) => [...tile.children].map((e) => e.textContent))"
    )
    assert ["", "this", SHOWN] in tiles
    assert ["L0", "6.00", "77.50"] in tiles
    assert ["KL, nats", "–", "0.250"] in tiles
    assert ["without a match", "31", "–"] in tiles
    page.goto(full.resolve().as_uri() + "#latent=2")
    page.wait_for_selector("#name")
    assert "2 (cosine 0.90)" in page.text_content(".facts")


def test_keys(visit, full):
    page = visit(full)
    ids = page.eval_on_selector_all("#rows .id a", "links => links.map((a) => a.textContent)")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#name:text-is('Latent {ids[1]}')")
    page.wait_for_function("document.activeElement.id === 'name'")
    page.keyboard.press("j")
    page.wait_for_selector(f"#name:text-is('Latent {ids[2]}')")
    page.keyboard.press("?")
    page.wait_for_selector("#help", state="visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#help", state="hidden")
    assert page.locator("#latent").is_visible()
    page.keyboard.press("u")
    page.wait_for_selector("#overview", state="visible")
    assert page.inner_text("#rows .here .id a") == ids[2]
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#name:text-is('Latent {ids[2]}')")
    page.keyboard.press("/")
    page.wait_for_function("document.activeElement.id === 'search'")
    page.keyboard.type("juk")
    assert page.input_value("#search") == "juk"


def test_downloads_and_dead_latents_are_listed(visit, full):
    page = visit(full)
    links = page.locator("#exports a").evaluate_all(
        "links => links.map((a) => [a.textContent, a.getAttribute('href')])"
    )
    assert links == [["CSV", "export/latents.csv"], ["Neuronpedia", "export/neuronpedia/"]]
    page.click("#dead summary")
    page.wait_for_selector("#dead a")
    assert page.locator("#dead a").all_inner_texts() == [str(i) for i in range(DEAD, DEAD + 4)]


@pytest.mark.parametrize("fragment", ["", f"#latent={LATENT}"])
def test_a_small_screen_is_wide_enough(visit, full, fragment):
    page = visit(full, fragment, size=(420, 900))
    page.wait_for_selector("#rows .row, #name", state="attached")
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_directions_go_by_their_names(visit, dashboard, tmp_path):
    shutil.copytree(dashboard.parent, tmp_path / "dash")

    def named(head):
        head["directions"] = True
        head["table"]["name"] = [f"{MALICIOUS} {i}" for i in head["table"]["id"]]
        return head

    rewrite(tmp_path / "dash" / "index.html", named)
    page = visit(tmp_path / "dash" / "index.html", "#search=%232")
    assert page.text_content("#found") == "1 direction of 60"
    assert f"{SHOWN} 2" in page.text_content("#rows")
    page.goto((tmp_path / "dash" / "index.html").as_uri() + "#latent=2")
    page.wait_for_selector("#name")
    assert page.text_content("#name") == f"{SHOWN} 2"
