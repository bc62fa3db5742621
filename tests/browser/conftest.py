"""A small dashboard, and Chromium to open pages with: cut off from the network, as errors count requests for anything but files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sae.architectures.topk import TopK
from sae.dashboard import build
from sae.latents import collect_latents
from steerkit.data import load_documents
from steerkit.models import HookedModel
from tests.browser.pages import DEAD, MALICIOUS

SITE = "blocks.0.hook_resid_post"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tokenizer:
    """The StoryWorld tokenizer, some of whose tokens read as an attacker would have them."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __call__(self, *args, **kwargs):
        return self._inner(*args, **kwargs)

    def __len__(self):
        return len(self._inner)

    def convert_ids_to_tokens(self, i):
        piece = self._inner.convert_ids_to_tokens(i)
        return {".": MALICIOUS, " the": MALICIOUS, ",": "\0", " to": "\x1b[31m"}.get(piece, piece)


@pytest.fixture(scope="session")
def parts():
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from steerkit.storyworld import model_path

    torch.manual_seed(0)
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(model_path()))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    model = HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)
    sae = TopK(d_sae=DEAD + 4, k=6).build(32)
    generator = torch.Generator().manual_seed(1)
    sae.initialise(torch.randn(8, 32, generator=generator), torch.zeros(32), generator)
    with torch.no_grad():
        sae.b_enc[DEAD:] = -1e3
    stories = load_documents("storyworld")
    documents = load_documents([stories[i] for i in range(60)])
    stats = collect_latents(model, sae, documents, SITE, tokens=2_000, quiet=True)
    return model, sae, documents, stats


@pytest.fixture(scope="session")
def make(parts):
    model, sae, documents, stats = parts

    def make(out: Path, **options) -> Path:
        options = {"stats": stats, "concepts": {3: ("weather=snowy", 0.97)}, **options}
        return build(model, sae, documents, SITE, out, **options)

    return make


@pytest.fixture(scope="session")
def dashboard(make, tmp_path_factory):
    summary = {"fvu": 0.0347, "ce_recovered": 0.983, "delta_ce": 0.04}
    return make(
        tmp_path_factory.mktemp("dashboard") / "dash", summary=summary, title="Latents of a tiny model"
    )


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = ["quic", "background-networking", "component-update", "sync"]
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{flag}" for flag in flags)]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a page; at the end there must have been no error and no request but for files.

    Without `plots` the page's Plotly is empty, as it is on a slow machine for the first seconds: everything else
    works meanwhile.
    """
    pages, wrong = [], []

    def visit(path: Path, fragment: str = "", scheme: str = "light", plots: bool = False, size=(1400, 900)):
        page = browser.new_page(color_scheme=scheme, viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(120_000)
        page.context.set_offline(True)
        if not plots:
            page.route("**/plotly.min.js", lambda route: route.fulfill(body=""))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        local = ("file:", "data:")
        page.on("request", lambda r: None if r.url.startswith(local) else wrong.append(r.url))
        page.goto(path.resolve().as_uri() + fragment, wait_until="domcontentloaded")
        pages.append(page)
        return page

    yield visit
    for page in pages:
        assert page.evaluate("window.hacked") is None
        page.close()
    assert wrong == []
