"""Every kind of page that the project writes opens from disk with the network cut off. `visit` fails a test at the first
error in the console and at any request for anything but a file.
"""

from __future__ import annotations

import plotly.graph_objects as go
import pytest
import torch

from sae.dashboard.directions import build_directions
from steerkit.plots import page as write_page
from tests.browser.conftest import SITE


@pytest.fixture(params=["directory", "single file", "directions", "figures"])
def written(request, make, parts, tmp_path):
    """A page, and what is there once its plots are drawn."""
    model, _, documents, _ = parts
    if request.param == "directory":
        return make(tmp_path / "dash"), "#density-plot .bars"
    if request.param == "single file":
        return make(tmp_path / "one.html", single_file=True, latents=[3, 5]), "#density-plot .bars"
    if request.param == "directions":
        vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
        path = build_directions(
            model, vectors, ["a<b>", "c"], documents, SITE, tmp_path / "dash", tokens=1000, quiet=True
        )
        return path, "#density-plot .bars"
    figures = [go.Figure(go.Scatter(x=[1, 2], y=[3, 4])), go.Figure(go.Heatmap(z=[[1, 2], [3, 4]]))]
    return write_page(
        "Figures", ["<h2>Two</h2>", *figures], tmp_path / "report.html"
    ), "#figure-2 .heatmaplayer"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_ask_the_network_for_nothing(visit, written, scheme):
    path, drawn = written
    page = visit(path, scheme=scheme, plots=True)
    page.wait_for_selector(drawn)
    page.click("[data-switch-theme]")
    if page.locator("#rows .row").count():
        page.click("#rows .row")
        page.wait_for_selector("#histogram .bars")
        page.keyboard.press("u")
        page.wait_for_selector("#overview", state="visible")
    page.reload()
    page.wait_for_selector(drawn)
