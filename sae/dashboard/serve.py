"""A dashboard with the model behind it: your own text, read and steered, in the page.

    serve("run/dashboard", Reader(model, sae, "blocks.2.hook_resid_post"), port=8000)        # until Ctrl-C

The files are served as they are; the page gets a panel more. It asks

    POST /api/activations   {text}                      the tokens, and the latents that are active on each
    POST /api/steer         {text, latent, strength}    how the text goes on, steered and unsteered, with the KL of each token

Only this machine is listened to (127.0.0.1), and only under its own name: no website can reach it by giving its name this address.
Questions are JSON that the page itself sends. Texts are data, nothing that is sent is run. One request at a time uses the model.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.architectures.base import SAE
from sae.dashboard.pieces import context_texts
from sae.dashboard.preview import end_ids, prompt_ids
from steerkit.activations import Tokenization, is_sink, token_batches
from steerkit.data import load_documents
from steerkit.errors import InputError, SteerkitError
from steerkit.models import HookedModel

N_LATENTS = 20
"""Latents that are told of a token, the most active first."""
MAX_CHARACTERS = 10_000
MAX_NEW_TOKENS = 200
_MAX_BODY = 65_536
_POLICY = "default-src 'self' 'unsafe-inline' data: blob:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'"
_SCRIPT = files("sae.dashboard") / "assets" / "own_text.js"
_LOADS_SCRIPT = b'<script src="assets/own_text.js"></script>\n</body>'
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
}
"""Not from the system's table, which on some machines calls scripts plain text."""


@dataclass(frozen=True)
class Reader:
    """What answers for the model. One thread at a time."""

    model: HookedModel
    sae: SAE
    site: str
    tokenization: Tokenization | None = None
    sink_threshold: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def can_steer(self) -> bool:
        """Whether the text can be continued, and the latents write where they read."""
        model, outputs = self.model, self.sae.config.outputs(self.site)
        return (
            isinstance(model, HookedModel)
            and model.has_lm_head
            and model.is_causal
            and outputs == (self.site,)
        )

    def activations(self, text: str) -> dict[str, Any]:
        """`tokens`: of each `text`, `active` (how many latents) and `latents` ([latent, activation], at most 20); `cut`: whether
        the text was longer than a row. Tokens that do not count have no latents. Raises InputError for a text that is empty or
        longer than 10,000 characters."""
        _check_text(text)
        with self._lock, torch.no_grad():
            text_alone = load_documents([text])
            a_row_and_more = self.model.context + 1
            batch = next(
                token_batches(self.model, text_alone, self.tokenization, max_tokens=a_row_and_more), None
            )
            if batch is None:
                raise InputError("The text has no token.")
            first = int(batch.offset.argmin())
            n = int(batch.attention_mask[first].sum())
            ids = batch.input_ids[first : first + 1, :n]
            acts = self.model.run(ids, sites=[self.site])[self.site]
            keep = batch.keep[first : first + 1, :n].to(acts.device) & ~is_sink(acts, self.sink_threshold)
            latents = self.sae.encode(acts.to(self.sae.device, self.sae.dtype)).float()[0]
            latents.masked_fill_(~keep[0, :, None].to(latents.device), 0)
            values, found = latents.topk(min(N_LATENTS, self.sae.d_sae), dim=1)
            active = (latents > 0).sum(1).tolist()
        shown = context_texts(self.model.tokenizer, ids[0].tolist())
        tokens = [
            {
                "text": text,
                "active": count,
                "latents": [[i, float(f"{v:.4g}")] for i, v in zip(which, how) if v > 0],
            }
            for text, count, which, how in zip(shown, active, found.tolist(), values.tolist())
        ]
        return {"tokens": tokens, "cut": len(batch.offset) > 1}

    def steer(self, text: str, latent: int, strength: float, max_new_tokens: int = 30) -> dict[str, Any]:
        """Greedy continuations with `strength` times the latent's decoder row added to every token but special ones, and without.

        `steered`: [[token, nats], …] with KL(steered ‖ unsteered) of the distribution that each is from; `unsteered`: [token, …].
        Raises InputError for a latent that does not exist, and for a model or an SAE that cannot be steered.
        """
        _check_text(text)
        if not self.can_steer:
            raise InputError(
                "This cannot be steered: the model writes no text, or the latents write elsewhere than they read."
            )
        if not 0 <= latent < self.sae.d_sae:
            raise InputError(f"There is no latent {latent}: the SAE has latents 0–{self.sae.d_sae - 1}.")
        if not math.isfinite(strength):
            raise InputError("The strength must be a finite number.")
        if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise InputError(f"max_new_tokens lies between 1 and {MAX_NEW_TOKENS}.")
        direction = strength * self.sae.W_dec[latent].detach()
        with self._lock, torch.no_grad():
            steered, unsteered, kl = continued(self.model, self.site, text, direction, max_new_tokens)
        show = self.model.tokenizer
        return {
            "steered": [[t, float(f"{k:.4g}")] for t, k in zip(context_texts(show, steered), kl)],
            "unsteered": context_texts(show, unsteered),
        }


