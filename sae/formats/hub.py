"""SAEs in Hugging Face repositories: `hf://user/repo/folder`, `user/repo:folder`, and pushing one's own."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae.architectures import SAE
from sae.formats.base import first_line, why_unfetched
from steerkit.errors import InputError

_URL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/(.*?))?/?")
_SHORT = re.compile(r"([\w.-]+/[\w.-]+):(.*?)/?")


def is_remote(source: str) -> bool:
    """Whether `source` names a repository: `hf://…`, or `user/repo:folder` where no such path exists."""
    return source.startswith("hf://") or (bool(_SHORT.fullmatch(source)) and not Path(source).exists())


def fetch(source: str, files: Iterable[str]) -> Path:
    """The local directory with a repository's folder, of which only `files` are fetched. InputError when it cannot be had."""
    from huggingface_hub import snapshot_download

    if found := _URL.fullmatch(source):
        repo, revision, folder = found[1], found[2], found[3] or ""
    elif found := _SHORT.fullmatch(source):
        repo, revision, folder = found[1], None, found[2]
    else:
        raise InputError(f"{source} names no repository; write hf://user/repo/folder or user/repo:folder.")
    folder = folder.strip("/")
    if ".." in folder.split("/"):
        raise InputError(f"{source}: the folder must lie inside the repository.")
    wanted = [f"{folder}/{file}" if folder else file for file in files]
    try:
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=wanted)
    except Exception as error:  # the hub's, the network's, the cache's
        raise InputError(
            f"{source} could not be fetched ({why_unfetched(error)}). Check the name and the network, and "
            "for private repositories `hf auth login`."
        ) from None
    path = Path(snapshot) / folder
    if not path.is_dir():
        raise InputError(
            f"{source}: the repository has no SAE in {folder!r}, or it was not fetched before going offline."
        )
    return path


def push_to_hub(
    sae: SAE,
    repo: str,
    folder: str = "",
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Add a sparse autoencoder",
) -> str:
    """Upload what `sae.save` writes, with a short README, to the repository `user/repo`, which is made if there is none.

    Returns the source that `load` takes. `sae_lens.SAE.from_pretrained(repo, folder)` reads it too. Raises InputError when
    the upload fails.
    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"{repo!r} is no repository; write user/repo.")
    folder = folder.strip("/")
    source = f"hf://{repo}{'@' + revision if revision else ''}{'/' + folder if folder else ''}"
    with tempfile.TemporaryDirectory() as directory:
        sae.save(directory)
        (Path(directory) / "README.md").write_text(model_card(sae, source, repo, folder))
        try:
            api = HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=directory,
                path_in_repo=folder or None,
                revision=revision,
                commit_message=message,
            )
        except Exception as error:  # the hub's and the network's
            raise InputError(
                f"{repo} could not be written ({type(error).__name__}: {first_line(error)}). "
                "Check the network, the name, and `hf auth login` with a token that may write."
            ) from None
    return source


def model_card(sae: SAE, source: str, repo: str, folder: str) -> str:
    """A README with the facts that are known."""
    import yaml

    model = sae.metadata.get("model")
    head: dict[str, Any] = {"library_name": "steerkit", "tags": ["sparse-autoencoder", "saelens"]}
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        head["base_model"] = model
    facts = {
        "Architecture": f"{sae.arch} ({sae.saelens_architecture} in SAELens)",
        "Model": model,
        "Site": sae.metadata.get("site"),
        "Width": f"{sae.d_in} → {sae.d_sae:,} latents",
        "Trained on": sae.metadata.get("data"),
        "Tokens": f"{sae.metadata['tokens']:,}" if isinstance(sae.metadata.get("tokens"), int) else None,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    theirs = (
        f"sae_lens.SAE.from_pretrained({repo!r}, {folder!r})"
        if folder
        else "sae_lens.SAE.load_from_disk(directory)"
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# Sparse autoencoder\n\n| | |\n|---|---|\n{rows}\n\n"
        f"```python\nimport sae\n\nmodel = sae.load({source!r})\n```\n\nIn SAELens's layout; `{theirs}` reads it too.\n"
    )
