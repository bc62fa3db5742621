"""The methods, a file each: importing this registers them."""

from steerkit.adapters.methods import (
    lora,
    svft,
)

__all__ = [
    "lora",
    "svft",
]
