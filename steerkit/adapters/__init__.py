"""Ways to fine-tune a model by a small addition, and what each says about its inside."""

from steerkit.adapters import methods
from steerkit.adapters.adapted import Adapted, get, load
from steerkit.adapters.base import METHODS, AdapterMethod, make
from steerkit.adapters.slots import Slot, choose, find_slots

__all__ = [
    "METHODS",
    "Adapted",
    "AdapterMethod",
    "Slot",
    "choose",
    "find_slots",
    "get",
    "load",
    "make",
    "methods",
]
