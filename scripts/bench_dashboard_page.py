"""How fast a dashboard's page is in a browser: times in headless Chromium, of dashboards with 256 to 16,384 latents.

    python scripts/bench_dashboard_page.py                                        # needs Chromium and playwright
    python scripts/bench_dashboard_page.py --latents 1024 --rounds 1              # to see that it runs
    python scripts/bench_dashboard_page.py --dashboard runs/x/dashboard           # of one that you have

    overview       from opening index.html until the table stands and a frame has been painted
    plots          likewise until Plotly has loaded and the histogram of densities is drawn
    search         from a keystroke in the search box to the next frame
    map frame      one step of dragging the map, until the canvas is drawn
    latent, new    from the change of the address to a page with all its contexts, its data not yet loaded
    latent, next   the same for one whose data is there already

The pages hold made-up figures and words, with every panel that there is; only their number and size matter here. Each round
opens a fresh page; figures are medians over rounds, with the largest. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from steerkit.plots import script_json

_HEAD = re.compile(r'(?<=window\.__shard\("head",).*(?=\);</script>)')
_PER_SHARD = 64
_ROWS, _ROW_LENGTH, _ROWS_A_SHARD = 4096, 64, 1024
_WORDS = 4096

_WATCH = """
window.seen = {};
const watch = () => {
  if (!seen.overview && document.querySelector("#rows .row")) requestAnimationFrame(() => { seen.overview = performance.now(); });
  if (!seen.plots && document.querySelector("#density-plot .bars")) seen.plots = performance.now();
  if (!seen.plots) requestAnimationFrame(watch);
};
requestAnimationFrame(watch);
"""
_SEARCH = """(text) => new Promise((done) => {
  const box = document.getElementById("search");
  const start = performance.now();
  box.value = text;
  box.dispatchEvent(new Event("input"));
  requestAnimationFrame(() => done(performance.now() - start));
})"""
_DRAG = """async () => {
  const canvas = document.querySelector("#map canvas");
  if (!canvas) return null;
  const box = canvas.getBoundingClientRect();
  const at = (x) => ({ pointerId: 1, clientX: box.left + x, clientY: box.top + 99 });
  const send = (name, x) => canvas.dispatchEvent(new PointerEvent(name, at(x)));
  canvas.setPointerCapture = () => {};
  send("pointerdown", 100);
  const times = [];
  for (let i = 0; i < 20; i += 1) {
    const start = performance.now();
    send("pointermove", 100 + i);
    await new Promise((done) => requestAnimationFrame(done));
    times.push(performance.now() - start);
  }
  send("pointerup", 120);
  return times.sort((a, b) => a - b)[10];
}"""
_LATENT = """(id) => new Promise((done) => {
  const start = performance.now();
  location.hash = "latent=" + id;
  const look = () => {
    const texts = [...document.querySelectorAll("#latent .context .text")];
    const ready = document.querySelector("#name")?.textContent === "Latent " + id && texts.every((text) => text.children.length);
    if (ready) done(performance.now() - start);
    else requestAnimationFrame(look);
  };
  look();
})"""


def made_up(shell: Path, out: Path, n: int, seed: int = 0) -> Path:
    """Write to `out` a dashboard of `n` latents with made-up content, its page and assets those of the dashboard `shell`."""
    rng = random.Random(seed)
    shutil.copytree(shell / "assets", out / "assets")
    (out / "data").mkdir()
    page = (shell / "index.html").read_text(encoding="utf-8")
    found = _HEAD.search(page)
    assert found is not None, f"{shell} is no dashboard"
    head = json.loads(found[0]) | _head(n, rng)
    page = page[: found.start()] + script_json(head) + page[found.end() :]
    (out / "index.html").write_text(page, encoding="utf-8")

    def write(name: str, data: Any) -> None:
        text = f"window.__shard({json.dumps(name)},{script_json(data)});"
        (out / "data" / f"{name}.js").write_text(text, encoding="utf-8")

    write("tokens", {"ids": list(range(_WORDS)), "text": [_word(i) for i in range(_WORDS)]})
    for number in range(_ROWS // _ROWS_A_SHARD):
        rows = [rng.choices(range(_WORDS), k=_ROW_LENGTH) for _ in range(_ROWS_A_SHARD)]
        write(f"rows-{number}", rows)
    shards = [[_record(n, rng) for _ in range(_PER_SHARD)] for _ in range(16)]
    for number in range(-(-n // _PER_SHARD)):
        write(f"latents-{number}", shards[number % len(shards)])
    return out / "index.html"


def _word(i: int) -> str:
    syllables = ("ba", "ko", "li", "mu", "ne", "ra", "so", "ti")
    return " " + "".join(syllables[(i >> (3 * k)) % 8] for k in range(4))


def _head(n: int, rng: random.Random) -> dict[str, Any]:
    concepts = [None, "mood=happy", "tense=past", "place=harbour"]
    kinds = rng.choices(range(4), k=n)
    return {
        "title": f"{n:,} made-up latents",
        "d_sae": n,
        "tokens": 1_000_000,
        "edges": [round(2 ** (i / 4 - 6), 4) for i in range(41)],
        "per_shard": _PER_SHARD,
        "row_shards": list(range(0, _ROWS, _ROWS_A_SHARD)),
        "dead": [],
        "n_alive": n,
        "top_text": [list(range(_WORDS)), [_word(i) for i in range(_WORDS)]],
        "map": {
            "x": [min(1000, max(0, round(rng.gauss(250 * kind, 90)))) for kind in kinds],
            "y": [min(1000, max(0, round(rng.gauss(500, 200)))) for _ in kinds],
            "method": "made up",
        },
        "cooccurrence_tokens": 1_000_000,
        "table": {
            "id": list(range(n)),
            "count": [max(1, round(10 ** rng.gauss(3, 0.7))) for _ in range(n)],
            "max": [round(rng.uniform(1, 9), 3) for _ in range(n)],
            "mean": [round(rng.uniform(0.2, 1), 3) for _ in range(n)],
            "tokens": [rng.choices(range(_WORDS), k=4) for _ in range(n)],
            "concept": [concepts[kind] for kind in kinds],
            "auroc": [kind and 0.9 for kind in kinds],
            "label": [f"fires on “{_word(i % _WORDS).strip()}” and words like it" for i in range(n)],
            "warn": rng.choices((0, 0, 0, 1), k=n),
        },
    }


def _examples(rng: random.Random) -> list[list[Any]]:
    intervals = [0] * 20 + [i for i in (5, 4, 3, 2, 1) for _ in range(5)]
    return [
        [
            interval,
            rng.randrange(_ROWS),
            rng.randrange(20, 44),
            round(9 - k / 6, 3),
            -4,
            rng.randbytes(9).hex(),
        ]
        for k, interval in enumerate(intervals)
    ]


def _record(n: int, rng: random.Random) -> dict[str, Any]:
    examples = _examples(rng)
    others = [rng.randrange(n) for _ in range(10)]
    tokens = rng.choices(range(_WORDS), k=20)
    return {
        "enc": 0.7,
        "hist": [0, *(round(2000 * 0.8**b) + 1 for b in range(40))],
        "near": [[j, 0.5] for j in others],
        "tokens": [[token, 0.1, 2.5, 100] for token in tokens[:10]],
        "examples": examples,
        "logits": [tokens, [round(2 - k / 5, 2) for k in range(20)]],
        "logit_hist": [-2.0, 2.0, [1 + 90 * min(b, 29 - b) for b in range(30)]],
        "misses": [[example[1], example[2], -0.5] for example in examples[:5]],
        "co": [[j, 0.3, 1.2, 420] for j in others],
        "ablation": {"mean": 0.05, "n": 100, "examples": [[k, -4, [0.1, -0.1, 0.3] * 3] for k in range(10)]},
        "steer": {
            "prompt": "Once",
            "unit": "×",
            "rows": [[s, _word(s + 5) * 30, abs(s) / 2] for s in (0, -1, 1, 2, 4)],
        },
        "about": "Fires on words that were made up.",
        "warn": ["active on 7 tokens only"],
    }


def measure(browser: Any, index: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each kind, one a round."""
    taken: dict[str, list[float]] = {}
    for turn in range(rounds):
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.add_init_script(_WATCH)
        page.goto(index.resolve().as_uri())
        page.wait_for_function("window.seen.plots", timeout=60_000)
        times = page.evaluate("window.seen")
        times["search"] = page.evaluate(_SEARCH, "mu #7" if turn % 2 else "ba")
        page.evaluate(_SEARCH, "")
        drag = page.evaluate(_DRAG)
        if drag is not None:
            times["map frame"] = drag
        ids = page.evaluate("window.__shards.head.table.id")
        chosen = (turn + 1) * len(ids) // (rounds + 2)
        times["latent, new"] = page.evaluate(_LATENT, ids[chosen])
        page.wait_for_timeout(500)
        near = chosen + 1 if (chosen + 1) % _PER_SHARD else chosen - 1
        times["latent, next"] = page.evaluate(_LATENT, ids[near])
        page.close()
        for name, value in times.items():
            taken.setdefault(name, []).append(round(value, 1))
    return taken


