"""The Triton engine stage by stage on a GPU, beside the fastest dense kernels PyTorch has.

    python scripts/benchmark_kernels.py S1-8 S1-64 S4 S2               # docs/kernels.md; S1-8 is S1 at 8K tokens
    python scripts/benchmark_kernels.py S1-512 --kernels --dense none  # and the time of every kernel
    python scripts/benchmark_kernels.py S1-64 S4 --selection sink      # every query attends the first block
    python scripts/benchmark_kernels.py S1-8 S1-32 --graph             # without the time that launching takes

Medians by CUDA events after a warm-up; extra memory is the peak above inputs. S3 is one KV group of 10M tokens, S3-2
the same with 2M; D64-8 is a layer of the model of docs/quality.md, D256-32 has rows of 256. --selection gives attention
blocks made by hand in place of those that routing chose: `sink`, the first block and random ones; `local`, the newest
ones. Needs a CUDA device and Triton.
"""

import argparse
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from moba_hf.ops.engines import triton as engine


@dataclass(frozen=True)
class Setting:
    """Shapes of one benchmark; dtype is bfloat16 throughout."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    block_size: int
    top_k: int
    backward: bool = True
    head_dim: int = 128


_S1 = Setting(2, 0, 16, 16, 128, 8)
SETTINGS = {f"S1-{k}": replace(_S1, length=k << 10) for k in (8, 32, 64, 128, 512)} | {
    "S2": Setting(1, 1 << 20, 32, 8, 4096, 12, backward=False),
    "S3-2": Setting(1, 2 << 20, 4, 1, 32 << 10, 3, backward=False),
    "S3": Setting(1, 10 << 20, 4, 1, 160 << 10, 3, backward=False),
    "S4": Setting(1, 1 << 17, 32, 8, 512, 8),
    "S4-16": Setting(1, 1 << 17, 32, 8, 512, 16),
    "D64-8": Setting(4, 8 << 10, 9, 3, 128, 8, head_dim=64),
    "D256-32": Setting(2, 32 << 10, 8, 4, 128, 8, head_dim=256),
}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def main(argv: list[str] | None = None) -> None:
    """Measure and print each setting named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", action="store_true", help="profile every kernel")
    parser.add_argument("--selection", choices=("routed", "sink", "local"), default="routed")
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph of each stage")
    parser.add_argument("--dense", nargs="+", choices=(*BACKENDS, "none"), default=list(BACKENDS))
    options = parser.parse_args(argv)
    if (reason := engine.unavailable()) is not None or not torch.cuda.is_available():
        raise SystemExit(f"benchmark_kernels cannot run: {reason or 'no CUDA device'}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; times in ms")
    for name in options.settings:
        ours(name, SETTINGS[name], options)
        torch.cuda.empty_cache()
        if options.dense != ["none"]:
            dense(name, SETTINGS[name], options)
            torch.cuda.empty_cache()


def ours(name: str, s: Setting, options) -> None:
    tokens = s.batch * s.length
    query, key, value, grad = (states(tokens, h, s.head_dim) for h in (s.heads, s.kv_heads, s.kv_heads, s.heads))
    scale = s.head_dim**-0.5
    ends = torch.arange(s.batch + 1, device="cuda", dtype=torch.int32) * s.length
    where = (ends, ends, s.block_size)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    selected = engine.select(query, key, *where, s.top_k - 1)
    if options.selection != "routed":
        selected.copy_(by_hand(s, options.selection)[:, None])
    output, lse = engine.forward(query, key, value, selected, *where, scale)
    stages = {
        "select": lambda: engine.select(query, key, *where, s.top_k - 1),
        "forward": lambda: engine.forward(query, key, value, selected, *where, scale),
    }
    if s.backward:
        saved = (query, key, value, output, lse, selected)
        stages["backward"] = lambda: engine.backward(grad, *saved, *where, scale)
    if options.graph:
        stages = {stage: graphed(run) for stage, run in stages.items()}
    warm = () if options.graph else ("select", "forward")  # they ran above
    times = {stage: median_ms(run, options.repeats, stage not in warm) for stage, run in stages.items()}
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    line = ", ".join(f"{stage} {time:.2f}" for stage, time in times.items())
    how = f" ({options.selection})" * (options.selection != "routed") + " (graph)" * options.graph
    print(f"{name} moba{how}: {line}; all {sum(times.values()):.2f}; {peak:.2f} GiB extra", flush=True)
    if options.kernels:
        report_kernels(stages.values())


def by_hand(s: Setting, selection: str) -> torch.Tensor:
    """int32 [tokens, top_k − 1]: past blocks of each token, ascending, then −1; the same for every head."""
    own = torch.arange(s.length, device="cuda") // s.block_size
    slot = torch.arange(s.top_k - 1, device="cuda")
    blocks = own[:, None] - 1 - slot
    if selection == "sink":
        spread = torch.rand(s.length, s.top_k - 1, device="cuda") * own[:, None]
        blocks = torch.where(own[:, None] >= s.top_k, spread.long(), blocks)  # few past blocks: all of them
        blocks[own > 0, -1] = 0
        ascending = blocks.sort(dim=1).values
        twice = torch.zeros_like(ascending, dtype=torch.bool)
        twice[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
        blocks = ascending.masked_fill(twice, -1)
    blocks = blocks.masked_fill(blocks < 0, s.length).sort(dim=1).values
    return blocks.masked_fill(blocks == s.length, -1).int().repeat(s.batch, 1)


def dense(name: str, s: Setting, options) -> None:
    query, key, value, grad = (
        states(s.batch, h, s.length, s.head_dim).requires_grad_() for h in (s.heads, s.kv_heads, s.kv_heads, s.heads)
    )

    def forward():
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=s.heads != s.kv_heads)

    for backend in options.dense:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with sdpa_kernel(BACKENDS[backend]):
            with torch.no_grad():
                times = {"forward": median_ms(forward, options.repeats)}
            if s.backward:
                both = lambda: torch.autograd.grad(forward(), (query, key, value), grad)  # noqa: E731
                times["forward + backward"] = median_ms(both, options.repeats)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        line = ", ".join(f"{stage} {time:.2f}" for stage, time in times.items())
        print(f"{name} dense {backend}: {line}; {peak:.2f} GiB extra", flush=True)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def graphed(run):
    """Replays what `run` launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def median_ms(run, repeats: int, warm_up: bool = True) -> float:
    if warm_up:
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def report_kernels(runs) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for run in runs:
            run()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.device_time_total)
    for row in rows[:16]:
        print(f"    {row.key[:60]:60s} {row.device_time_total / 1e3:9.2f} ms  × {row.count}", flush=True)
    copies = [row for row in rows if "DtoH" in row.key]
    print(f"    copies from the device to the host: {sum(row.count for row in copies)}", flush=True)


if __name__ == "__main__":
    main()
