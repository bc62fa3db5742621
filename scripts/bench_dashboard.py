"""What a dashboard costs: time and bytes a latent, and peak memory; ours, and SAEDashboard's on the same data.

    python scripts/bench_dashboard.py                                        # 256, 1,024, 4,096 and 16,384 latents
    python scripts/bench_dashboard.py --latents 256 --sae-dashboard-python PYTHON --rounds 3
    python scripts/bench_dashboard.py --latents 1024 --panels ablate steer   # what these panels cost on top

The text is 512 rows of 128 tokens from 2,000 words, the model a Llama with random weights (2 layers, d_model 128), the SAE one of
ReLU latents in random directions of which about 16 are active a token; every living latent gets its page. Each measurement is a
process on one thread; the clock starts when libraries, model and SAE are loaded and stops when the last file is written.
`processor` is the processor's time, which other work on the machine disturbs less. `fixed` bytes are Plotly, script and style, the
same for every dashboard; memory is the process's peak, and the peak before the clock started.

SAEDashboard runs on a TransformerLens model of the same sizes with random weights and the same SAE, read by sae-lens: gathering its
data and writing the page (`save_feature_centric_vis`), alternating with ours in each round. Its unembedding is large enough that
no direction's effects on the logits are all below 0.3, where sae-dashboard 0.8 takes a megabyte a latent for the ticks of a
histogram. PYTHON belongs to an environment with sae-dashboard 0.8. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROWS, CONTEXT, VOCABULARY, WIDTH, LAYERS, L0 = 512, 128, 2000, 128, 2, 16
SITE = "blocks.1.hook_resid_post"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--panels", nargs="*", default=[], choices=["ablate", "steer"])
    parser.add_argument("--sae-dashboard-python", help="a Python with sae-dashboard 0.8")
    parser.add_argument("--peer-latents", type=int, default=256, help="its sizes beyond this are left out")
    parser.add_argument("--one", nargs=3, metavar=("WHO", "DATA", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        who, data, out = arguments.one
        measure = {"ours": ours, "peer": sae_dashboard}[who]
        print(json.dumps(measure(Path(data), Path(out), arguments.panels)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for n in arguments.latents:
            data = Path(folder) / str(n)
            prepare(data, n)
            runs: dict[str, list[dict[str, Any]]] = {"ours": []}
            for number in range(arguments.rounds):
                runs["ours"].append(
                    run(sys.executable, "ours", data, f"{data}/ours{number}", arguments.panels)
                )
                if arguments.sae_dashboard_python and n <= arguments.peer_latents:
                    python = arguments.sae_dashboard_python
                    runs.setdefault("peer", []).append(run(python, "peer", data, f"{data}/peer{number}", []))
            for who, found in runs.items():
                results.append({"who": who, "latents": n, **medians(found)})
                show(results[-1])
    about = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
    }
    print(
        json.dumps(
            {**about, "rows": ROWS, "context": CONTEXT, "panels": arguments.panels, "results": results}
        )
    )


def run(python: str, who: str, data: Path, out: str, panels: list[str]) -> dict[str, Any]:
    """One measurement, in a process of its own on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, __file__, "--one", who, str(data), out]
    if panels:
        command += ["--panels", *panels]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{who}: {found['seconds']:.1f} s, processor {found['processor']:.1f} s", file=sys.stderr, flush=True
    )
    return found


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    every = {f"{key}_all": [round(r[key], 2) for r in runs] for key in ("seconds", "processor")}
    return {**middle, "rounds": len(runs), **every}


def show(row: dict[str, Any]) -> None:
    n = row["pages"]
    print(
        f"{row['who']:>5} {row['latents']:>6,} latents ({n:,.0f} pages): {1e3 * row['seconds'] / n:7.2f} ms a latent "
        f"(processor {1e3 * row['processor'] / n:.2f}), {(row['bytes'] - row['fixed']) / n / 1e3:6.1f} KB a latent, "
        f"peak {row['peak_mb']:,.0f} MB, {row['start_mb']:,.0f} before",
        flush=True,
    )


