"""Compile every Triton kernel ahead of time, on a machine without a GPU, and hold the results against their gates.

    python scripts/compile_kernels.py                   # everything; renews the tables in docs/kernels.md
    python scripts/compile_kernels.py --quick           # one setting for sm_90 and sm_100, no tables written
    python scripts/compile_kernels.py --arch 90 --only past_block --head-dim 128

The engine itself runs, on tensors without data, and its launches are recorded instead of made: what is compiled is what
would have been launched, with the same sizes, strides and settings. A host sync would fail here, there is no data to
wait for. Gates: shared memory within the GPU's limit; at most 512 columns of tensor memory and a kernel that stores
something (Triton compiles a kernel that needs more columns to an empty one without an error); matrix instructions
wherever the source multiplies 16-bit matrices, none of which waits for the one before (ptxas makes them where registers
are short, and for less); no register spilled on sm_90 up to head_dim 128, at most 100 elsewhere (a tile that is too
large spills hundreds). float32, which is there for checks, is multiplied without matrix instructions.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has nothing to compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moba_hf.ops import engines

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have
MATRIX = {80: "HMMA", 86: "HMMA", 90: "HGMMA|HMMA", 100: r"UTC\w*MMA|HMMA"}  # the name in SASS
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Case:
    """One setting of the engine: 8 heads over 2 kv heads. chunk: fewer queries than keys."""

    arch: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    top_k: int = 8
    chunk: bool = False

    def __str__(self):
        special = f" top-{self.top_k}" * (self.top_k != 8) + " chunk" * self.chunk
        return f"{TYPES[self.dtype]} d{self.head_dim} B{self.block_size}{special}"


@dataclass
class Launch:
    """A kernel as the engine launched it: what Triton's specialisation would have made of the arguments."""

    case: Case
    module: str
    name: str
    signature: dict = field(default_factory=dict)
    constants: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        parts = (self.signature, self.constants, self.attributes, self.options)
        return f"{self.name} {self.case.arch} {parts}"

    @property
    def kernel(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.name)

    def constant(self, name: str):
        """A compile-time argument; None where the kernel has no such."""
        names = self.kernel.arg_names
        return self.constants.get((names.index(name),)) if name in names else None


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch; `problems` are the gates it missed."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_columns: int = 0
    matrix: str = ""
    problems: tuple[str, ...] = ()


# ---- recording -----------------------------------------------------------------------------------------------------


def record(case: Case) -> list[Launch]:
    """The launches of routing, forward, backward and decoding for `case`."""
    launches: list[Launch] = []

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append(describe(case, kernel, args, kwargs))

    tokens = 4 * case.block_size + 4096
    shapes = [(512 if case.chunk else tokens, 8, case.head_dim), *[(tokens, 2, case.head_dim)] * 2]
    states = [torch.empty(shape, dtype=case.dtype, device="meta") for shape in shapes]
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    engine, capability = engines.load("triton"), divmod(case.arch, 10)
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(engine, "_capability", lambda _: capability):
        selected = engine.select(*states[:2], lengths, lengths, case.block_size, case.top_k - 1)
        where = (lengths, lengths, case.block_size, case.head_dim**-0.5)
        output, lse = engine.forward(*states, selected, *where)
        engine.backward(torch.empty_like(output), *states, output, lse, selected, *where)
        query, key, value, means, past, starts = decoding(case)
        engine.select_cached(query, means, starts, key.shape[2], case.block_size, past.shape[3])
        engine.decode(query, key, value, past, starts, case.block_size, case.head_dim**-0.5)
    return launches


