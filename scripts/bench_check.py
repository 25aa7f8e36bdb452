"""Regression guard: operations and bytes that MoBA takes, and its speed beside dense attention on this CPU.

    python scripts/bench_check.py            # compare with configs/bench_check.json; exit code 1 on a loss above 20 %
    python scripts/bench_check.py --update   # store what is found now, after a change that is meant

Counted figures depend on no machine: the planner's for the settings S1, S2 and S4 of docs/benchmarks.md, and PyTorch's
own count of the bytes that a forward of the blockwise engine takes from the allocator. The speed is the CPU time of
dense attention over that of MoBA, forward, in one thread, median of interleaved rounds: the ratio, and CPU instead of
wall time, because other work on the machine moves both alike; one thread, because several that wait for each other on a
busy machine count their waiting.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import moba_hf
from moba_hf import planner

STORED = Path(__file__).parent.parent / "configs" / "bench_check.json"
LOSS = 0.20
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # SmolLM2-135M's, as in the CPU figures of docs/benchmarks.md
BLOCK_SIZE, TOP_K = 512, 4
SETTINGS = {
    "S1 512K": (32, 32, planner.Work(512 << 10, 128, 8)),  # batch 2 as twice the heads
    "S2 1M": (32, 8, planner.Work(1 << 20, 4096, 12)),
    "S4 128K": (32, 8, planner.Work(128 << 10, 512, 8)),
}


def main(argv: list[str] | None = None) -> int:
    """Compare, or store; the exit code."""
    options = parse(argv)
    found = {"length": options.length, "counted": counted(options.length), "cpu_ratio": cpu_ratio(options)}
    if options.update:
        options.stored.write_text(json.dumps(found, indent=1) + "\n")
        print(f"stored in {options.stored}: MoBA {found['cpu_ratio']:.2f} × dense")
        return 0
    stored = json.loads(options.stored.read_text())
    if stored["length"] != options.length:
        print(f"bench-check: {options.stored} holds length {stored['length']}, not {options.length}", file=sys.stderr)
        return 2
    problems = losses(stored["counted"], found["counted"], "more")
    problems += losses({"cpu_ratio": stored["cpu_ratio"]}, {"cpu_ratio": found["cpu_ratio"]}, "less")
    for problem in problems:
        print(f"bench-check: {problem}", file=sys.stderr)
    ratios = (
        f"forward of {options.length} tokens: MoBA {found['cpu_ratio']:.2f} × dense, stored {stored['cpu_ratio']:.2f}"
    )
    print(f"{'failed' if problems else 'passed'}; {ratios}")
    return 1 if problems else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", type=Path, default=STORED)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


def losses(stored: dict[str, float], found: dict[str, float], worse: str) -> list[str]:
    """What got worse by more than LOSS: costs that are `more`, or speeds that are `less`."""
    problems = []
    for name, before in stored.items():
        change = found[name] / before - 1
        if (change if worse == "more" else 1 / (1 + change) - 1) > LOSS:
            problems.append(
                f"{name} was {before:.4g} and is {found[name]:.4g}: {abs(change):.0%} {worse}".replace("%", " %")
            )
    return problems


def counted(length: int) -> dict[str, float]:
    """FLOPs and bytes of the planner's settings, and the allocator's bytes of a forward on this CPU."""
    result = {}
    for name, (heads, kv_heads, work) in SETTINGS.items():
        count = planner.moba_counts(heads, kv_heads, 128, work)
        result[f"{name} FLOP"] = count.gate_flops + count.forward_flops + count.backward_flops
        result[f"{name} bytes"] = (
            count.gate_bytes + count.forward_bytes + count.backward_bytes
            + count.selection_forward_bytes + count.selection_backward_bytes
        )  # fmt: skip
    result["allocated bytes"] = float(allocated_bytes(length))
    return result


def states(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, heads, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def moba(query, key, value) -> torch.Tensor:
    return moba_hf.moba_attention(query, key, value, block_size=BLOCK_SIZE, top_k=TOP_K, engine="blockwise")


def dense(query, key, value) -> torch.Tensor:
    rows = [x.transpose(0, 1)[None] for x in (query, key, value)]
    return scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)


def allocated_bytes(length: int) -> int:
    """Bytes of every tensor that one forward of the blockwise engine makes, temporaries included."""
    tensors = states(length)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        moba(*tensors)
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


def cpu_ratio(options) -> float:
    """CPU time of dense attention's forward over MoBA's; the first round warms up."""
    tensors, ratios = states(options.length), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for round_ in range(-1, options.rounds):
        seconds = [cpu_seconds(run, tensors) for run in (dense, moba)]
        if round_ >= 0:
            ratios.append(seconds[0] / seconds[1])
    torch.set_num_threads(threads)
    return statistics.median(ratios)


def cpu_seconds(run, tensors) -> float:
    start = time.process_time()
    run(*tensors)
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
