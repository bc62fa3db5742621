"""Ways to make a steering vector, one file each. A new one is a file and a line here."""

from steerkit.steering.methods.base import METHODS, Method
from steerkit.steering.methods.mean_diff import MeanDiff

__all__ = ["METHODS", "MeanDiff", "Method"]