def decoding(case: Case) -> list[torch.Tensor]:
    """One new token in each of two rows: query, key, value, means, past blocks and starts."""
    tokens = ((8, 1), (2, 8192), (2, 8192), (2, 8192 // case.block_size))
    states = [torch.empty((2, heads, n, case.head_dim), dtype=case.dtype, device="meta") for heads, n in tokens]
    return states + [torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((2, 8, 1, 7), (2,))]


def describe(case: Case, kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    """Types, constants and divisibility by 16, by Triton's own rules; pointers are aligned as PyTorch aligns them."""
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    launch = Launch(case, kernel.__module__, kernel.__name__)
    launch.options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None:
            launch.signature[name], launch.constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            launch.signature[name], launch.attributes[(i,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            launch.signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            launch.signature[name], launch.constants[(i,)] = "constexpr", 1
        else:
            launch.signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                launch.attributes[(i,)] = [["tt.divisibility", 16]]
    return launch


# ---- compiling -----------------------------------------------------------------------------------------------------


def compile_launch(launch: Launch) -> Compiled:
    """Compile for the case's GPU and read registers, memory and instructions out of the machine code."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    try:
        result = triton.compile(source, target=GPUTarget("cuda", launch.case.arch, 32), options=launch.options)
    except Exception as error:  # whatever the compiler raises is the finding
        return Compiled(problems=(f"does not compile: {str(error).strip().splitlines()[0][:120]}",))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    found = re.findall(rf"\b({MATRIX[launch.case.arch]})\b", code)
    columns = getattr(result.metadata, "tmem_size", None) or 0
    compiled = Compiled(registers, stack // 4, result.metadata.shared, columns, found[0] if found else "")
    problems = tuple(find_problems(launch, compiled, code, "tt.dot" in result.asm["ttir"]))
    return Compiled(registers, stack // 4, result.metadata.shared, columns, compiled.matrix, problems)


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def find_problems(launch: Launch, compiled: Compiled, code: str, multiplies: bool):
    """The gates that a compiled kernel misses, in words."""
    case, limit = launch.case, SHARED_LIMIT[launch.case.arch]
    if compiled.shared > limit:
        yield f"shared memory {compiled.shared} of {limit} bytes"
    if compiled.tensor_columns > 512:
        yield f"tensor memory {compiled.tensor_columns} of 512 columns"
    if not re.search(r"\b(STG|RED|REDG|ATOMG|UTMASTG)\b", code):
        yield "stores nothing"
    if multiplies and case.dtype != torch.float32 and not compiled.matrix:
        yield "no matrix instruction"
    products = re.findall(r"\bHGMMA\b[^;]*", code)
    if len(products) >= 8 and all("gsb0" in product for product in products):
        yield "every matrix instruction waits for the one before"
    if compiled.spilled > (0 if case.arch == 90 and case.head_dim <= 128 else 100):
        yield f"{compiled.spilled} registers spilled"


# ---- report --------------------------------------------------------------------------------------------------------


def table(arch: int, results: list[tuple[Launch, Compiled]]) -> str:
    """Markdown: one line for each kernel as compiled."""
    lines = [
        f"### sm_{arch}",
        "",
        "| kernel | setting | rows × keys | warps | stages | registers | spilled | shared, KB | matrix | gates |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for launch, c in results:
        tile = " × ".join(str(launch.constant(name) or "–") for name in ("ROWS", "KEYS"))
        stages = launch.constant("STAGES") or launch.options.get("num_stages", "–")
        cells = (
            launch.name, launch.case, tile, launch.options.get("num_warps", 4), stages,
            c.registers, c.spilled, f"{c.shared / 1024:.0f}", c.matrix or "–", "; ".join(c.problems) or "met",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write_tables(tables: dict[int, str]) -> None:
    """Replace what lies between the markers of docs/kernels.md."""
    begin, end = "<!-- compiled kernels: begin -->", "<!-- compiled kernels: end -->"
    text = DOCUMENT.read_text() if DOCUMENT.exists() else f"# Kernels\n\n## Compiled ahead of time\n\n{begin}\n{end}\n"
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    note = f"Triton {triton.__version__}, `make compile-kernels`. Equal kernels are listed once.\n"
    DOCUMENT.write_text(f"{head}{begin}\n{note}\n" + "\n".join(tables.values()) + f"{end}{tail}")


def cases(arguments) -> list[Case]:
    """bfloat16 over the whole grid; the other dtypes, many slots and chunks where they differ, at one width."""
    if arguments.quick:
        return [Case(90, 128, 128, torch.bfloat16), Case(90, 128, 128, torch.bfloat16, chunk=True),
                Case(100, 128, 128, torch.bfloat16)]  # fmt: skip
    grid = list(product(arguments.arch, arguments.head_dim, (64, 128, 512, 4096), (torch.bfloat16,)))
    grid += product(arguments.arch, (64, 128), (128, 512), (torch.float16, torch.float32))
    special = [{"chunk": True}, {"top_k": 64}, {"top_k": 513}]
    return [Case(*where) for where in grid] + [
        Case(arch, 128, 128, torch.bfloat16, **how) for arch in arguments.arch for how in special
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset of about a minute")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 86, 90, 100], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--only", default="", help="part of the kernels' names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    launches: dict[str, Launch] = {}
    for launch in (launch for case in cases(arguments) for launch in record(case)):
        launches.setdefault(launch.key, launch)
    chosen = [launch for launch in launches.values() if arguments.only in launch.name]
    results = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for launch, compiled in zip(chosen, pool.map(compile_launch, chosen)):
            results.append((launch, compiled))
            if compiled.problems:
                where = f"sm_{launch.case.arch} {launch.case} {launch.name}"
                print(f"{len(results)} of {len(chosen)}: {where}: {'; '.join(compiled.problems)}", file=sys.stderr)
    tables = {}
    for arch in sorted({launch.case.arch for launch in chosen}):
        tables[arch] = table(arch, [pair for pair in results if pair[0].case.arch == arch])
        print(tables[arch])
    complete = not arguments.quick and not arguments.only and len(arguments.arch) == len(SHARED_LIMIT)
    if complete and len(arguments.head_dim) >= 3:
        write_tables(tables)
    missed = sum(bool(compiled.problems) for _, compiled in results)
    print(f"{len(results)} kernels compiled with Triton {triton.__version__}, {missed} miss a gate")
    return 1 if missed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
