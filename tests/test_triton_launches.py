"""How much the Triton engine launches for one layer: at 8K tokens the host, not the GPU, decides how long one takes.

Counted on tensors without data, with launches that do nothing: kernels, and the PyTorch operations beside them.
"""

import os
from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moba_hf.ops import engines

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="launches are not made here")
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like")


class Operations(TorchDispatchMode):
    """Counts the PyTorch operations that launch something: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function._schema.name not in ALLOCATIONS:
            self.found[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def launches(block_size: int) -> dict[str, tuple[list[str], Counter]]:
    """(kernels, PyTorch operations) of each stage: two sequences of 8K tokens, 16 heads, top-8, an H100's settings."""
    from triton.runtime.jit import JITFunction

    query, key, value, grad = (torch.empty(16384, 16, 128, dtype=torch.bfloat16, device="meta") for _ in range(4))
    engine, ends = engines.load("triton"), torch.empty(3, dtype=torch.int32, device="meta")
    where, found, kernels = (ends, ends, block_size), {}, []

    def stage(name, run):
        kernels.clear()
        with Operations() as operations:
            result = run()
        found[name] = (list(kernels), operations.found)
        return result

    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: kernels.append(kernel.__name__)),
        mock.patch.object(engine, "_capability", lambda _: (9, 0)),
    ):
        selected = stage("select", lambda: engine.select(query, key, *where, 7))
        output, lse = stage("forward", lambda: engine.forward(query, key, value, selected, *where, 0.1))
        stage("backward", lambda: engine.backward(grad, query, key, value, output, lse, selected, *where, 0.1))
    return found


def test_the_counter_counts():
    with Operations() as operations:
        made = torch.empty(4, device="meta")
        made.view(2, 2)[0].expand(3, 2).as_strided((1,), (1,))
        made.add_(1).float().int()
    assert operations.found == {"add_": 1, "_to_copy": 1}


@pytest.mark.parametrize(("block_size", "most"), [(128, {"select": 3, "forward": 8, "backward": 11}),
                                                   (512, {"select": 3, "forward": 8, "backward": 13})])  # fmt: skip
def test_launches_of_a_layer(block_size, most):
    """Kernels and operations together; large blocks have a kernel for dQ of its own, with tiles of its own."""
    found = launches(block_size)
    for stage, (kernels, operations) in found.items():
        assert len(kernels) + operations.total() <= most[stage], (stage, kernels, operations)
