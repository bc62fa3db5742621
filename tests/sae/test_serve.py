"""The local server: its answers against the model's own, and what it refuses."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sae.architectures import L1, Transcoder
from sae.dashboard.serve import Reader, make_server
from steerkit.cli.main import app
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering import SteeringVector, Where, add_latents
from steerkit.steering.sampling import Samples, divergence
from steerkit.tokens import Tokenization

SITE = "blocks.1.hook_resid_post"
TEXT = "Anna is happy. The fox runs in the park."


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def sae():
    sae = L1(d_sae=64).build(128)
    generator = torch.Generator().manual_seed(0)
    sae.initialise(torch.randn(64, 128, generator=generator), torch.zeros(128), generator)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def server(model, sae, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    (root / "secret.txt").write_text("secret")
    folder = root / "dash"
    (folder / "data").mkdir(parents=True)
    (folder / "index.html").write_text("<html><body>page</body></html>")
    (folder / "data" / "rows-0.js").write_text("1;")
    (folder / "link.txt").symlink_to(root / "secret.txt")
    with make_server(folder, Reader(model, sae, SITE), port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method, path, body=None, **headers):
    """(status, headers, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
            headers = {"Content-Type": "application/json", **headers}
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_activations_are_the_saes(server, model, sae):
    status, _, body = ask(server, "POST", "/api/activations", {"text": TEXT})
    found = json.loads(body)
    assert status == 200
    assert found["cut"] is False
    acts = model.activations([TEXT], [SITE], drop_sinks=False)
    latents = sae.encode(acts[SITE])
    tokens = found["tokens"]
    assert "".join(token["text"] for token in tokens) == "<s> " + TEXT
    told = [token for token in tokens if token["text"] != "<s>"]
    assert len(told) == len(latents)
    assert tokens[0]["latents"] == []
    for token, row in zip(told, latents):
        assert token["active"] == int((row > 0).sum())
        values = [value for _, value in token["latents"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == min(20, token["active"])
        np.testing.assert_allclose(values, [row[i] for i, _ in token["latents"]], rtol=1e-3)
        assert values[-1] == pytest.approx(float(row.sort(descending=True).values[len(values) - 1]), rel=1e-3)


def test_a_text_that_is_too_long_for_a_row_is_cut(model, sae):
    reader = Reader(model, sae, SITE, Tokenization(context=8))
    found = reader.activations(TEXT)
    assert found["cut"] is True
    assert len(found["tokens"]) == 8
    whole = Reader(model, sae, SITE).activations(TEXT)
    assert found["tokens"] == whole["tokens"][:8]


def test_sinks_have_no_latents(model, sae):
    found = Reader(model, sae, SITE, sink_threshold=0.0).activations(TEXT)
    assert all(token["active"] == 0 and token["latents"] == [] for token in found["tokens"])


def test_steering_is_what_the_steering_package_does(server, model, sae):
    strength = 30.0
    _, _, body = ask(server, "POST", "/api/steer", {"text": "Anna is", "latent": 5, "strength": strength})
    found = json.loads(body)
    vector = add_latents(sae, {5: strength}, SITE)
    with model.steer(vector, where=Where.everywhere()):
        expected = model.generate("Anna is", max_new_tokens=30, do_sample=False)
    steered = [token for token, _ in found["steered"]]
    assert "".join(steered).removesuffix("</s>").strip() == expected
    plain = model.generate("Anna is", max_new_tokens=30, do_sample=False)
    assert "".join(found["unsteered"]).removesuffix("</s>").strip() == plain
    assert expected != plain
    prompt = tuple(model.tokenizer("Anna is")["input_ids"])
    new = tuple(model.tokenizer("Anna is " + expected)["input_ids"][len(prompt) :])
    samples = Samples((prompt,), (new,), np.array([0]), np.array([False]))
    measured = divergence(model, samples, lambda lengths: model.steer(vector, where=Where.everywhere()))
    kl = [nats for _, nats in found["steered"]][: len(new)]
    np.testing.assert_allclose(kl, measured.kl, rtol=2e-3, atol=1e-5)


def test_no_strength_changes_nothing(server):
    _, _, body = ask(server, "POST", "/api/steer", {"text": "Anna is", "latent": 5, "strength": 0})
    found = json.loads(body)
    assert [token for token, _ in found["steered"]] == found["unsteered"]
    assert max(nats for _, nats in found["steered"]) == 0


def test_requests_at_once_get_what_they_would_alone(server):
    texts = [f"Anna has {n} red balls." for n in ("two", "three", "ten")] * 4
    alone = [ask(server, "POST", "/api/activations", {"text": text})[2] for text in texts[:3]]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda text: ask(server, "POST", "/api/activations", {"text": text})[2], texts)
        )
    assert together == alone * 4


def test_files_are_served_and_the_page_with_its_panel(server):
    status, headers, body = ask(server, "GET", "/")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert b'page<script src="assets/own_text.js"></script>' in body
    assert ask(server, "GET", "/index.html?x=1#y")[2] == body
    status, headers, script = ask(server, "GET", "/assets/own_text.js")
    assert (status, headers["Content-Type"]) == (200, "text/javascript; charset=utf-8")
    assert b"own-text" in script
    assert ask(server, "GET", "/data/rows-0.js")[2] == b"1;"
    assert ask(server, "HEAD", "/data/rows-0.js")[2] == b""
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/%2e%2e/secret.txt", "/data/..%2f../secret.txt", "/link.txt", "/data", "/none", "/%00",
     "//etc/passwd", "/..%5csecret.txt", "/" + "a" * 5000],
)  # fmt: skip
def test_nothing_beside_the_dashboard_is_served(server, path):
    status, _, body = ask(server, "GET", path)
    assert status == 404
    assert b"secret" not in body.replace(b"secret.txt", b"")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "", "0.0.0.0:{port}"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_names_are_refused(server, host, method):
    """A website whose name is suddenly this address sends its own name along (DNS rebinding)."""
    body = {"text": TEXT} if method == "POST" else None
    host = host.format(port=server.server_port)
    status, _, answer = ask(server, method, "/api/activations", body, Host=host)
    assert status == 421
    assert b"tokens" not in answer


