"""Compile Triton's kernels for GPUs that need not be here; run by test_kernels.py, in a process without the interpreter."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae.kernels import triton_kernels

KERNELS = {
    "_weighted_sums_kernel": (
        {"starts": "*i32", "indices": "*i64", "values": "*X", "matrix": "*X", "out": "*fp32", "d": "i32"},
        {"ENTRIES": 8, "WIDTH": 256, "SUM": tl.float32},
    ),
    "_dots_kernel": (
        {
            "left_rows": "*i64",
            "right_rows": "*i32",
            "places": "*i64",
            "left": "*X",
            "right": "*X",
            "out": "*X",
        }
        | {"n_entries": "i32", "d": "i32"},
        {"ENTRIES": 8, "WIDTH": 256, "SUM": tl.float32},
    ),
    "_sums_kernel": ({"starts": "*i32", "values": "*X", "out": "*fp32"}, {"ENTRIES": 128, "SUM": tl.float32}),
}

for capability in (80, 90):
    for dtype in ("fp32", "bf16"):
        for name, (arguments, constants) in KERNELS.items():
            types = {key: value.replace("X", dtype) for key, value in arguments.items()}
            kernel = getattr(triton_kernels, name)
            source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
            triton.compile(source, target=GPUTarget("cuda", capability, 32))
            print("compiled", name, dtype, capability)
