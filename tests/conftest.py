"""What must be set before anything is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for each other

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on the CPU, step by step
