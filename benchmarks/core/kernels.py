"""Compiles the GPU's kernels for Hopper (sm_90), which needs no GPU, and prints what each kernel uses.

    python -m benchmarks.core.kernels [--classes 2 19 64 150 512]

Registers and bytes of stack (spilled registers) for each thread, bytes of shared memory, and the seconds of compiling.
Each batch has everything: a large group in tables, a small one that is sorted. Softmax has cross-entropy beside the
loss; the binary losses come alone, and with binary cross-entropy.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lovasz.core import BinaryCrossEntropy, CrossEntropy, LovaszHinge, LovaszSigmoid, LovaszSoftmax
from lovasz.core.plan import Plan
from lovasz.spec import LossLike, weighted_sum

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lovasz.core.backends.triton.launches import Launch
    from lovasz.core.backends.triton.layout import Kind
    from lovasz.core.backends.triton.program import Program
except ModuleNotFoundError as error:
    sys.exit(f"{error}: this needs Triton: pip install triton")

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {torch.int64: "*i64", torch.int32: "*i32", torch.float32: "*fp32", torch.float64: "*fp64"}
HEADER = f"{'loss':<28}{'kernel':<20}{'registers':>10}{'stack':>9}{'shared':>8}{'seconds':>9}"
SIZES = ((512, 1024), (64, 64))
SOFTMAX: LossLike = [(1.0, CrossEntropy(label_smoothing=0.1)), (1.0, LovaszSoftmax(ignore_index=255))]
BINARY: dict[str, LossLike] = {
    "hinge": LovaszHinge(ignore_index=255),
    "hinge, cross-entropy": [(1.0, BinaryCrossEntropy(pos_weight=2.0)), (1.0, LovaszHinge(ignore_index=255))],
    "sigmoid": LovaszSigmoid(ignore_index=255),
    "sigmoid, cross-entropy": [(1.0, BinaryCrossEntropy(pos_weight=2.0)), (1.0, LovaszSigmoid(ignore_index=255))],
    "binary cross-entropy": BinaryCrossEntropy(pos_weight=2.0),
}


def source_of(program: Program, launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in launch.constants:
            signature[name] = "constexpr"
        elif name in program.rooms:
            signature[name] = POINTERS[program.rooms[name].dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(program.numbers[name], float) else "i32"
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread of the machine code, as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers is not None
    assert stack is not None
    return int(registers[1]), int(stack[1])


def row(name: str, program: Program, launch: Launch) -> str:
    start = time.perf_counter()
    compiled = triton.compile(source_of(program, launch), target=TARGET, options=launch.options)
    seconds = time.perf_counter() - start
    registers, stack = resources(compiled.asm["cubin"])
    kernel = launch.kernel.fn.__name__
    return f"{name:<28}{kernel:<20}{registers:10}{stack:9}{compiled.metadata.shared:8}{seconds:9.1f}"


def program_of(loss: LossLike, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Program:
    total = weighted_sum(loss)
    layouts = tuple(total.layout(shape, shape if total.is_binary else (shape[0], *shape[2:])) for shape in shapes)
    device = torch.device("cuda")
    plan = Plan(total, layouts, (1,) * len(shapes), device)
    return Program(Kind(plan, dtype, torch.int64, want_grad=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 19, 64, 150, 512])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"Triton {triton.__version__}, sm_90, {args.dtype} logits, int64 labels\n{HEADER}", flush=True)
    programs = {
        f"softmax, {classes} classes": program_of(SOFTMAX, [(1, classes, *size) for size in SIZES], dtype)
        for classes in args.classes
    }
    programs |= {name: program_of(loss, [(1, *size) for size in SIZES], dtype) for name, loss in BINARY.items()}
    for name, program in programs.items():
        for launch in program.launches:
            print(row(name, program, launch), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
