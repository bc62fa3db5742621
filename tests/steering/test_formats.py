"""A vector in another toolkit's file does there what it does here; what cannot be said is named, and no file is believed."""

import contextlib
import json
import pickle
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerkit import HookedModel
from steerkit.errors import CheckpointError, InputError, SteerkitError
from steerkit.steering import (
    Add,
    AddMatrix,
    Clamp,
    Condition,
    Decay,
    LowRank,
    Project,
    Rotate,
    SteeringVector,
    WeightDelta,
    Where,
    export,
    from_repeng,
    from_steering_vectors,
    load_any,
)
from steerkit.steering.formats import FORMATS, ConversionWarning, format_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.families import build

EVERY_TOKEN = Where(bos=True)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [3, 14, 15, 92, 65, 35, 8]])


@pytest.fixture(scope="module")
def llama():
    return HookedModel.from_pretrained(build("llama"))


@pytest.fixture(scope="module")
def gpt2():
    return HookedModel.from_pretrained(build("gpt2"))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def post(block):
    return f"blocks.{block}.hook_resid_post"


def additions(*blocks, d=32, where=EVERY_TOKEN):
    edits = tuple(Add(post(block), normal(d, seed=block), scale=1.5) for block in blocks)
    return SteeringVector(edits, {"model": "tiny"}, where)


def saved(vector, to, out, **options):
    """The path, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = export(vector, to, out, **options)
    assert all(w.category is ConversionWarning for w in caught)
    return path, [str(w.message) for w in caught]


def quietly(path, **hints):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        return load_any(path, **hints)


def same_directions(one, other):
    assert one.directions.keys() == other.directions.keys()
    for site, vector in one.directions.items():
        torch.testing.assert_close(other.directions[site], vector)


# GGUF


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def fact(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


ARCHITECTURE = fact("general.architecture", 8, string("controlvector"))


def gguf(facts, tensors, data, version=3, n_facts=None, n_tensors=None, alignment=32):
    """A file put together by hand: facts and tensor infos as bytes."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(facts) if n_facts is None else n_facts,
    )
    head += b"".join(facts) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def info(name, length, offset, kind=0, dims=1):
    return (
        string(name)
        + struct.pack("<I", dims)
        + struct.pack("<Q", length) * dims
        + struct.pack("<IQ", kind, offset)
    )


def direction(value, n=8):
    return struct.pack(f"<{n}f", *[value] * n)