def prepare(data: Path, d_sae: int) -> None:
    """Model, text and SAE, saved for both."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import sae
    from steerkit.models import HookedModel

    words = [f"w{i}" for i in range(VOCABULARY)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", model_max_length=CONTEXT)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(data / "model")
    tokenizer.save_pretrained(data / "model")
    zipf = 1 / np.arange(1, VOCABULARY + 1)
    tokens = np.random.default_rng(0).choice(VOCABULARY, (ROWS, CONTEXT), p=zipf / zipf.sum())
    np.save(data / "tokens.npy", tokens)
    (data / "text.txt").write_text("\n".join(" ".join(words[i] for i in row) for row in tokens))
    hooked = HookedModel.from_pretrained(model, tokenizer=tokenizer)
    acts = hooked.run(torch.from_numpy(tokens[:16]), sites=[SITE])[SITE].detach().flatten(0, 1)
    coder = sae.L1(d_sae, target_l0=L0 / 2).build(WIDTH)  # begins with twice as many active as it aims at
    coder.initialise(acts, acts.mean(0), torch.Generator().manual_seed(0))
    coder.metadata = {"site": SITE, "model": "bench"}
    coder.save(data / "sae")


def ours(data: Path, out: Path, panels: list[str]) -> dict[str, Any]:
    import sklearn.manifold  # noqa: F401

    import sae
    from sae.dashboard import build
    from steerkit.data import load_documents
    from steerkit.models import HookedModel

    model = HookedModel.from_pretrained(str(data / "model"))
    coder, documents = sae.load(data / "sae"), load_documents(str(data / "text.txt"))
    asked = dict.fromkeys(panels, True)
    start, clock, processor = peak_mb(), time.perf_counter(), time.process_time()
    build(model, coder, documents, SITE, out, tokens=ROWS * CONTEXT, quiet=True, **asked)
    seconds, used = time.perf_counter() - clock, time.process_time() - processor
    files = {file: file.stat().st_size for file in out.rglob("*") if file.is_file()}
    pages = json.loads((out / "steerkit-dashboard.json").read_text())["latents"]
    return {
        "pages": pages,
        "seconds": seconds,
        "processor": used,
        "bytes": sum(files.values()),
        "fixed": sum(size for file, size in files.items() if file.parent.name == "assets"),
        "peak_mb": peak_mb(),
        "start_mb": start,
    }


def sae_dashboard(data: Path, out: Path, panels: list[str]) -> dict[str, Any]:
    import numpy as np
    import torch
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "w0")
    inner = PreTrainedTokenizerFast(tokenizer_file=str(data / "model" / "tokenizer.json"), **special)
    inner.save_pretrained(data / "peer_tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "peer_tokenizer")
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=WIDTH,
        n_ctx=CONTEXT,
        d_head=WIDTH // 4,
        n_heads=4,
        d_mlp=4 * WIDTH,
        d_vocab=VOCABULARY,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        device="cpu",
    )
    model = HookedTransformer(config, tokenizer=tokenizer)
    model.W_U.data.mul_(10)
    coder = SAE.load_from_disk(str(data / "sae"), device="cpu")
    tokens = torch.from_numpy(np.load(data / "tokens.npy"))
    start, clock, processor = peak_mb(), time.perf_counter(), time.process_time()
    features = range(coder.cfg.d_sae)
    found = SaeVisRunner(SaeVisConfig(hook_point=SITE, features=features)).run(coder, model, tokens)
    save_feature_centric_vis(found, filename=out.with_suffix(".html"))
    seconds, used = time.perf_counter() - clock, time.process_time() - processor
    size = out.with_suffix(".html").stat().st_size
    return {
        "pages": len(found.feature_data_dict),
        "seconds": seconds,
        "processor": used,
        "bytes": size,
        "fixed": 0,
        "peak_mb": peak_mb(),
        "start_mb": start,
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


if __name__ == "__main__":
    main()
