"""FLOPs and bytes of every Triton kernel, counted while it runs in the interpreter, beside the planner's cost model.

    python scripts/count_kernels.py --length 8192 --block-size 128 --top-k 8

FLOPs are those of the matrix products launched, padding and the masked half of causal tiles included: what is above the
model is the price of tiles. Bytes are those that loads, stores and atomics address, before any cache; the least that
must move is the model's. The tiles are those of an H100 (sm_90). Scale the length down: the interpreter is slow.
"""

import argparse
import os
from collections import defaultdict
from contextlib import ExitStack
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from moba_hf.ops.engines import triton as engine
from moba_hf.planner import Work, moba_counts

STAGES = {
    "gate": ("layout_kernel", "block_means_kernel", "gate_kernel"),
    "forward": ("past_block_kernel", "large_past_block_kernel", "own_block_merge_kernel"),
    "backward": ("statistics_kernel", "key_tile_kernel", "own_block_keys_kernel", "past_block_keys_kernel",
                 "past_block_queries_kernel", "own_block_queries_kernel"),
    "sort": ("count_kernel", "scatter_kernel", "tile_kernel"),
}  # fmt: skip


class Counter:
    """While it is entered: {kernel: [FLOPs of matrix products, bytes addressed]} of what the interpreter runs."""

    def __init__(self):
        self.found = defaultdict(lambda: [0, 0])
        self.stack = ExitStack()

    def __enter__(self):
        builder = interpreter.interpreter_builder
        self._wrap(builder, "create_dot", 0, lambda a, b, *_: 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        addressed = lambda mask, pointer: int(mask.data.sum()) * pointer.get_element_ty().primitive_bitwidth // 8  # noqa: E731
        self._wrap(builder, "create_masked_load", 1, lambda pointer, mask, *_: addressed(mask, pointer))
        self._wrap(builder, "create_masked_store", 1, lambda pointer, _value, mask, *_: addressed(mask, pointer))
        self._wrap(builder, "create_atomic_rmw", 1, lambda _op, pointer, _value, mask, *_: 2 * addressed(mask, pointer))
        call = interpreter.GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            self.kernel = executor.fn.__name__
            return call(executor, *args, **kwargs)

        self.stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        return self.found

    def __exit__(self, *error):
        self.stack.close()

    def _wrap(self, builder, name: str, which: int, size) -> None:
        original = getattr(builder, name)

        def counted(*args, **kwargs):
            self.found[self.kernel][which] += size(*args)
            return original(*args, **kwargs)

        self.stack.enter_context(mock.patch.object(builder, name, counted))


def states(length: int, heads: int, kv_heads: int, head_dim: int) -> list[torch.Tensor]:
    """Random query, key, value and grad_output of one sequence, float16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, h, head_dim, generator=generator).half() for h in (heads, kv_heads, kv_heads, heads)]


def count(query, key, value, grad, block_size: int, top_k: int) -> dict[str, list[int]]:
    """Routing, forward and backward of one sequence: {kernel: [FLOPs of matrix products, bytes addressed]}."""
    ends = torch.tensor([0, query.shape[0]], dtype=torch.int32)
    where, scale = (ends, ends, block_size), query.shape[2] ** -0.5
    with Counter() as found, mock.patch.object(engine, "_capability", lambda _: (9, 0)):
        selected = engine.select(query, key, *where, top_k - 1)
        output, lse = engine.forward(query, key, value, selected, *where, scale)
        engine.backward(grad, query, key, value, output, lse, selected, *where, scale)
    return dict(found)


def table(found: dict[str, list[int]], model) -> str:
    """Markdown: each kernel and each stage, and the stage's FLOPs and least bytes by the model."""
    expected = {
        "gate": (model.gate_flops, model.gate_bytes),
        "forward": (model.forward_flops, model.forward_bytes + model.selection_forward_bytes),
        "backward": (model.backward_flops, model.backward_bytes + model.selection_backward_bytes),
    }
    lines = [
        "| stage | kernel | GFLOP | model | ratio | MB addressed | model, least |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, kernels in STAGES.items():
        ran = {name: found[name] for name in kernels if name in found}
        lines += [f"| {stage} | {name} | {f / 1e9:.3f} | | | {b / 1e6:.1f} | |" for name, (f, b) in ran.items()]
        if stage in expected:
            (flops, least), done = expected[stage], sum(f for f, _ in ran.values())
            moved = sum(b for _, b in ran.values())
            lines.append(f"| {stage} | **all** | {done / 1e9:.3f} | {flops / 1e9:.3f} | {done / flops:.2f} | "
                         f"{moved / 1e6:.1f} | {least / 1e6:.1f} |")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Count and print one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("length", 8192), ("heads", 2), ("kv-heads", 1), ("head-dim", 64), ("block-size", 128)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--top-k", type=int, default=8)
    given = parser.parse_args(argv)
    shape = (given.length, given.heads, given.kv_heads, given.head_dim)
    found = count(*states(*shape), given.block_size, given.top_k)
    work = Work(given.length, given.block_size, given.top_k)
    print(table(found, moba_counts(given.heads, given.kv_heads, given.head_dim, work)))


if __name__ == "__main__":
    main()
