"""Our Triton kernels compiled for a GPU that is not there, and what the compiler made of them.

    python -m benchmarks.vocab_parallel.ahead_of_time --json FILE

Every kernel is compiled as `megatron_taopd.parallel.vocab.kernels` launches it: its functions are
called with tensors on the CPU, and in place of a launch the kernel is compiled for the target. So
types, alignments and constants are those of a run. A process of its own, in which Triton does not
interpret kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megatron_taopd.parallel.vocab import kernels
from megatron_taopd.parallel.vocab.normalizers import Normalizers

HOPPER = GPUTarget("cuda", 90, 32)
ALIGNED, ODD = 75_776, 75_697  # columns of half of Qwen3's vocabulary: as heads have it, and bare
KINDS = ("reverse_kl", "forward_kl", "jsd", "skewed_reverse_kl")
# Of a multiprocessor of compute capability 9.0 (CUDA programming guide, technical specifications).
THREADS, REGISTERS, SHARED = 2048, 65_536, 228 << 10


@dataclass(frozen=True)
class Compiled:
    """A kernel as the compiler left it.

    Attributes:
        variant: what it was compiled for.
        registers, stack, shared: a thread's registers, and bytes of a thread and of a program.
        spills: instructions that move what did not fit into registers.
        loads_128, loads_narrow: instructions that load 16 bytes of global memory, and fewer.
        operations_a_column: floating-point instructions for a column of the vocabulary, a fused
            multiply-add as two; what comes once a row is spread over one step of its columns.
    """

    kernel: str
    variant: str
    warps: int
    registers: int
    stack: int
    shared: int
    spills: int
    loads_128: int
    loads_narrow: int
    operations_a_column: float

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that its registers and memory leave room for."""
        threads = 32 * self.warps
        allocated = -(-self.registers // 8) * 8 * threads
        programs = min(REGISTERS // allocated, THREADS // threads)
        if self.shared:
            programs = min(programs, SHARED // self.shared)
        return programs * threads / THREADS


def compile_all(target: GPUTarget = HOPPER) -> list[Compiled]:
    """Compile every kernel in every variant: each divergence, precision and alignment of rows."""
    found = []
    for columns in (ALIGNED, ODD):
        logits = torch.zeros(2, columns)
        one = torch.zeros(2, 1)
        normalizers = Normalizers(one, one, one, one)
        where = "aligned" if columns == ALIGNED else "odd"
        with compiling(target) as compiled:
            kernels.entropy_sums_and_block_tops(logits)
            kernels.log_normalizer(logits)
            found += [read(*each, where) for each in compiled]
        for kind in KINDS:
            with compiling(target) as compiled:
                if kind in ("reverse_kl", "forward_kl"):
                    kernels.kl_within(kind, logits, logits, normalizers)
                else:
                    kernels.mixture_sums(kind, 0.5, logits, logits, normalizers)
                found += [read(*each, f"{kind}, {where}") for each in compiled]
            for dtype in (torch.bfloat16, torch.float32):
                with compiling(target) as compiled:
                    gradient(kind, logits, normalizers, torch.zeros(2, columns, dtype=dtype))
                    variant = f"{kind}, {str(dtype).removeprefix('torch.')}, {where}"
                    found += [read(*each, variant) for each in compiled]
    return found


def gradient(kind: str, logits: Tensor, normalizers: Normalizers, out: Tensor) -> None:
    """Call for the gradient of a divergence."""
    mean, grad = logits.new_zeros(2, 1), logits.new_zeros(2)
    kernels.logits_gradient(kind, 0.5, logits, logits, normalizers, mean, grad, out)


class _Absent:
    """A driver of a GPU that nothing is launched on."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list]:
    """Compile kernels where they are called, and launch none; yield (name, kernel) of each."""
    compiled: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__.strip("_").removesuffix("_kernel"), kernel))
        return kernel

    driver.set_active(_Absent(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def read(name: str, kernel, variant: str) -> Compiled:
    """Read the machine code with the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    loads = re.findall(r"\bLDG\.E(\.128)?", code)
    fused, single = (
        len(re.findall(rf"\b(?:{names})\b", code)) for names in ("FFMA", "FADD|FMUL|FMNMX|MUFU")
    )
    of_a_step = (2 * fused + single) * 32 * kernel.metadata.num_warps
    return Compiled(
        name, variant, kernel.metadata.num_warps, registers, stack, kernel.metadata.shared,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        loads_128=sum(bool(wide) for wide in loads),
        loads_narrow=sum(not wide for wide in loads),
        operations_a_column=of_a_step / kernels.STEP,
    )  # fmt: skip


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    found = [asdict(each) | {"occupancy": each.occupancy} for each in compile_all()]
    parser.parse_args().json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