def continued(
    model: HookedModel, site: str, text: str, direction: Float[Tensor, " width"], n: int
) -> tuple[list[int], list[int], list[float]]:
    """(steered tokens, unsteered tokens, KL of each steered one in nats): the likeliest token each time, up to the end.

    One forward a token has three rows: the steered text steered, the same unsteered, and the unsteered text.
    """
    prompt, ends = prompt_ids(model, text), set(end_ids(model))
    if len(prompt) + n > model.context:
        raise InputError(
            f"A text of {len(prompt)} tokens and {n} new ones: {model.name} takes 1 to {model.context}."
        )
    steered, unsteered, kl = list(prompt), list(prompt), []
    special = torch.tensor(sorted(model.special_ids), dtype=torch.long)
    for _ in range(n):
        ids = torch.tensor([steered, steered, unsteered])
        logits = _next_logits(model, site, ids, direction, ~torch.isin(ids[0], special))
        log_probs = logits.log_softmax(-1)
        kl.append(max(0.0, float((log_probs[0].exp() * (log_probs[0] - log_probs[1])).nansum())))
        steered.append(int(logits[0].argmax()))
        unsteered.append(int(logits[2].argmax()))
        if steered[-1] in ends and unsteered[-1] in ends:
            break
    new, plain = (_until(row[len(prompt) :], ends) for row in (steered, unsteered))
    return new, plain, kl[: len(new)]


def _next_logits(
    model: HookedModel, site: str, ids: Int[Tensor, "3 pos"], direction: Tensor, counts: Tensor
) -> Float[Tensor, "3 d_vocab"]:
    def add(h: Float[Tensor, "3 pos width"]) -> Tensor:
        change = torch.zeros_like(h)
        change[0] = counts.to(h.device)[:, None] * direction.to(h)
        return h + change

    with model.hooks({site: add}):
        return model.logits(ids)[:, -1].double().cpu()


def _until(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _check_text(text: str) -> None:
    if not text.strip():
        raise InputError("The text is empty.")
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"The text has {len(text):,} characters: give at most {MAX_CHARACTERS:,}.")


