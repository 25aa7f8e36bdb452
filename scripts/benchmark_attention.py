"""Time and memory of MoBA attention beside PyTorch's dense attention, side by side in one run.

    python scripts/benchmark_attention.py --lengths 4096 8192 16384 32768 --output runs/benchmark
    python scripts/benchmark_attention.py --lengths 4096 --block-size 128
    python scripts/benchmark_attention.py --device cuda --setting S1 --lengths 8192 65536        # needs a GPU

Every round times each contender once, so that a busy machine slows all of them alike; the table has medians over the
rounds, and the ratio is the median of the rounds' ratios. Forward includes routing, whose time stands beside it (the
routing that engine="auto" takes). On CUDA every backend of PyTorch's dense attention that runs is timed, and the ratios
are to the one whose forward is fastest. On CUDA by events over inputs that
rotate, on a CPU by the wall clock; there the ratio of the process's CPU time is given too: other work on the machine
hardly moves it, but it does not see threads that wait for each other. Peak memory is measured once, in a process of its
own on a CPU (resident set, the inputs' part taken off) and by the allocator on CUDA. The FLOP bound is what MoBA would
gain if it ran its fewer operations as fast as dense attention runs its own.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import moba_hf

NAN = float("nan")
DENSE = {  # contender: backend of PyTorch's attention; None is the one it takes by itself
    "cpu": {"dense": None},
    "cuda": {
        "dense cudnn": SDPBackend.CUDNN_ATTENTION,
        "dense flash": SDPBackend.FLASH_ATTENTION,
        "dense efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}
_GPU = {"head_dim": 128, "dtype": "bfloat16", "device": "cuda"}
SETTINGS = {  # of docs/benchmarks.md; S3 is one group of its 32 / 8 heads, whose queries alone would take 86 GB
    "S1": {**_GPU, "batch": 2, "heads": 16, "kv_heads": 16, "block_size": 128, "top_k": 8},
    "S2": {**_GPU, "heads": 32, "kv_heads": 8, "block_size": 4096, "top_k": 12, "lengths": [1 << 20]},
    "S3": {**_GPU, "heads": 4, "kv_heads": 1, "block_size": (10 << 20) // 64, "top_k": 3, "lengths": [10 << 20]},
    "S4": {**_GPU, "heads": 32, "kv_heads": 8, "block_size": 512, "top_k": 8, "lengths": [128 << 10]},
}
KINDS = ("forward", "forward_cpu", "both", "both_cpu", "select", "select_cpu")
COLUMNS = ("length", "contender", "select_s", "forward_s", "both_s", "forward_ratio", "both_ratio", "forward_cpu_ratio",
           "both_cpu_ratio", "peak_mb", "flop_bound")  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    """Run, print the table, and write results.csv, results.json and figures where --output names a folder."""
    options = parse(argv)
    if options.memory_of:
        print(json.dumps(cpu_peak_mb(options)))
        return []
    rows = [row for length in options.lengths for row in compare(options, length)]
    print(table(rows))
    print(crossing(rows))
    if options.output:
        write(options, rows)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, help="shapes of docs/benchmarks.md; other options override them")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--engines", nargs="+", default=None, help="default: what engine='auto' takes on the device")
    for name, value in (("batch", 1), ("heads", 9), ("kv-heads", 3), ("head-dim", 64), ("block-size", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.set_defaults(**SETTINGS.get(parser.parse_known_args(argv)[0].setting, {}))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.engines = options.engines or ["triton" if options.device == "cuda" else "blockwise"]
    return options


# ---- one length ----------------------------------------------------------------------------------------------------


def compare(options, length: int) -> list[dict]:
    """One row per contender at this length."""
    sets = [states(options, length, seed) for seed in range(2)]
    dense = [name for name in DENSE[options.device] if runs(options, name, sets[0])]
    if not dense:
        raise SystemExit("no backend of PyTorch's dense attention takes these shapes: nothing to compare with")
    contenders = [*dense, *options.engines]
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in contenders}
    for round_ in range(-1, options.rounds):  # round −1 warms up
        for name in contenders:
            found = one_round(options, name, sets[round_ % 2])
            if round_ >= 0:
                for kind, seconds in zip(KINDS, found):
                    times[name][kind].append(seconds)
    fastest = times[min(dense, key=lambda name: statistics.median(times[name]["forward"]))]
    rows = []
    for name in contenders:
        row = {"length": length, "contender": name, "flop_bound": flop_bound(options, length)}
        for kind in KINDS:
            row[f"{kind}_s"] = statistics.median(times[name][kind])
            row[f"{kind}_spread_s"] = max(times[name][kind]) - min(times[name][kind])
            row[f"{kind}_ratio"] = statistics.median(d / ours for d, ours in zip(fastest[kind], times[name][kind]))
        row["peak_mb"] = peak_mb(options, length, name)
        rows.append(row)
    return rows


def one_round(options, name: str, inputs) -> tuple[float, ...]:
    """Times in the order of KINDS; NaN for what is not done: routing in dense attention, a backward not asked for."""
    nothing = (NAN, NAN)
    with torch.no_grad():
        forward = clock(options, lambda: attend(options, name, *inputs[:3]))
        select = nothing if is_dense(name) else clock(options, lambda: route(options, *inputs[:2]))
    both = nothing if options.no_backward else clock(options, lambda: step(options, name, inputs))
    return (*forward, *both, *select)


def is_dense(name: str) -> bool:
    return any(name in backends for backends in DENSE.values())


def runs(options, name: str, inputs) -> bool:
    """Whether a backend of dense attention takes these shapes; what does not is named, and left out."""
    try:
        run_once(options, name, inputs)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or DENSE[options.device][name] is None:
            raise
        print(f"{name} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def states(options, length: int, seed: int) -> list[torch.Tensor]:
    """query, key, value, grad_output of `batch` packed sequences: [batch · length, heads, head_dim]."""
    generator = torch.Generator(options.device).manual_seed(seed)
    dtype, total = getattr(torch, options.dtype), options.batch * length
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    make = lambda h: torch.randn(total, h, options.head_dim, device=options.device, dtype=dtype, generator=generator)  # noqa: E731
    query, key, value, grad = (make(h) for h in heads)
    return [*(x.requires_grad_() for x in (query, key, value)), grad]


def attend(options, name: str, query, key, value):
    if is_dense(name):
        backend = DENSE[options.device][name]
        rows = [x.unflatten(0, (options.batch, -1)).transpose(1, 2) for x in (query, key, value)]
        with nullcontext() if backend is None else sdpa_kernel(backend):
            output = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=options.heads != options.kv_heads)
        return output.transpose(1, 2).flatten(0, 1)
    return moba_hf.moba_attention(query, key, value, **routing(options, query), engine=name)


def route(options, query, key):
    return moba_hf.select_blocks(query, key, **routing(options, query))


def routing(options, query) -> dict:
    """The arguments that routing takes."""
    length = query.shape[0] // options.batch
    ends = torch.arange(options.batch + 1, dtype=torch.int32, device=query.device) * length
    return dict(block_size=options.block_size, top_k=options.top_k, cu_seqlens_q=ends, cu_seqlens_k=ends)


def step(options, name: str, inputs) -> None:
    *leaves, grad = inputs
    torch.autograd.grad(attend(options, name, *leaves), leaves, grad)


def clock(options, run) -> tuple[float, float]:
    """Seconds of one call: by the clock, and of CPU time in all threads (NaN on CUDA)."""
    if options.device == "cpu":
        start = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - start[0], time.process_time() - start[1]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, NAN


def flop_bound(options, length: int) -> float:
    """Query-key pairs of full causal attention over those of MoBA."""
    block, slots = options.block_size, options.top_k - 1
    starts = range(0, length, block)
    own = sum(n * (n + 1) / 2 for n in (min(block, length - start) for start in starts))
    past = sum(min(block, length - start) * min(slots, i) * block for i, start in enumerate(starts))
    return length * (length + 1) / 2 / (own + past)


# ---- memory --------------------------------------------------------------------------------------------------------


def peak_mb(options, length: int, name: str) -> float:
    """MiB above the inputs at the peak of one step (one forward with --no-backward)."""
    if options.device == "cuda":
        inputs = states(options, length, 0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(options, name, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--lengths", str(length), "--memory-of", name, "--dtype", options.dtype]
    for flag in ("batch", "heads", "kv_heads", "head_dim", "block_size", "top_k"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
    command += ["--no-backward"] * options.no_backward
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cpu_peak_mb(options) -> float:
    """In a fresh process: the highest resident set of one step less that before it."""
    warm = argparse.Namespace(**vars(options) | {"block_size": 64})
    run_once(warm, options.memory_of, states(options, 512, 0))  # libraries and thread pools load now
    inputs = states(options, options.lengths[0], 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident_kb("VmRSS")
    run_once(options, options.memory_of, inputs)
    return (_resident_kb("VmHWM") - before) / 1024


def run_once(options, name: str, inputs) -> None:
    if options.no_backward:
        with torch.no_grad():
            attend(options, name, *inputs[:3])
    else:
        step(options, name, inputs)


def _resident_kb(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1])


# ---- results -------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """Markdown; the ratio is dense time over this contender's."""
    columns = (
        "tokens|attention|routing, s|forward, s|ratio|(CPU time)|both, s|ratio|(CPU time)|FLOP bound|peak, MiB".split(
            "|"
        )
    )
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|---" * 11 + "|")
    for r in rows:
        dense = is_dense(r["contender"])
        bound, select = ("", "") if dense else (f"{r['flop_bound']:.2f}", f"{r['select_s']:.4g}")
        lines.append(
            f"| {r['length']} | {r['contender']} | {select} | "
            f"{r['forward_s']:.4g} | {r['forward_ratio']:.2f} | {r['forward_cpu_ratio']:.2f} | "
            f"{r['both_s']:.4g} | {r['both_ratio']:.2f} | {r['both_cpu_ratio']:.2f} | {bound} | {r['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def crossing(rows: list[dict]) -> str:
    """The first length measured from which MoBA is faster than dense attention, forward."""
    sentences = []
    for name in dict.fromkeys(r["contender"] for r in rows if not is_dense(r["contender"])):
        slower = [r["length"] for r in rows if r["contender"] == name and r["forward_ratio"] <= 1]
        faster = [r["length"] for r in rows if r["contender"] == name and r["length"] > max(slower, default=0)]
        sentences.append(
            f"{name} is faster than dense attention from {min(faster)} tokens on (of the lengths measured)."
            if faster
            else f"{name} is not faster than dense attention at any length measured."
        )
    return "\n".join(sentences)


def write(options, rows: list[dict]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "memory_of")}
    # JSON has no NaN
    known = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    result = {"settings": settings, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": known}
    (options.output / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    with (options.output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.output)


def draw(rows: list[dict], folder: Path) -> None:
    """time.png and memory.png over length; the floor is dense time over the FLOP bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {"forward_s": "-", "both_s": "--"}
    for file, keys, label in (("time", ("forward_s", "both_s"), "seconds"), ("memory", ("peak_mb",), "MiB")):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for name, marker in zip(dict.fromkeys(r["contender"] for r in rows), "osD^v"):
            chosen = [r for r in rows if r["contender"] == name]
            for key in keys:
                kind = {"forward_s": " forward", "both_s": " forward + backward"}.get(key, "")
                x, y = [r["length"] for r in chosen], [r[key] for r in chosen]
                axes.plot(x, y, styles.get(key, "-"), marker=marker, label=name + kind)
                if key in styles and is_dense(name):
                    floor = [r[key] / r["flop_bound"] for r in chosen]
                    axes.plot(x, floor, ":", color="grey", label=f"{name} / FLOP bound" + kind)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.legend(fontsize=7)
        figure.savefig(folder / f"{file}.png", dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main()
