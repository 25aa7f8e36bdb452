"""Measure the Triton kernels' candidate tiles on this GPU and write the fastest, for the shapes you train or serve.

    python scripts/tune_kernels.py --head-dim 128 --block-size 512 --top-k 8 --length 65536 --out tuned.json
    MOBA_HF_LAUNCH_SETTINGS=tuned.json moba-hf doctor --block-size 512       # the settings in force

Nothing is tuned unless you run this, and nothing reads the file unless MOBA_HF_LAUNCH_SETTINGS names it. One kernel
after the other, in the order they run; every candidate tile replaces the best so far and the whole stage is timed, so
that what one kernel leaves in the caches for the next counts. A candidate that does not fit the GPU, or whose results
are off, is named and passed over; the table's own tile stays unless another is at least 2 % faster.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from moba_hf.ops.engines import triton as engine
from moba_hf.ops.kernels import backward_settings, forward_settings
from moba_hf.ops.kernels.attention_backward import backward_pass
from moba_hf.ops.kernels.attention_forward import forward_pass
from moba_hf.ops.kernels.block_gate import select_blocks
from moba_hf.ops.kernels.block_layout import block_layout
from moba_hf.ops.kernels.tuned_tiles import ROLES, Tile

# Tiles of the tables, for any GPU, and of the sweep in docs/kernels.md.
GATE = [Tile(32, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 64, 4, 1), Tile(64, 128, 4, 1), Tile(128, 64, 8, 1)]
ATTENTION = [
    *(Tile(32, 32, 4, 1), Tile(32, 32, 4, 2), Tile(32, 64, 4, 1), Tile(32, 64, 4, 3), Tile(32, 64, 8, 1)),
    *(Tile(32, 64, 8, 2), Tile(32, 64, 8, 3), Tile(64, 16, 4, 3), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    *(Tile(64, 64, 4, 3), Tile(64, 64, 4, 5), Tile(64, 64, 8, 2), Tile(64, 64, 8, 3), Tile(64, 128, 4, 2)),
    *(Tile(64, 128, 8, 2), Tile(64, 128, 8, 3), Tile(64, 128, 8, 5), Tile(128, 32, 4, 2), Tile(128, 32, 4, 4)),
    *(Tile(128, 32, 8, 2), Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 128, 8, 2), Tile(128, 128, 8, 5)),
]
GAIN = 0.98  # of the time before: less is noise
Tiles = dict[str, Tile]


class Stages:
    """One sequence of random inputs, and what the kernels make of it with given tiles."""

    def __init__(self, length, heads, kv_heads, head_dim, block_size, top_k, dtype, device):
        generator = torch.Generator().manual_seed(0)
        make = lambda h: torch.randn(length, h, head_dim, generator=generator).to(device, dtype)  # noqa: E731
        self.query, self.key, self.value, self.grad = make(heads), make(kv_heads), make(kv_heads), make(heads)
        self.block_size, self.slots, self.scale = block_size, top_k - 1, head_dim**-0.5
        ends = torch.tensor([0, length], dtype=torch.int32, device=device)
        self.layout = block_layout(ends, ends, length, length, block_size)
        self.capability = engine._capability(self.query)
        shape = (self.capability, dtype, head_dim, block_size)
        self.table = {
            "forward": forward_settings.table(*shape),
            "backward": backward_settings.table(*shape),
        }
        self.selected = self.select(self.table["forward"])
        self.output, self.lse = self.forward(self.table["forward"])

    def select(self, tiles: Tiles) -> torch.Tensor:
        return select_blocks(self.query, self.key, self.layout, self.block_size, self.slots, tiles["gate"])

    def forward(self, tiles: Tiles):
        settings = forward_settings.with_tiles(tiles, self.block_size)
        states = (self.query, self.key, self.value, self.selected, self.layout)
        return forward_pass(*states, self.block_size, self.scale, settings, False)

    def backward(self, tiles: Tiles):
        settings = backward_settings.with_tiles(tiles, self.block_size)
        states = (self.query, self.key, self.value, self.output, self.lse, self.selected, self.layout)
        return backward_pass(self.grad, *states, self.block_size, self.scale, settings, False)

    def of(self, direction: str, role: str) -> Callable[[Tiles], torch.Tensor | tuple]:
        """The stage in which a kernel runs."""
        return self.select if role == "gate" else getattr(self, direction)


def tune(stages: Stages, clock: Callable[[Callable[[], object]], float], say=print) -> dict[str, Tiles]:
    """The fastest tiles by direction and kernel. clock: runs what it is given, and says how long that takes."""
    best = {direction: dict(tiles) for direction, tiles in stages.table.items()}
    for direction, roles in ROLES.items():
        for role in roles:
            fused = backward_settings.with_tiles(best["backward"], stages.block_size).fused
            if role == "past_queries" and fused:  # it does not run
                continue
            say(f"{direction}, {role}:")
            best[direction] = fastest(stages.of(direction, role), best[direction], role, clock, say)
    return best


def fastest(stage: Callable[[Tiles], object], tiles: Tiles, role: str, clock, say) -> Tiles:
    """`tiles`, with the fastest candidate for one kernel."""
    best, expected, least = tiles, stage(tiles), clock(lambda: stage(tiles))
    for tile in GATE if role == "gate" else ATTENTION:
        run = partial(stage, tiles | {role: tile})
        if tile == tiles[role]:
            continue
        if (problem := wrong(run, expected)) is not None:
            say(f"    {tile}: passed over, {problem}")
            continue
        time = clock(run)
        say(f"    {tile}: {time:.3f}, best before {least:.3f}")
        if time < GAIN * least:
            best, least = tiles | {role: tile}, time
    return best


def wrong(run: Callable[[], object], expected) -> str | None:
    """Why a candidate cannot be taken: it does not fit the GPU, or its results are not those expected."""
    try:
        found = run()
    except OutOfResources as error:
        return str(error)
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected)), strict=True)
    for ours, theirs in pairs:
        if not ours.is_floating_point():  # blocks chosen; tiles sum in another order, so near ties may turn
            if (ours != theirs).float().mean() > 1e-3:
                return "other blocks are selected"
        elif not (ours.float() - theirs.float()).norm() <= 1e-2 * theirs.float().norm():
            return "results differ"
    return None


def milliseconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median by CUDA events, after a warm-up."""
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def record(stages: Stages, best: dict[str, Tiles]) -> dict:
    """What the file holds of this shape."""
    tiles = {direction: {role: vars(tile) for role, tile in found.items()} for direction, found in best.items()}
    return {
        "capability": list(stages.capability),
        "dtype": str(stages.query.dtype).removeprefix("torch."),
        "head_dim": stages.query.shape[2],
        "block_size": stages.block_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter",
        "triton": triton.__version__,
        **tiles,
    }


def write(path: Path, new: dict) -> None:
    """Add a record to the file, in place of an earlier one of the same shape."""
    name = lambda r: [r[field] for field in ("capability", "dtype", "head_dim", "block_size")]  # noqa: E731
    others = [r for r in json.loads(path.read_text()) if name(r) != name(new)] if path.exists() else []
    path.write_text(json.dumps([*others, new], indent=1) + "\n")


def main(argv: list[str] | None = None, clock=milliseconds) -> int:
    """Tune one shape; 2 where the kernels cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("length", 65536), ("heads", 32), ("kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    dtype, device = getattr(torch, options.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    if (reason := engine.unsupported(device, dtype, options.head_dim)) is not None:
        print(f"tune_kernels cannot run: {reason}", file=sys.stderr)
        return 2
    shape = (options.length, options.heads, options.kv_heads, options.head_dim, options.block_size, options.top_k)
    stages = Stages(*shape, dtype, device)
    write(options.out, record(stages, tune(stages, clock)))
    print(f"wrote {options.out}; MOBA_HF_LAUNCH_SETTINGS={options.out} uses it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