def read_bytes(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return load_any(path)


def test_gguf_has_the_layout_of_llama_cpp(tmp_path):
    vector = additions(1, 2, d=12)
    path, lost = saved(vector, "gguf", tmp_path / "v.gguf", strength=2.0)
    assert lost == []
    tensors = [info("direction.1", 12, 0), info("direction.2", 12, 64)]
    facts = [
        ARCHITECTURE,
        fact("controlvector.model_hint", 8, string("tiny")),
        fact("controlvector.layer_count", 4, struct.pack("<I", 2)),
    ]
    rows = [
        (2.0 * 1.5 * normal(12, seed=block)).numpy().astype("<f4").tobytes() + bytes(16) for block in (1, 2)
    ]
    assert path.read_bytes() == gguf(facts, tensors, b"".join(rows))


def test_gguf_comes_back(tmp_path, llama):
    vector = additions(1, 2)
    path, _ = saved(vector, "gguf", tmp_path / "v.gguf")
    back = load_any(path)
    same_directions(vector, back)
    assert back.where == EVERY_TOKEN
    assert back.provenance == {
        "file": "v.gguf",
        "source": "gguf",
        "model_hint": "tiny",
        "layer_count": 2,
    }
    with llama.steer(vector):
        wanted = llama.logits(IDS)
    with llama.steer(back):
        torch.testing.assert_close(llama.logits(IDS), wanted)


def test_gguf_of_easysteer_and_every_type_of_fact(tmp_path):
    scalars = {0: ("B", 7), 1: ("b", -7), 2: ("H", 7), 3: ("h", -7), 4: ("I", 7), 5: ("i", -7), 6: ("f", 0.5),
               7: ("?", True), 10: ("Q", 7), 11: ("q", -7), 12: ("d", 0.25)}  # fmt: skip
    facts = [ARCHITECTURE]
    for kind, (code, value) in scalars.items():
        facts.append(fact(f"controlvector.s{kind}", kind, struct.pack(f"<{code}", value)))
        items = struct.pack("<IQ", kind, 3) + struct.pack(f"<3{code}", *[value] * 3)
        facts.append(fact(f"other.a{kind}", 9, items))
    facts.append(fact("other.names", 9, struct.pack("<IQ", 8, 2) + string("é") + string("")))
    facts.append(fact("controlvector.method", 8, string("caa")))
    tensors = [info("direction.11", 8, 32), info("direction.0", 8, 0)]
    vector = read_bytes(tmp_path, gguf(facts, tensors, direction(1.0) + direction(2.0)))
    assert list(vector.directions) == [post(0), post(11)]
    assert torch.equal(vector.directions[post(11)], torch.full((8,), 2.0))
    assert vector.provenance["method"] == "caa"
    assert [vector.provenance[f"s{kind}"] for kind in scalars] == [value for _, value in scalars.values()]
    wide = [ARCHITECTURE, fact("general.alignment", 4, struct.pack("<I", 64))]
    tensors = [info("direction.1", 8, 0), info("direction.2", 8, 64)]
    data = gguf(wide, tensors, direction(1.0) + bytes(32) + direction(2.0), version=2, alignment=64)
    assert torch.equal(read_bytes(tmp_path, data).directions[post(2)], torch.full((8,), 2.0))


def test_a_gguf_file_that_is_cut_short_anywhere_is_damaged(tmp_path):
    data = saved(additions(1, 2, 3, d=64), "gguf", tmp_path / "v.gguf")[0].read_bytes()
    for end in {*range(0, len(data), 64), *range(0, 200, 3), len(data) - 1}:
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            read_bytes(tmp_path, data[:end])


MANY = 2**63
ONE = [info("direction.1", 8, 0)]
HOSTILE = {
    "no magic": (b"GGML" + bytes(100), "no GGUF"),
    "version": (gguf([ARCHITECTURE], ONE, direction(1), version=1), "version 1"),
    "other end first": (gguf([ARCHITECTURE], ONE, direction(1), version=3 << 24), "version"),
    "counts of facts": (gguf([ARCHITECTURE], ONE, direction(1), n_facts=MANY), "counts more"),
    "counts of tensors": (gguf([ARCHITECTURE], ONE, direction(1), n_tensors=MANY), "counts more"),
    "long string": (gguf([ARCHITECTURE, struct.pack("<Q", MANY)], ONE, direction(1)), "string of"),
    "long array": (
        gguf([ARCHITECTURE, fact("a", 9, struct.pack("<IQ", 12, MANY))], ONE, direction(1)),
        "counts more",
    ),
    "long array of strings": (
        gguf([ARCHITECTURE, fact("a", 9, struct.pack("<IQ", 8, MANY))], ONE, direction(1)),
        "counts more",
    ),
    "nested arrays": (
        gguf([ARCHITECTURE, fact("a", 9, struct.pack("<IQ", 9, 1) * 5000)], ONE, direction(1)),
        "array of type 9",
    ),
    "type of fact": (gguf([ARCHITECTURE, fact("a", 13, b"")], ONE, direction(1)), "unknown type 13"),
    "fact twice": (gguf([ARCHITECTURE, ARCHITECTURE], ONE, direction(1)), "twice"),
    "no UTF-8": (gguf([ARCHITECTURE, struct.pack("<Q", 2) + b"\xff\xfe"], ONE, direction(1)), "UTF-8"),
    "alignment": (
        gguf([ARCHITECTURE, fact("general.alignment", 4, bytes(4))], ONE, direction(1)),
        "alignment",
    ),
    "a model": (gguf([fact("general.architecture", 8, string("llama"))], ONE, direction(1)), "'llama' model"),
    "no architecture": (gguf([], ONE, direction(1)), "no control vector"),
    "no tensors": (gguf([ARCHITECTURE], [], b""), "steers nothing"),
    "other tensor": (gguf([ARCHITECTURE], [info("token_embd.weight", 8, 0)], direction(1)), "token_embd"),
    "negative block": (gguf([ARCHITECTURE], [info("direction.-1", 8, 0)], direction(1)), "direction.-1"),
    "type of tensor": (gguf([ARCHITECTURE], [info("direction.1", 8, 0, kind=1)], direction(1)), "type 1"),
    "dimensions": (gguf([ARCHITECTURE], [info("direction.1", 8, 0, dims=2)], direction(1)), "2 dimensions"),
    "many dimensions": (
        gguf([ARCHITECTURE], [string("direction.1") + struct.pack("<I", 2**32 - 1)] * 2, bytes(64)),
        "dimensions",
    ),
    "tensor twice": (gguf([ARCHITECTURE], ONE * 2, direction(1)), "twice"),
    "empty tensor": (gguf([ARCHITECTURE], [info("direction.1", 0, 0)], direction(1)), "0 numbers"),
    "long tensor": (gguf([ARCHITECTURE], [info("direction.1", MANY, 0)], direction(1)), "numbers"),
    "far tensor": (gguf([ARCHITECTURE], [info("direction.1", 8, MANY)], direction(1)), "ends before"),
    "overlap": (
        gguf([ARCHITECTURE], [info("direction.1", 16, 0), info("direction.2", 8, 32)], direction(1) * 2),
        "inside another",
    ),
    "unaligned": (gguf([ARCHITECTURE], [info("direction.1", 4, 16)], direction(1)), "unaligned"),
    "widths": (
        gguf([ARCHITECTURE], [info("direction.1", 8, 0), info("direction.2", 4, 32)], direction(1) * 2),
        "4 and 8 wide",
    ),
    "NaN": (gguf([ARCHITECTURE], ONE, direction(float("nan"))), "NaN"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_gguf_file_is_one_clear_line(tmp_path, name):
    data, why = HOSTILE[name]
    with pytest.raises(CheckpointError, match=why) as error:
        read_bytes(tmp_path, data)
    assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_change_of_bytes_makes_the_reader_fail_otherwise(tmp_path_factory, changes):
    data = bytearray(
        gguf([ARCHITECTURE, fact("a", 9, struct.pack("<IQ", 8, 1) + string("b"))], ONE * 1, direction(1))
    )
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(data)
    with contextlib.suppress(SteerkitError):
        assert load_any(path).directions


def test_the_first_block_is_left_out_or_refused(tmp_path):
    path, lost = saved(additions(0, 1), "gguf", tmp_path / "v.gguf")
    assert len(lost) == 1
    assert "blocks.0" in lost[0]
    assert list(load_any(path).directions) == [post(1)]
    with pytest.raises(InputError, match="nothing else"):
        export(additions(0), "gguf", tmp_path / "w.gguf")
    assert not (tmp_path / "w.gguf").exists()


WHERES = {
    "BOS": Where(),
    "prompt": replace(EVERY_TOKEN, generation=False),
    "generated": replace(EVERY_TOKEN, prompt=False),
    "positions": Where.positions(3),
    "marker": replace(Where.after("x"), bos=True),
    "steps": replace(EVERY_TOKEN, schedule=Decay(2.0)),
}


@pytest.mark.parametrize("said", WHERES)
@pytest.mark.parametrize("to", ["gguf", "pt"])
def test_which_tokens_are_steered_is_lost_with_a_warning(tmp_path, said, to):
    _, lost = saved(additions(1, 2, where=WHERES[said]), to, tmp_path / "v")
    assert len(lost) == 1
    assert said in lost[0]


D = 8
OTHERS = {
    "add": Add(post(1), normal(D)),
    "add_matrix": AddMatrix(post(1), normal(2, D)),
    "project": Project.out(post(1), normal(D)),
    "clamp": Clamp(post(1), normal(D)),
    "rotate": Rotate(post(1), torch.linalg.qr(normal(D, 2))[0].T.contiguous()),
    "low_rank": LowRank(post(1), normal(2, D), normal(2, D), normal(2)),
    "weight_delta": WeightDelta("layers.1.mlp.down", normal(2, D), normal(D, 2)),
}
HOLDS = {"gguf": "add", "pt": "add", "pyreft": "low_rank", "lora": "weight_delta"}


@pytest.mark.parametrize("to", HOLDS)
def test_what_a_format_cannot_hold_is_refused(tmp_path, to):
    out = tmp_path / "v"
    own = OTHERS[HOLDS[to]]
    for kind, edit in OTHERS.items():
        if kind != HOLDS[to]:
            with pytest.raises(InputError, match=f"{HOLDS[to]} edits only.*{kind} edit"):
                export(SteeringVector((own, edit)), to, out)
    condition = Condition(post(1), normal(D), 0.1)
    with pytest.raises(InputError, match="condition"):
        export(SteeringVector((own,), condition=condition), to, out)
    if to != "lora":
        elsewhere = (replace(own, site="blocks.1.hook_mlp_out"), replace(own, site="blocks.2.hook_mlp_out"))
        with pytest.raises(InputError, match=r"hook_mlp_out"):
            export(SteeringVector(elsewhere), to, out)
    assert not out.exists()
    everything = SteeringVector(tuple(OTHERS.values()), condition=condition)
    path, lost = saved(everything, "steerkit", tmp_path / "all.safetensors")
    assert lost == []
    assert [edit.name for edit in load_any(path).edits] == list(OTHERS)


# .pt


def dump(value, path):
    torch.save(value, path)
    return path


def test_a_bare_tensor_needs_a_site(tmp_path):
    path = dump(normal(D), tmp_path / "vec_ep10_layer15.pt")
    with pytest.raises(InputError, match="--layer 15"):
        load_any(path)
    assert torch.equal(load_any(path, layer=15).directions[post(15)], normal(D))
    assert torch.equal(load_any(path, site="blocks.2.hook_mlp_out").edits[0].vector, normal(D))
    with pytest.raises(InputError, match="not both"):
        load_any(path, layer=15, site=post(15))
    with pytest.raises(InputError, match="one vector"):
        load_any(path, layer=15, index=0)
    parameter = dump(torch.nn.Parameter(normal(1, 1, D).half()), tmp_path / "p.pt")
    assert torch.equal(load_any(parameter, layer=1).edits[0].vector, normal(D).half().float())


def test_a_matrix_of_vectors_needs_a_row(tmp_path):
    path = dump(normal(3, D), tmp_path / "DiffMean_weight.pt")
    vector = load_any(path, layer=2, index=1)
    assert torch.equal(vector.directions[post(2)], normal(3, D)[1])
    assert vector.provenance["index"] == 1
    with pytest.raises(InputError, match="holds 3 vectors"):
        load_any(path, layer=2)
    with pytest.raises(InputError, match="no vector 3"):
        load_any(path, layer=2, index=3)


def test_one_addition_is_a_bare_tensor_and_several_a_dictionary(tmp_path):
    path, lost = saved(additions(3), "pt", tmp_path / "one.pt")
    assert lost == [f"A bare tensor does not say where it acts: this one is for {post(3)}."]
    assert torch.equal(torch.load(path, weights_only=True), 1.5 * normal(32, seed=3))
    several = additions(0, 2)
    path, lost = saved(several, "pt", tmp_path / "two.pt")
    assert lost == []
    assert list(torch.load(path, weights_only=True)) == [0, 2]
    same_directions(several, load_any(path))


@pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steering_vectors_does_the_same(family, layer_type, request, tmp_path):
    Theirs = pytest.importorskip("steering_vectors").SteeringVector

    model = request.getfixturevalue(family)
    theirs = Theirs({0: normal(32), 2: normal(32, seed=1)}, layer_type)
    before = model.logits(IDS)
    with theirs.apply(model.model, multiplier=2.0), torch.no_grad():
        wanted = model.model(input_ids=IDS).logits
    ours = from_steering_vectors(theirs)
    stored = {"layer_activations": theirs.layer_activations, "layer_type": layer_type}
    for vector in (ours, load_any(dump(stored, tmp_path / "v.pt"))):
        with model.steer(vector, strength=2.0):
            torch.testing.assert_close(model.logits(IDS), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, before, atol=0.1)
    if layer_type == "decoder_block":
        path, _ = saved(ours, "pt", tmp_path / "ours.pt", strength=2.0)
        back = Theirs(torch.load(path, weights_only=True))
        with back.apply(model.model), torch.no_grad():
            torch.testing.assert_close(model.model(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_what_steering_vectors_cannot_tell(tmp_path):
    Theirs = pytest.importorskip("steering_vectors").SteeringVector

    with pytest.raises(InputError, match="input_layernorm"):
        from_steering_vectors(Theirs({0: normal(D)}, "input_layernorm"))
    with pytest.raises(InputError, match="from the end"):
        from_steering_vectors(Theirs({-1: normal(D)}))
    path = dump(Theirs({0: normal(D)}), tmp_path / "object.pt")
    with pytest.raises(CheckpointError, match=r"torch\.save\(vector\.layer_activations, path\)"):
        load_any(path)


def test_directions_of_repeng(tmp_path):
    arrays = {k: normal(D, seed=k).numpy() for k in (1, 2, 5)}
    vector = from_repeng(SimpleNamespace(model_type="mistral", directions=arrays))
    assert vector.provenance["model_hint"] == "mistral"
    assert vector.where == EVERY_TOKEN
    assert list(vector.directions) == [post(1), post(2), post(5)]
    halves = {k: v.astype(np.float64) for k, v in arrays.items()}
    for stored in (
        arrays,
        halves,
        {"directions": arrays},
        {str(k): torch.tensor(v) for k, v in arrays.items()},
    ):
        same_directions(vector, load_any(dump(stored, tmp_path / "v.pt")))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["alone", "in a dictionary", "in an array", "plain pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path, place):
    mark = tmp_path / "it_ran"
    bomb = Bomb(mark)
    stored = {
        "alone": bomb,
        "in a dictionary": {1: normal(D), 2: bomb},
        "in an array": {1: np.array([bomb, bomb], dtype=object)},
        "plain pickle": bomb,
    }[place]
    path = tmp_path / "v.pt"
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(stored))
    else:
        torch.save(stored, path)
    with pytest.raises(CheckpointError, match=r"v\.pt"):
        load_any(path, layer=1)
    assert not mark.exists()
    torch.save(stored, path)
    torch.load(path, weights_only=False)  # it is a real bomb
    assert mark.exists()


BAD_PT = {
    "NaN": (torch.full((D,), float("nan")), "NaN"),
    "whole numbers": (torch.arange(D), "int64"),
    "no numbers": (torch.zeros(0), "no vector"),
    "three axes": (normal(2, 2, D), "no vector"),
    "a list": ([1, 2], "list"),
    "nothing": ({}, "no vector"),
    "names": ({"weight": normal(D)}, "no number of a layer"),
    "matrices": ({1: normal(2, D)}, "no vector"),
    "twice": ({1: normal(D), "1": normal(D)}, "two vectors"),
    "widths": ({1: normal(D), 2: normal(D + 1)}, "8 and 9 wide"),
    "complex": (torch.zeros(D, dtype=torch.complex64), "no vector"),
}


@pytest.mark.parametrize("name", BAD_PT)
def test_a_bad_pt_file_is_one_clear_line(tmp_path, name):
    stored, why = BAD_PT[name]
    path = dump(stored, tmp_path / "v.pt")
    with pytest.raises(CheckpointError, match=why):
        load_any(path, **({} if isinstance(stored, dict) else {"layer": 1}))


def test_a_pt_file_that_is_cut_short_is_damaged(tmp_path):
    data = dump({1: normal(64), 2: normal(64)}, tmp_path / "v.pt").read_bytes()
    for end in range(0, len(data) - 1, 64):
        (tmp_path / "v.pt").write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"v\.pt"):
            load_any(tmp_path / "v.pt")


# pyreft


def equation(name, h, R, W, b):
    """The paper's, R with r rows."""
    read = {
        "Loreft": h @ W.T + b - h @ R.T,
        "Noreft": h @ W.T + b - h @ R.T,
        "Direft": h @ W.T + b,
        "Nodireft": h @ W.T + b,
        "Consreft": b - h @ R.T,
        "Lobireft": b.expand(*h.shape[:-1], len(b)),
    }[name]
    return h + read @ R


def pyreft_state(name, R, W, b):
    """What pyreft's `torch.save(intervention.state_dict())` holds; R is changed to what an orthogonal layer keeps."""
    if name in ("Noreft", "Nodireft"):
        return {"proj_layer.weight": R, "learned_source.weight": W, "learned_source.bias": b}, R
    if name == "Loreft":
        R = torch.linalg.qr(R.T)[0].T
        return {"weight": W.bfloat16(), "bias": b.bfloat16(), "rotate_layer": R.T}, R
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(R.T.clone())
    torch.nn.utils.parametrizations.orthogonal(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.3 * normal(*R.T.shape, seed=9))
    state = {f"rotate_layer.{key}": value for key, value in layer.state_dict().items()}
    own = (
        {"learned_source": b}
        if name in ("Consreft", "Lobireft")
        else {"learned_source.weight": W, "learned_source.bias": b}
    )
    return own | state, layer.weight.detach().T


def pyreft_directory(path, entries, kind="pyreft.interventions"):
    """config.json and .bin files as pyreft writes them, from (layer, class, state)."""
    keys = [f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0" for layer, *_ in entries]
    path.mkdir(exist_ok=True)
    config = {
        "eos_token_id": 2,
        "intervention_constant_sources": [True] * len(entries),
        "intervention_dimensions": [D] * len(entries),
        "intervention_types": [f"<class '{kind}.{name}Intervention'>" for _, name, _ in entries],
        "mode": "parallel",
        "representations": [[layer, "block_output", "pos", 1, 3, *[None] * 9] for layer, *_ in entries],
        "sorted_keys": keys,
        "transformers_version": "4.51.2",
    }
    (path / "config.json").write_text(json.dumps(config))
    for key, (_, _, state) in zip(keys, entries):
        torch.save(state, path / f"intkey_{key}.bin")
    return path


@pytest.mark.parametrize("name", ["Loreft", "Noreft", "Direft", "Nodireft", "Consreft", "Lobireft"])
def test_each_intervention_of_pyreft_is_the_paper_s_equation(tmp_path, name):
    R, W, b = normal(3, D), normal(3, D, seed=1), normal(3, seed=2)
    W, b = W.bfloat16().float(), b.bfloat16().float()
    state, R = pyreft_state(name, R, W, b)
    path = pyreft_directory(tmp_path / "reft", [(1, name, state), (4, name, state)])
    vector = load_any(path, positions="f2+l3")
    assert vector.where == Where.spans((0, 2), (-3, 0), generation=False)
    assert [edit.site for edit in vector.edits] == [post(1), post(4)]
    h = normal(2, 5, D, seed=3)
    torch.testing.assert_close(
        vector.edits[1].apply(h, 1.0, None, None), equation(name, h, R, W, b), rtol=1e-4, atol=1e-5
    )


def test_low_rank_edits_go_to_pyreft_and_back(tmp_path, llama):
    edits = tuple(
        LowRank(post(i), normal(3, 32, seed=i), normal(3, 32, seed=i + 5) / 8, normal(3), scale=0.5)
        for i in (0, 2)
    )
    where = Where.spans((0, 2), (-2, None), generation=False)
    vector = SteeringVector(edits, where=where)
    path, lost = saved(vector, "pyreft", tmp_path / "reft", strength=2.0)
    assert len(lost) == 1
    assert "'f2+l2'" in lost[0]
    state = torch.load(next(path.glob("intkey_layer_2*.bin")), weights_only=True)
    rows = state["rotate_layer"].T
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "weight": (3, 32),
        "bias": (3,),
        "rotate_layer": (32, 3),
    }
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-6)
    h = normal(2, 5, 32)
    torch.testing.assert_close(
        equation("Loreft", h, rows, state["weight"], state["bias"]),
        edits[1].apply(h, 2.0 * 0.5, None, None),
        rtol=1e-4,
        atol=1e-4,
    )
    back = load_any(path, positions="f2+l2")
    lengths = torch.tensor([5, 5])
    with llama.steer(vector, strength=2.0, prompt_lengths=lengths):
        wanted = llama.logits(IDS)
    with llama.steer(back, prompt_lengths=lengths):
        torch.testing.assert_close(llama.logits(IDS), wanted, rtol=1e-5, atol=1e-5)


def test_pyreft_s_other_ways_to_say_it(tmp_path):
    state, _ = pyreft_state("Loreft", normal(3, D), normal(3, D), normal(3))
    path = pyreft_directory(
        tmp_path / "reft", [(8, "Loreft", state)], "easysteer.reft.pyreft.reft.algorithms.loreft"
    )
    with pytest.warns(ConversionWarning, match="does not say which tokens"):
        vector = load_any(path)
    assert vector.where == Where(generation=False, bos=True)
    config = json.loads((path / "config.json").read_text())
    for representation, site in (
        ([0, "model.layers[15].output", "pos", 1], post(15)),
        ({"layer": 3, "component": "block_input"}, "blocks.3.hook_resid_pre"),
    ):
        (path / "config.json").write_text(json.dumps({**config, "representations": [representation]}))
        assert quietly(path).sites == (site,)
    for positions in ("7", "f7-l7", "", "f", "l0"):
        with pytest.raises(InputError, match="f7"):
            load_any(path, positions=positions)


def test_a_bad_pyreft_directory_is_one_clear_line(tmp_path):
    state, _ = pyreft_state("Loreft", normal(3, D), normal(3, D), normal(3))

    def refused(error, why, entries=((1, "Loreft", state),), **changes):
        path = pyreft_directory(tmp_path / "reft", list(entries))
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=why):
            load_any(path, positions="f1")

    refused(InputError, "DAS", [(1, "DAS", state)])
    refused(InputError, "head_output", representations=[[1, "head_output", "pos", 1]])
    refused(InputError, "first and last", [(1, "Loreft", state), (1, "Loreft", state)])
    refused(CheckpointError, "2 keys", sorted_keys=["a", "b"])
    refused(CheckpointError, "does not exist", sorted_keys=["a"])
    refused(CheckpointError, "damaged", sorted_keys=None)
    refused(CheckpointError, "bias", [(1, "Loreft", {k: v for k, v in state.items() if k != "bias"})])
    refused(CheckpointError, "NaN", [(1, "Loreft", {**state, "bias": torch.full((3,), float("nan"))})])
    refused(CheckpointError, "damaged", [(1, "Loreft", {**state, "weight": normal(3, D + 1)})])
    refused(CheckpointError, "damaged", [(1, "Loreft", {**state, "bias": normal(4)})])
    mark = tmp_path / "it_ran"
    refused(CheckpointError, "without running code", [(1, "Loreft", {**state, "x": Bomb(mark)})])
    assert not mark.exists()


# LoRA


def deltas(model, ranks, where=EVERY_TOKEN, scale=0.5):
    edits = []
    for seed, (path, r) in enumerate(ranks.items()):
        weight = model.model.get_submodule(path).weight
        out, inward = weight.shape[::-1] if "c_" in path else weight.shape
        A, B = normal(r, inward, seed=seed) / 8, normal(out, r, seed=seed + 50) / 8
        edits.append(WeightDelta(path, A, B, scale=scale))
    return SteeringVector(tuple(edits), {"model": "tiny"}, where)


RANKS = {
    "llama": {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.down_proj": 4, "model.layers.2.mlp.up_proj": 4},
    "gpt2": {"transformer.h.0.attn.c_attn": 3, "transformer.h.1.mlp.c_proj": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", RANKS)
def test_peft_loads_weight_deltas_as_a_lora(tmp_path, request, family):
    import peft

    model = request.getfixturevalue(family)
    vector = deltas(model, RANKS[family])
    vector = SteeringVector((*vector.edits, vector.edits[0].scaled(3.0)), vector.provenance, EVERY_TOKEN)
    path, lost = saved(vector, "lora", tmp_path / "adapter", strength=4.0)
    assert lost == []
    with model.steer(vector, strength=4.0):
        wanted = model.logits(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(build(family), str(path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.logits(IDS), wanted, atol=0.1)
    back = load_any(path)
    assert back.provenance["model"] == "tiny"
    with model.steer(back):
        torch.testing.assert_close(model.logits(IDS), wanted, rtol=1e-5, atol=1e-5)


def test_one_scale_for_all_is_right_too(tmp_path, llama):
    """vLLM takes alpha / r from the configuration and the rank from the tensors."""
    from safetensors.torch import load_file

    vector = deltas(llama, RANKS["llama"])
    path, _ = saved(vector, "lora", tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 2}
    tensors = load_file(path / "adapter_model.safetensors")
    for edit in vector.edits:
        a, b = (tensors[f"base_model.model.{edit.site}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a, edit.scale * edit.B @ edit.A)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 32, "1.self_attn.q_proj": 1},
                                                                "rank_pattern": {r".*\.0\.mlp\.down_proj": 2}}])  # fmt: skip
def test_a_lora_of_peft_is_a_vector(tmp_path, llama, options):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **options)
    adapted = peft.get_peft_model(build("llama"), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(normal(*parameter.shape) / 8)
        wanted = adapted(input_ids=IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    with llama.steer(load_any(tmp_path / "adapter")):
        torch.testing.assert_close(llama.logits(IDS), wanted, rtol=1e-5, atol=1e-5)


def test_a_lora_that_is_more_or_damaged_is_one_clear_line(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    path, lost = saved(deltas(llama, RANKS["llama"], Where()), "lora", tmp_path / "adapter")
    assert len(lost) == 1
    assert "BOS" in lost[0]
    weights, settings = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(settings.read_text())

    def refused(error, why, changes=(), **more):
        settings.write_text(json.dumps(config | more))
        stored = {k: v.contiguous() for k, v in {**tensors, **dict(changes)}.items() if v is not None}
        save_file(stored, weights)
        with pytest.raises(error, match=why):
            load_any(path)

    first = next(name for name in tensors if "lora_A" in name)
    refused(InputError, "use_dora", use_dora=True)
    refused(InputError, "modules_to_save", modules_to_save=["lm_head"])
    refused(InputError, "biases", bias="all")
    refused(InputError, "IA3", peft_type="IA3")
    refused(InputError, "no matrix", [("base_model.model.x.lora_magnitude_vector", normal(3))])
    refused(CheckpointError, "only lora_B", [(first, None)])
    refused(CheckpointError, "NaN", [(first, torch.full_like(tensors[first], float("nan")))])
    refused(CheckpointError, "lora_A is", [(first, normal(9, 32))])
    refused(CheckpointError, "damaged", lora_alpha=None)
    settings.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_any(path)
    settings.write_text(json.dumps(config))
    data = weights.read_bytes()
    for end in range(0, len(data), 512):
        weights.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match="damaged"):
            load_any(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_any(path)


# all of them


def test_formats_are_known_by_their_files(tmp_path, llama):
    made = {
        "gguf": additions(1),
        "pt": additions(1),
        "steerkit": additions(1),
        "pyreft": SteeringVector((OTHERS["low_rank"],)),
        "lora": deltas(llama, RANKS["llama"]),
    }
    assert made.keys() == FORMATS.keys()
    suffix = {"gguf": ".gguf", "pt": ".pt", "steerkit": ".safetensors"}
    for name, vector in made.items():
        path, _ = saved(vector, name, tmp_path / f"{name}{suffix.get(name, '')}")
        assert format_of(path) == name
        if name != "pt":
            with pytest.raises(InputError, match="needs no --site"):
                load_any(path, site=post(1))
    for name, end in suffix.items():
        (tmp_path / "no_suffix").write_bytes((tmp_path / f"{name}{end}").read_bytes())
        assert format_of(tmp_path / "no_suffix") == name


def test_bad_paths_are_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_any(tmp_path / "none.gguf")
    for path in (tmp_path, Path(__file__)):
        with pytest.raises(InputError, match="no steering vector"):
            load_any(path)
    with pytest.raises(InputError, match="Did you mean 'gguf'"):
        export(additions(1), "ggf", tmp_path / "x")
    with pytest.raises(InputError, match="finite"):
        export(additions(1), "gguf", tmp_path / "x", strength=float("inf"))
    with pytest.raises(InputError, match="is a directory"):
        export(additions(1), "gguf", tmp_path)
    with pytest.raises(InputError, match="not empty"):
        export(SteeringVector((OTHERS["low_rank"],)), "pyreft", Path(__file__), force=True)
    with pytest.raises(InputError, match="counted from 0"):
        load_any(dump(normal(D), tmp_path / "v.pt"), layer=-1)


def test_a_directory_is_replaced_when_forced_and_a_vector_only(tmp_path):
    vector = SteeringVector((OTHERS["low_rank"],))
    out = tmp_path / "reft"
    saved(vector, "pyreft", out)
    with pytest.raises(InputError, match="not empty"):
        export(vector, "pyreft", out)
    saved(vector, "pyreft", out, force=True, strength=3.0)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("…")
    with pytest.raises(InputError, match="not empty"):
        export(vector, "pyreft", other, force=True)
    assert (other / "thesis.txt").exists()
