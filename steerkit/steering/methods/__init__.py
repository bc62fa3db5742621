"""Ways to make a steering vector, one file each. A new one is a file and a line here."""

from steerkit.steering.methods.act_add import ActAdd
from steerkit.steering.methods.antipasto import AntiPaSTO
from steerkit.steering.methods.base import METHODS, Method
from steerkit.steering.methods.bipo import BiPO
from steerkit.steering.methods.fgaa import FGAA, fit_effects
from steerkit.steering.methods.iti import ITI
from steerkit.steering.methods.lda import LDA
from steerkit.steering.methods.linear_probe import LinearProbeDirection
from steerkit.steering.methods.logistic import Logistic
from steerkit.steering.methods.lora import LoRA
from steerkit.steering.methods.mean_centring import MeanCentring
from steerkit.steering.methods.mean_diff import MeanDiff
from steerkit.steering.methods.pca import PCA
from steerkit.steering.methods.random_direction import RandomDirection
from steerkit.steering.methods.reft import ReFT
from steerkit.steering.methods.reft_r1 import ReFTr1
from steerkit.steering.methods.sae_latent import SAELatent
from steerkit.steering.methods.unembedding import Unembedding
from steerkit.steering.methods.weight_arithmetic import WeightArithmetic
from steerkit.steering.methods.whitened import Whitened

__all__ = [
    "FGAA",
    "ITI",
    "LDA",
    "METHODS",
    "PCA",
    "ActAdd",
    "AntiPaSTO",
    "BiPO",
    "LinearProbeDirection",
    "LoRA",
    "Logistic",
    "MeanCentring",
    "MeanDiff",
    "Method",
    "RandomDirection",
    "ReFT",
    "ReFTr1",
    "SAELatent",
    "Unembedding",
    "WeightArithmetic",
    "Whitened",
    "fit_effects",
]