def serve(
    folder: str | Path, reader: Reader, *, port: int = 8000, announce: Callable[[str], None] = print
) -> None:
    """Serve the dashboard at `folder` until Ctrl-C. Raises InputError as `make_server` does."""
    with make_server(folder, reader, port=port) as server:
        announce(f"Open http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            announce("Ended.")


def make_server(folder: str | Path, reader: Reader, *, port: int = 8000) -> ThreadingHTTPServer:
    """The server, listening on 127.0.0.1; port 0 is any that is free.

    Raises InputError without a dashboard, or if the port is taken.
    """
    folder = Path(folder).resolve()
    if not (folder / "index.html").is_file():
        raise InputError(f"{folder} holds no dashboard: build one first, without --single-file.")
    if not 0 <= port < 65_536:
        raise InputError(f"--port is {port}; a port lies between 0 and 65535.")
    handler = type("Handler", (_Handler,), {"folder": folder, "reader": reader})
    try:
        return _Server(("127.0.0.1", port), handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is taken by another program" if error.errno == errno.EADDRINUSE else "needs other rights"
        raise InputError(
            f"Port {port} {why}: give another (--port 8001), or --port 0 for any free one."
        ) from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it would let two programs share a port


class _Refused(Exception):
    """An answer other than 200: (status, what is wrong)."""


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    reader: Reader
    timeout = 30
    server_version, sys_version = "steerkit", ""

    def do_GET(self) -> None:
        self._answer(self._file)

    def do_HEAD(self) -> None:
        self._answer(self._file)

    def do_POST(self) -> None:
        self._answer(self._api)

    def _answer(self, make: Callable[[], tuple[str, bytes]]) -> None:
        try:
            self._check_host()
            status, (kind, body) = HTTPStatus.OK, make()
        except _Refused as refused:
            status, (kind, body) = refused.args[0], _json({"error": refused.args[1]})
        except SteerkitError as error:
            status, (kind, body) = HTTPStatus.BAD_REQUEST, _json({"error": str(error)})
        except Exception:
            traceback.print_exc(file=sys.stderr)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            kind, body = _json({"error": "The model failed; the terminal says how."})
        with suppress(ConnectionError):  # the page was closed meanwhile
            self._send(status, kind, body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _check_host(self) -> None:
        names = self._own_names()
        if self.headers.get("Host", "").lower() not in names:
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, f"This is http://{names[0]}/ and nothing else.")

    def _own_names(self) -> list[str]:
        assert isinstance(self.server, _Server)
        port = self.server.server_port
        return [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]

    def _file(self) -> tuple[str, bytes]:
        """A file of the dashboard; the page with the script for own text."""
        path = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
        if path == "api/about":
            return _json({"steer": self.reader.can_steer, "characters": MAX_CHARACTERS})
        if path == "assets/own_text.js":
            return _KINDS[".js"], _SCRIPT.read_bytes()
        try:
            file = (self.folder / path).resolve()
            if not (file.is_relative_to(self.folder) and file.is_file()):
                raise FileNotFoundError
            body = file.read_bytes()
        except (OSError, ValueError):
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such file.") from None
        if file == self.folder / "index.html":
            body = _LOADS_SCRIPT.join(body.rsplit(b"</body>", 1))
        return _KINDS.get(file.suffix, "application/octet-stream"), body

    def _api(self) -> tuple[str, bytes]:
        asked = self._asked()
        if self.path == "/api/activations":
            return _json(self.reader.activations(_field(asked, "text", str)))
        if self.path == "/api/steer":
            return _json(
                self.reader.steer(
                    _field(asked, "text", str),
                    _field(asked, "latent", int),
                    float(_field(asked, "strength", (int, float))),
                )
            )
        raise _Refused(HTTPStatus.NOT_FOUND, "There is no such question.")

    def _asked(self) -> Mapping[str, Any]:
        """The JSON object that was sent. Other pages cannot send JSON without asking first, which is never granted."""
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{name}" for name in self._own_names()]:
            raise _Refused(HTTPStatus.FORBIDDEN, "Only the dashboard's own page may ask.")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Questions are JSON.")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Say how long the question is.")
        if len(length) > 9 or int(length) > _MAX_BODY:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Questions have at most {_MAX_BODY:,} bytes."
            )
        try:
            found = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "The question is no JSON object.")
        return found

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a terminal full of requests hides what matters."""


def _field(asked: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = asked.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Refused(HTTPStatus.BAD_REQUEST, f"The question's {name!r} is missing or of the wrong kind.")
    return value


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json; charset=utf-8", json.dumps(value, allow_nan=False).encode()
