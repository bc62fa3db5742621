"""A dashboard of an SAE's latents: static files that open from disk.

`build(model, sae, documents, "blocks.2.hook_resid_post", "dash/")` writes them; see `sae.dashboard.build`.
"""

from sae.dashboard.directions import build_directions
from sae.dashboard.pages import build
from sae.dashboard.pieces import readable_tokens

__all__ = ["build", "build_directions", "readable_tokens"]
