"""The methods, a file each: importing this registers them."""

from steerkit.adapters.methods import (
    antipasto,
    lora,
    ssvd,
    svft,
)

__all__ = [
    "antipasto",
    "lora",
    "ssvd",
    "svft",
]
