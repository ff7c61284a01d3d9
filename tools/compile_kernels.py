"""Compiles the Triton kernels for a Hopper GPU on a machine without one, and prints the resources they use.

    python tools/compile_kernels.py

A line for each kernel: registers and stack of a thread, shared memory, and how many loads, stores and matrix products
of each width the machine code has. `LDL` and `STL` are registers spilled to memory, `LDG.E.128` loads sixteen bytes.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trajshift.models.kernels import conv_kernels, flat_kernels, norm_kernels
from trajshift.models.kernels.norm_relu import PARTIAL, TILE, WARPS

HOPPER = GPUTarget("cuda", 90, 32)
TOOL = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin" / "cuobjdump"
WHOLE = ("size", "P")
"""Numbers that are multiples of 16, as they are for the sizes in use."""
FLOATS = ("eps", "momentum", "lr")
LOW = ("weight", "x", "shortcut", "out", "gradient", "masked", "grad_x")
"""Tensors in bfloat16; the others are float32."""
EXACT = (("total", "out"), ("statistics", "weight"))
"""Kernels and tensors in which these are float32 too."""


def compile_kernel(kernel: Any, warps: int, stages: int = 3, **constants: Any) -> None:
    """Prints the line of one kernel with these compile-time constants."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in (*WHOLE, "H", "W", "M", "share", "programs"):
            signature[name] = "i32"
        elif name == "counter":
            signature[name] = "*i32"
        elif name == "batches":
            signature[name] = "*i64"
        else:
            low = name in LOW and (kernel.fn.__name__, name) not in EXACT
            signature[name] = "*bf16" if low else "*fp32"
        if signature[name].startswith("*") or name in WHOLE:
            attributes[(index,)] = [["tt.divisibility", 16]]
    given = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=attributes)
    built = triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    used = " ".join(re.findall(r"REG:\d+|STACK:\d+", usage))
    found = Counter(re.findall(r"\b((?:LDG|STG|LDL|STL|HMMA|HGMMA|LDGSTS|LDSM|STS|LDS|BAR)[\w.]*)", code))
    lines = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M))
    widths = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
    chosen = " ".join(f"{name}={value}" for name, value in constants.items())
    print(f"{kernel.fn.__name__} {chosen} warps={warps}: {used} shared={built.metadata.shared} lines={lines}; {widths}")


def main() -> None:
    for channels in (16, 32, 64, 512):
        sums = {"C": channels, "ROWS": TILE // channels, "CHUNK": PARTIAL // channels}
        compile_kernel(norm_kernels.statistics, WARPS, **sums)
        compile_kernel(norm_kernels.apply, 4, C=channels, BLOCK=4096, ADD=True)
        for added in (True, False):
            compile_kernel(norm_kernels.gradient_sums, WARPS, **sums, ADDED=added)
        compile_kernel(norm_kernels.gradient_of_input, 4, C=channels, BLOCK=4096, MASKED=False)
    for cin, cout in ((16, 16), (32, 32), (3, 16)):
        sizes = {"CIN": cin, "COUT": cout, "CI": max(16, cin), "CO": 16, "BLOCK": 32 if cin > 16 else 64}
        compile_kernel(conv_kernels.weight_gradient, 1, 1, **sizes)
    for channels, flip in ((16, False), (16, True), (3, False)):
        compile_kernel(conv_kernels.convolution, 4, 1, K=channels, N=16, KPAD=16, FLIP=flip, BLOCK=128)
    compile_kernel(conv_kernels.total, 8, COLUMNS=16, CHUNK=256)
    compile_kernel(flat_kernels.meta_step, 4, T=8, BLOCK=1024, SHIFT=True)


if __name__ == "__main__":
    main()