def _shell(folder: Path) -> Path:
    """A dashboard of eight random latents of the built-in model: the page that the made-up ones are put into."""
    import torch

    from sae.architectures.topk import TopK
    from sae.dashboard import build
    from steerkit.data import load_documents
    from steerkit.models import HookedModel

    model = HookedModel.from_pretrained("storyworld")
    sae = TopK(d_sae=8, k=4).build(model.d_model)
    generator = torch.Generator().manual_seed(0)
    sae.initialise(torch.randn(64, model.d_model, generator=generator), torch.zeros(model.d_model), generator)
    stories = load_documents("storyworld")
    return build(
        model,
        sae,
        [stories[i] for i in range(20)],
        "blocks.1.hook_resid_post",
        folder,
        tokens=1000,
        quiet=True,
    ).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, nargs="+", default=[256, 1024, 4096, 16_384])
    parser.add_argument("--dashboard", type=Path, help="a dashboard's directory, to be measured instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chromium", help="path of the browser; otherwise the first of the usual names")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = arguments.chromium or next(filter(None, map(shutil.which, names)), None)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        busy = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        print(
            f"{date.today()}, {platform.machine()}, {busy}, Chromium {browser.version}, "
            f"{arguments.rounds} rounds, milliseconds"
        )
        if arguments.dashboard:
            pages = {arguments.dashboard.name: arguments.dashboard / "index.html"}
        else:
            shell = _shell(Path(folder) / "shell")
            pages = {}
            for n in arguments.latents:
                started = time.perf_counter()
                pages[f"{n:,} latents"] = made_up(shell, Path(folder) / str(n), n)
                print(f"{n:,} latents made up in {time.perf_counter() - started:.1f} s")
        for name, page in pages.items():
            results[name] = measure(browser, page, arguments.rounds)
            print(f"\n{name}")
            for kind, values in results[name].items():
                print(f"  {kind:14} {statistics.median(values):8.0f}   largest {max(values):8.0f}")
        browser.close()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
