"""Previews: the texts and divergences are those of sampling and of a forward by hand; hostile text stays text."""

from __future__ import annotations

import html

import numpy as np
import pytest
import torch

from steerkit import steering
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering import SteeringVector, Where
from steerkit.steering.previews import Continuation, Preview

SITE = "blocks.1.hook_resid_post"
HOSTILE = '</p><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def vector():
    return SteeringVector.add(
        {SITE: torch.randn(128, generator=torch.Generator().manual_seed(0))}, method="random"
    )


@pytest.fixture(scope="module")
def shown(model, vector):
    return steering.preview(model, vector, ["Anna is", "One rainy day"], [3.0, -3.0], max_new_tokens=12)


def test_strengths_rise_and_zero_is_among_them(shown):
    assert shown.strengths == (-3.0, 0.0, 3.0)
    assert [len(row) for row in shown.continuations] == [3, 3]
    for row in shown.continuations:
        assert set(row[1].kl) == {0.0}
        assert all(kl >= 0 for kl in row[0].kl)
        assert row[2].mean_kl > 0


def test_kl_is_that_of_two_forwards(model, vector, shown):
    prompt = model.tokenizer("Anna is")["input_ids"]
    found = shown.continuations[0][2]
    ids = torch.tensor([model.tokenizer("Anna is" + found.text)["input_ids"]])
    with torch.no_grad():
        base = model.logits(ids).double().log_softmax(-1)
        with model.steer(vector, strength=3.0, where=Where.everywhere()):
            changed = model.logits(ids).double().log_softmax(-1)
    kl = (changed.exp() * (changed - base)).sum(-1)[0, len(prompt) - 1 : -1]
    np.testing.assert_allclose(found.kl[: len(kl)], kl.numpy(), rtol=1e-3, atol=1e-7)


def test_near_temperature_zero_it_is_the_greedy_text(model, vector):
    one = steering.preview(model, vector, "Anna is", [4.0], max_new_tokens=10, temperature=1e-4)
    with model.steer(vector, strength=4.0):
        greedy = model.generate("Anna is", max_new_tokens=10, do_sample=False)
    assert one.continuations[0][1].text.strip().removesuffix("</s>") == greedy.strip()


def test_the_same_seed_gives_the_same_texts(model, vector, shown):
    again = steering.preview(model, vector, ["Anna is", "One rainy day"], [3.0, -3.0], max_new_tokens=12)
    assert again == shown


@pytest.mark.parametrize(
    "wrong",
    [{"prompts": []}, {"strengths": [float("nan")]}, {"temperature": 0.0}, {"max_new_tokens": 10_000}],
)
def test_bad_settings(model, vector, wrong):
    settings = {"prompts": ["Anna is"], "strengths": [1.0], **wrong}
    with pytest.raises(InputError):
        steering.preview(model, vector, settings.pop("prompts"), settings.pop("strengths"), **settings)


def test_hostile_text_is_escaped_once_in_a_page_and_twice_in_a_frame(tmp_path):
    row = (
        Continuation((HOSTILE,), (0.0,)),
        Continuation((HOSTILE, "\x1b"), (2.0, 7.0)),
        Continuation((), ()),
    )
    preview = Preview(HOSTILE, (HOSTILE,), (0.0, 1.0, 2.0), (row,))
    text = preview.save(tmp_path / "sub" / "p.html").read_text()
    assert HOSTILE not in text
    assert text.count(html.escape(HOSTILE)) == 6  # the title twice, the prompt, unsteered twice, steered
    frame = preview._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert 'sandbox="allow-scripts"' in frame
    assert frame.count("<") == 2
    assert "http" not in text
