"""repeng's part of bench_steering.py, which starts it with the Python of an environment that has repeng; steerkit is not needed.

    python bench_steering_repeng.py MODEL_DIR PAIRS.json LAYER BATCH THREADS

Says `ready`, then extracts a vector for every line on stdin and says `done` after each.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from repeng import ControlVector, DatasetEntry
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    directory, pairs, layer, batch, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    data = [DatasetEntry(positive=a, negative=b) for a, b in json.loads(Path(pairs).read_text())]
    print("ready", flush=True)
    for _ in sys.stdin:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ControlVector.train(
                model, tokenizer, data, hidden_layers=[int(layer)], batch_size=int(batch), method="pca_center"
            )
        print("done", flush=True)


if __name__ == "__main__":
    main()
