"""The Triton engine stage by stage on a GPU, beside the fastest dense kernel PyTorch has.

    python scripts/benchmark_kernels.py S1-8 S1-64 S4 S2          # settings of docs/kernels.md; S1-8 is S1 at 8K tokens
    python scripts/benchmark_kernels.py S1-512 --kernels          # and the time of every kernel

Medians by CUDA events after a warm-up; extra memory is the peak above inputs. Needs a CUDA device and Triton.
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
    """Shapes of one benchmark; head_dim is 128 and dtype bfloat16 throughout."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    block_size: int
    top_k: int
    backward: bool = True


_S1 = Setting(2, 0, 16, 16, 128, 8)
SETTINGS = {f"S1-{k}": replace(_S1, length=k << 10) for k in (8, 32, 64, 128, 512)} | {
    "S2": Setting(1, 1 << 20, 32, 8, 4096, 12, backward=False),
    "S4": Setting(1, 1 << 17, 32, 8, 512, 8),
    "S4-16": Setting(1, 1 << 17, 32, 8, 512, 16),
}


def main(argv: list[str] | None = None) -> None:
    """Measure and print each setting named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", action="store_true", help="profile every kernel")
    parser.add_argument("--no-dense", action="store_true")
    options = parser.parse_args(argv)
    if (reason := engine.unavailable()) is not None or not torch.cuda.is_available():
        raise SystemExit(f"benchmark_kernels cannot run: {reason or 'no CUDA device'}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; times in ms")
    for name in options.settings:
        ours(name, SETTINGS[name], options)
        torch.cuda.empty_cache()
        if not options.no_dense:
            dense(name, SETTINGS[name], options)
            torch.cuda.empty_cache()


def ours(name: str, s: Setting, options) -> None:
    tokens = s.batch * s.length
    query, key, value, grad = (states(tokens, h) for h in (s.heads, s.kv_heads, s.kv_heads, s.heads))
    ends = torch.arange(s.batch + 1, device="cuda", dtype=torch.int32) * s.length
    where = (ends, ends, s.block_size)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    selected = engine.select(query, key, *where, s.top_k - 1)
    output, lse = engine.forward(query, key, value, selected, *where, 128**-0.5)
    stages = {
        "select": lambda: engine.select(query, key, *where, s.top_k - 1),
        "forward": lambda: engine.forward(query, key, value, selected, *where, 128**-0.5),
    }
    if s.backward:
        saved = (query, key, value, output, lse, selected)
        stages["backward"] = lambda: engine.backward(grad, *saved, *where, 128**-0.5)
    times = {stage: median_ms(run, options.repeats) for stage, run in stages.items()}
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    line = ", ".join(f"{stage} {time:.2f}" for stage, time in times.items())
    print(f"{name} moba: {line}; all {sum(times.values()):.2f}; {peak:.2f} GiB extra", flush=True)
    if options.kernels:
        report_kernels(stages.values())


def dense(name: str, s: Setting, options) -> None:
    query, key, value, grad = (
        states(s.batch, h, s.length).requires_grad_() for h in (s.heads, s.kv_heads, s.kv_heads, s.heads)
    )

    def forward():
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=s.heads != s.kv_heads)

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            with torch.no_grad():
                times = {"forward": median_ms(forward, options.repeats)}
            if s.backward:
                both = lambda: torch.autograd.grad(forward(), (query, key, value), grad)  # noqa: E731
                times["forward + backward"] = median_ms(both, options.repeats)
        line = ", ".join(f"{stage} {time:.2f}" for stage, time in times.items())
        print(f"{name} dense {backend.name.lower()}: {line}", flush=True)


def states(tokens: int, heads: int, length: int | None = None) -> torch.Tensor:
    shape = (tokens, heads, 128) if length is None else (tokens, heads, length, 128)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def median_ms(run, repeats: int) -> float:
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


if __name__ == "__main__":
    main()
