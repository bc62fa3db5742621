"""From what a user names (an id, a directory, a loaded object) to a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from steerkit.errors import CheckpointError, InputError
from steerkit.lens import is_transformer_lens
from steerkit.runs import read_json

ADAPTER_TYPES = "steerkit.peft"
"""Entry points of packages that bring peft types of their own: loading one registers them."""
ADAPTER_RECORD = "steerkit_adapter.json"
"""What steerkit writes into an adapter directory: `method`, `settings`, `base` and `fingerprint`, the base's."""


@dataclass(frozen=True)
class AdapterOrigin:
    """The model that an adapter was made for, and the one that it is put on."""

    made_for: str
    fingerprint: str
    """The former's."""
    base: str

    def require(self, fingerprint: str, adapter: str) -> None:
        """Raise InputError where the latter's is another."""
        if fingerprint != self.fingerprint:
            raise InputError(
                f"The adapter {adapter} was made for {self.made_for} (fingerprint {self.fingerprint}), and {self.base} is another "
                f"model ({fingerprint}): give other_model=True if that is meant."
            )


@dataclass(frozen=True)
class Loaded:
    """A model as HookedModel takes it."""

    model: nn.Module
    tokenizer: Any
    name: str
    revision: str | None = None
    has_lm_head: bool = True
    """False when the checkpoint has no weights for the head that the class has."""
    origin: AdapterOrigin | None = None
    """Of an adapter that says which model it was made for."""


def load(
    source: Any, *, tokenizer: Any, device: Any, dtype: Any, revision: str | None, device_map: Any
) -> Loaded:
    """See `HookedModel.from_pretrained`."""
    dtype = parse_dtype(dtype)
    if isinstance(source, nn.Module):
        return _loaded_module(source, tokenizer, device, dtype)
    if not isinstance(source, (str, Path)):
        raise InputError(f"A model is a name, a directory or a loaded model, not {type(source).__name__}.")
    name, place = str(source), str(source)
    if name == "storyworld":
        from steerkit import storyworld

        place = str(storyworld.model_path())
    if (Path(place) / "run.yaml").is_file() and (Path(place) / "adapter").is_dir():
        place = str(Path(place) / "adapter")  # a run of `steerkit adapt train`
    if (Path(place) / "adapter_config.json").is_file() and not (Path(place) / "config.json").is_file():
        return _load_adapter(name, Path(place), tokenizer, device, dtype, device_map)
    _check_place(name, place)
    if device is None and device_map is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, has_head = _load_model(name, place, dtype, revision, device_map)
    if device is not None and device_map is None:
        model = model.to(device)
    tokens = load_tokenizer(tokenizer if tokenizer is not None else place, name, revision)
    return Loaded(
        model.eval(), tokens, name, revision or getattr(model.config, "_commit_hash", None), has_head
    )


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """torch.bfloat16 from 'bfloat16', 'bf16' or itself."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
    found = getattr(torch, short.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"Unknown dtype {dtype!r}: use float32, bfloat16 or float16.")
    return found


def load_tokenizer(source: Any, name: str, revision: str | None = None) -> Any:
    """The tokenizer object itself, or the one saved under a directory or id."""
    if not isinstance(source, (str, Path)):
        return source
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(source), revision=revision)
    except Exception as error:  # transformers raises a dozen kinds here, down to TypeError
        raise InputError(
            f"{name} has no tokenizer that can be loaded: pass tokenizer=… ({_first_line(error)})"
        ) from error


def _check_place(name: str, place: str) -> None:
    path = Path(place).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name} is not a model directory: it has no config.json.")
    elif path.exists():
        raise InputError(f"{name} is a file: a model is a directory with config.json and model.safetensors.")
    elif place.startswith(("/", "./", "../", "~")) or place.count("/") > 1:
        raise InputError(f"There is no directory {name}.")


def _load_model(name: str, place: str, dtype: Any, revision: str | None, device_map: Any) -> tuple[Any, bool]:
    import transformers
    from safetensors import SafetensorError

    options = {
        "revision": revision,
        "use_safetensors": True,
        "device_map": device_map,
        "dtype": dtype or "auto",
    }
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(place, revision=revision)
            auto = _auto_class(config)
            model, info = auto.from_pretrained(place, config=config, output_loading_info=True, **options)
            if _lacks_head(model, info["missing_keys"]):
                auto = transformers.AutoModel
                model, info = auto.from_pretrained(place, config=config, output_loading_info=True, **options)
    except SafetensorError as error:
        raise CheckpointError(f"The weights of {name} can't be read: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError) as error:
        if Path(place).is_dir():
            raise InputError(f"{name} can't be loaded: {_first_line(error)}") from error
        raise InputError(
            f"Unknown model {name!r}: no such directory, and no Hugging Face model that is cached or can be "
            f"reached. Use 'storyworld', a directory, or download it first. ({_first_line(error)})"
        ) from error
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing or info["mismatched_keys"]:
        what = missing[0] if missing else sorted(map(str, info["mismatched_keys"]))[0]
        count = len(missing) + len(info["mismatched_keys"])
        raise CheckpointError(
            f"The weights of {name} are incomplete: {count} tensors are missing or misshapen, such as {what}."
        )
    return model, auto is not transformers.AutoModel


def _auto_class(config: Any) -> Any:
    """With the LM head that the checkpoint was saved with, if any."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    saved = (getattr(config, "architectures", None) or [""])[0] or ""
    kind = config.model_type
    bare = auto.MODEL_MAPPING_NAMES.get(kind, ())
    if saved in ((bare,) if isinstance(bare, str) else bare) or saved.endswith("EncoderModel"):
        return getattr(transformers, saved) if saved.endswith("EncoderModel") else transformers.AutoModel
    if config.is_encoder_decoder and kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForSeq2SeqLM
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if masked and "CausalLM" not in saved and "LMHead" not in saved:
        return transformers.AutoModelForMaskedLM
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _lacks_head(model: Any, missing: Any) -> bool:
    """Whether the head's weights are missing from the checkpoint (tied ones are not reported as missing)."""
    prefix = model.base_model_prefix + "."
    return model.base_model is not model and any(not key.startswith(prefix) for key in missing)