def test_both_own_names_are_taken(server):
    port = server.server_port
    assert ask(server, "GET", "/", Host=f"localhost:{port}")[0] == 200
    body = {"text": TEXT}
    assert ask(server, "POST", "/api/activations", body, Origin=f"http://localhost:{port}")[0] == 200
    assert ask(server, "POST", "/api/activations", body, Origin="http://evil.example")[0] == 403
    assert ask(server, "POST", "/api/activations", body, Origin="null")[0] == 403


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ('{"text": "a"}', {"Content_Type": "text/plain"}, 415),
        ('{"text": "a"}', {}, 415),
        (b"x" * 70_000, {"Content_Type": "application/json"}, 413),
        ("no json", {"Content_Type": "application/json"}, 400),
        ("[" * 60_000, {"Content_Type": "application/json"}, 400),
        ([1, 2], {}, 400),
        ({}, {}, 400),
        ({"text": 3}, {}, 400),
        ({"text": "  "}, {}, 400),
        ({"text": "a" * 10_001}, {}, 400),
    ],
)
def test_bad_questions(server, body, headers, status):
    found, _, answer = ask(server, "POST", "/api/activations", body, **headers)
    assert found == status
    assert set(json.loads(answer)) == {"error"}


@pytest.mark.parametrize(
    "wrong",
    [{"latent": 64}, {"latent": -1}, {"latent": True}, {"latent": 1.5}, {"strength": "1"}, {"strength": 1e400},
     {"text": "Anna " * 400}, {"latent": None}],
)  # fmt: skip
def test_bad_steering(server, wrong):
    asked = {"text": "Anna is", "latent": 5, "strength": 1.0, **wrong}
    assert ask(server, "POST", "/api/steer", asked)[0] == 400


def test_unknown_questions_and_lengths(server):
    assert ask(server, "POST", "/api/exec", {"text": "a"})[0] == 404
    assert ask(server, "PUT", "/api/activations", {"text": "a"})[0] == 501
    with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
        head = f"POST /api/activations HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: -5\r\n\r\n".encode())
        assert b" 411 " in raw.recv(1000)


def test_a_failure_is_told_and_the_server_goes_on(server, sae, capfd):
    weights = sae.W_enc.data
    try:
        sae.W_enc.data = weights[:7]
        status, _, body = ask(server, "POST", "/api/activations", {"text": TEXT})
    finally:
        sae.W_enc.data = weights
    assert (status, json.loads(body)) == (500, {"error": "The model failed; the terminal says how."})
    assert "Traceback" in capfd.readouterr().err
    assert ask(server, "POST", "/api/activations", {"text": TEXT})[0] == 200


def test_a_port_that_is_taken_and_a_folder_without_pages(server, model, sae, tmp_path):
    (tmp_path / "index.html").write_text("<body></body>")
    with pytest.raises(InputError, match=r"taken .*--port 8001"):
        make_server(tmp_path, Reader(model, sae, SITE), port=server.server_port)
    with pytest.raises(InputError, match="65535"):
        make_server(tmp_path, Reader(model, sae, SITE), port=70_000)
    with pytest.raises(InputError, match="no dashboard"):
        make_server(tmp_path / "none", Reader(model, sae, SITE), port=0)


def test_latents_that_write_elsewhere_are_not_steered(model):
    transcoder = (
        Transcoder(d_sae=64, target_site="blocks.2.hook_mlp_out").bound(SITE, lambda site: 128).build(128)
    )
    reader = Reader(model, transcoder, SITE)
    assert not reader.can_steer
    with pytest.raises(InputError, match="cannot be steered"):
        reader.steer("Anna is", 0, 1.0)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_command_and_what_is_there_is_served_as_it_is(tmp_path, interruptible):
    file = SteeringVector.add({SITE: torch.ones(128)}, model="storyworld").save(tmp_path / "v.safetensors")
    folder = tmp_path / "dash"
    folder.mkdir()
    (folder / "index.html").write_text("<body>as it was</body>")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen = []

    def visit() -> None:
        for _ in range(600):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/")
                seen.append(connection.getresponse().read())
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=visit, daemon=True).start()
    told = CliRunner().invoke(
        app, ["dashboard", str(file), "--out", str(folder), "--serve", "--port", str(port)]
    )
    assert told.exit_code == 0, told.output
    assert f"http://127.0.0.1:{port}/" in told.output
    assert told.output.endswith("Ended.\n")
    assert b"as it was" in seen[0]
    assert sorted(entry.name for entry in folder.iterdir()) == ["index.html"]
