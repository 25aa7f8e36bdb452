"""A subset of `make compile-kernels`: every kernel at head_dim 128, block 128, for sm_90 and sm_100, without a GPU.

For sm_90 also those that differ where queries are fewer than keys.

In a process of its own: the script needs the compiler, and other tests may have chosen Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "scripts" / "compile_kernels.py"


@pytest.mark.timeout(600)
def test_kernels_compile_within_their_gates():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    once = ("gate_kernel", "past_block_kernel", "own_block_merge_kernel", "decode_split_kernel")
    variants = dict.fromkeys(once, 1) | {"past_block_keys_kernel": 2}  # one stores the sums, one adds to them
    for kernel, count in variants.items():
        assert done.stdout.count(f"| {kernel} | bf16 d128 B128 |") == 2 * count, done.stdout
    for kernel in ("gate_kernel", "own_block_merge_kernel", "own_block_queries_kernel"):  # fewer queries than keys
        assert done.stdout.count(f"| {kernel} | bf16 d128 B128 chunk |") == 1, done.stdout


@pytest.mark.parametrize(("together", "faults"), [(1, 1), (8, 0)])
def test_products_that_wait_for_each_other_are_a_fault(together, faults):
    """As disassembled: the last instruction of a group of products carries the barrier that is waited for."""
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"
    code = (f"{product} ;\n" * (together - 1) + f"{product}, gsb0 ;\n") * (16 // together) + "STG.E [R2], R4 ;\n"
    program = f"""if True:
        import sys
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        import compile_kernels as c
        launch = c.Launch(c.Case(90, 128, 128, c.torch.bfloat16), "", "")
        print(len(list(c.find_problems(launch, c.Compiled(matrix="HGMMA"), {code!r}, True))))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(faults)]
