"""A served dashboard, and what notebooks show, in a real browser."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sae.dashboard.serve import Reader, make_server
from sae.dashboard.value import Dashboard
from steerkit.steering.previews import Continuation, Preview
from tests.browser.conftest import SITE
from tests.browser.pages import MALICIOUS

TEXT = "Anna is happy. The fox runs to the park."


@pytest.fixture(scope="module")
def server(dashboard, parts):
    model, sae, _, _ = parts
    with make_server(dashboard.parent, Reader(model, sae, SITE), port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def served(browser, server):
    """The served page; nothing but the server may be asked, and the only errors told are answers to bad questions."""
    home, wrong = f"http://127.0.0.1:{server.server_port}/", []
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(60_000)
    page.on(
        "console", lambda m: wrong.append(m.text) if m.type == "error" and " 400 " not in m.text else None
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((home, "data:", "blob:")) else wrong.append(r.url))
    page.goto(home)
    yield page
    assert page.evaluate("window.hacked") is None
    page.close()
    assert wrong == []


def read(page, text):
    page.fill("#own-input", text)
    page.click("#own-text form button")
    page.wait_for_selector("#own-tokens button")


def test_your_own_text_is_read(served, parts):
    model, sae, _, _ = parts
    read(served, TEXT)
    assert served.locator("#own-tokens button").count() == len(model.tokenizer(TEXT)["input_ids"])
    fox = served.locator("#own-tokens button", has_text="fox")
    fox.click()
    assert fox.get_attribute("aria-pressed") == "true"
    expected = Reader(model, sae, SITE).activations(TEXT)["tokens"]
    strongest = next(token for token in expected if token["text"] == " fox")["latents"]
    shown = served.eval_on_selector_all(
        "#own-found tr", "rows => rows.map((row) => row.children[0].textContent)"
    )
    assert [int(i) for i in shown] == [i for i, _ in strongest]
    served.hover("#own-found tr >> nth=0")
    assert "rgba" in fox.get_attribute("style")
    served.click("#own-found a >> nth=0")
    served.wait_for_selector(f"h2:text-is('Latent {strongest[0][0]}')")


def test_it_is_continued_steered_and_unsteered(served):
    read(served, "Anna is")
    served.click("#own-found td button >> nth=0")
    served.wait_for_selector("#own-steer p")
    assert served.locator("#own-steer p").count() == 2
    served.fill("#own-steer input", "0")
    served.click("#own-steer button")
    served.wait_for_selector("#own-steer small:text-is('KL 0.00 nats a token')")
    steered, plain = served.locator("#own-steer p").all_text_contents()
    assert steered == plain


def test_hostile_tokens_are_text_and_wrong_texts_are_told(served):
    read(served, TEXT)
    assert served.locator("#own-tokens button", has_text="<img src=x").count() >= 1
    assert served.locator("img").count() == 0
    served.fill("#own-input", "   ")
    served.click("#own-text form button")
    served.wait_for_selector(".note.wrong:has-text('empty')")


def test_plots_and_latents_work_under_the_servers_policy(served):
    served.wait_for_selector("#density-plot .bars")
    served.goto(served.url.split("#")[0] + "#latent=3")
    served.wait_for_selector(".text .peak")


def framed(path: Path, *shown) -> Path:
    path.write_text("<!doctype html><meta charset=utf-8><body>" + "".join(s._repr_html_() for s in shown))
    return path


def test_a_notebook_shows_latents(visit, parts, tmp_path):
    model, sae, documents, stats = parts
    dashboard = Dashboard(model, sae, documents, SITE, stats, concepts={3: (MALICIOUS, 0.97)})
    page = visit(framed(tmp_path / "notebook.html", dashboard, dashboard.latent(3)))
    whole, one = page.frames[1:]
    assert whole.locator("details").count() == 12
    whole.locator("summary").first.click()
    assert whole.locator("details[open] .contexts p").count() >= 5
    most = max(range(len(stats.count)), key=lambda i: (stats.count[i], -i))
    assert whole.locator("summary b").first.text_content() == f"Latent {most}"
    assert "AUROC 0.970" in one.locator(".facts").text_content()
    assert MALICIOUS.split("\u2028")[0] in one.locator(".facts").text_content()
    assert one.locator("img").count() == whole.locator("img").count() == 0
    peaks = one.locator(".peak").count()
    assert peaks == one.locator(".contexts p").count()
    values = [float(text) for text in one.locator(".contexts i").all_text_contents()]
    assert values[0] == pytest.approx(float(stats.maximum[3]), abs=0.01)


def test_a_notebooks_slider_shows_one_strength(visit, tmp_path):
    row = tuple(Continuation((f"{MALICIOUS} at {s}",), (abs(s),)) for s in (-2.0, 0.0, 2.0))
    preview = Preview(MALICIOUS, ("Anna",), (-2.0, 0.0, 2.0), (row,))
    page = visit(framed(tmp_path / "notebook.html", preview))
    frame = page.frames[1]
    frame.wait_for_selector("html.live")
    assert frame.locator(".steered:visible p").all_text_contents() == [f"{MALICIOUS} at 2.0"]
    frame.fill("input", "0")
    assert frame.locator(".steered:visible p").all_text_contents() == [f"{MALICIOUS} at -2.0"]
    assert frame.locator("output").text_content() == "−2"
    assert frame.locator("section > div > p").all_text_contents()[0] == f"{MALICIOUS} at 0.0"
    assert frame.locator("img").count() == 0
    alone = visit(preview.save(tmp_path / "page.html"))
    alone.wait_for_selector("html.live")
    assert alone.locator(".steered:visible").count() == 1