def _load_adapter(name: str, path: Path, tokenizer: Any, device: Any, dtype: Any, device_map: Any) -> Loaded:
    """A PEFT adapter directory: its base model, with the adapter on top."""
    import peft

    _require_type(name, path)
    config = peft.PeftConfig.from_pretrained(str(path))
    base_name = config.base_model_name_or_path
    if not base_name:
        raise InputError(
            f"The adapter {name} does not say which model it belongs to (base_model_name_or_path)."
        )
    own = any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = tokenizer if tokenizer is not None or not own else str(path)
    base = load(
        base_name,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        revision=config.revision,
        device_map=device_map,
    )
    origin = adapter_origin(path, base.name)
    try:
        model = peft.PeftModel.from_pretrained(base.model, str(path)).eval()
    except (RuntimeError, ValueError) as error:
        made_for = f", it was made for {origin.made_for}" if origin else ""
        raise InputError(
            f"The adapter {name} does not fit {base.name}{made_for}: {_first_line(error)}."
        ) from error
    return Loaded(model, base.tokenizer, name, base.revision, base.has_lm_head, origin)


def adapter_origin(path: Path, base: str) -> AdapterOrigin | None:
    """What the adapter directory at `path` says about the model it was made for, if anything; `base` is the one at hand."""
    if not (path / ADAPTER_RECORD).is_file():
        return None
    record = read_json(path / ADAPTER_RECORD)
    return AdapterOrigin(record["base"], record["fingerprint"], base)


def _require_type(name: str, path: Path) -> None:
    """Register the adapter's type, if peft has it not. Raises InputError where no installed package has it."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known

    kind = read_json(path / "adapter_config.json").get("peft_type")
    if kind not in known:
        for entry in metadata.entry_points(group=ADAPTER_TYPES):
            entry.load()
    if kind not in known:
        raise InputError(
            f"The adapter {name} is of the type {kind}, which neither peft {peft.__version__} nor an installed package has: "
            "install a newer peft, or the package that made it."
        )


def _loaded_module(model: nn.Module, tokenizer: Any, device: Any, dtype: Any) -> Loaded:
    while hasattr(model, "_orig_mod"):
        model = cast(nn.Module, model._orig_mod)
    for target in (device, dtype):
        if target is not None:
            model = model.to(target)
    if is_transformer_lens(model):
        tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        name = getattr(model.cfg, "model_name", None) or type(model).__name__
        return Loaded(model, tokenizer, name)
    config: Any = getattr(model, "config", None)
    origin = getattr(config, "_name_or_path", "") or ""
    if tokenizer is None and origin:
        try:
            tokenizer = load_tokenizer(origin, origin)
        except InputError:
            tokenizer = None
    elif isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer, str(tokenizer))
    return Loaded(model, tokenizer, origin or type(model).__name__, getattr(config, "_commit_hash", None))


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and loading reports: what matters in them is raised here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
