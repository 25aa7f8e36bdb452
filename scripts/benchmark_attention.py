"""Time and memory of MoBA attention beside dense attention, FlexAttention and the peers' own functions, in one run.

    python scripts/benchmark_attention.py --lengths 4096 8192 16384 32768 --output runs/benchmark
    python scripts/benchmark_attention.py --lengths 4096 --block-size 128 --others flex
    python scripts/benchmark_attention.py --device cuda --setting S1 --lengths 8192 65536        # needs a GPU

Beside our engines and PyTorch's dense attention (on CUDA each of its backends) run the others that can: the
FlashAttention packages (dense), FlexAttention over our selection, and MoBA of MoonshotAI and FlashMoBA where they can
be imported. Each is first held to the float64 formula, output and gradients, on a sample of rows; what cannot run, or
computes something else, is named with its reason.

Every round times each contender once, so that a busy machine slows all of them alike; the table has medians over the
rounds, and the ratio is the median of the rounds' ratios to the dense attention whose forward is fastest. Forward
includes routing, whose time stands beside it (the routing that engine="auto" takes; for FlexAttention with its block
mask). On CUDA by events over inputs that rotate, on a CPU by the wall clock; there the ratio of the process's CPU time
is given too: other work on the machine hardly moves it, but it does not see threads that wait for each other. Peak
memory is measured once, in a process of its own on a CPU (resident set, the inputs' part taken off) and by the
allocator on CUDA. The FLOP bound is what MoBA would gain if it ran its fewer operations as fast as dense attention runs
its own; the floor of memory is what must exist: inputs, output, gradients.
"""

import argparse
import csv
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from attention_agreement import disagreement
from attention_contenders import DENSE, OTHERS, Absent, Contender, Problem, make

NAN = float("nan")
_GPU = {"head_dim": 128, "dtype": "bfloat16", "device": "cuda"}
SETTINGS = {  # of docs/benchmarks.md; S3 is one group of its 32 / 8 heads, whose queries alone would take 86 GB
    "S1": {**_GPU, "batch": 2, "heads": 16, "kv_heads": 16, "block_size": 128, "top_k": 8},
    "S2": {**_GPU, "heads": 32, "kv_heads": 8, "block_size": 4096, "top_k": 12, "lengths": [1 << 20]},
    "S3": {**_GPU, "heads": 4, "kv_heads": 1, "block_size": (10 << 20) // 64, "top_k": 3, "lengths": [10 << 20]},
    "S4": {**_GPU, "heads": 32, "kv_heads": 8, "block_size": 512, "top_k": 8, "lengths": [128 << 10]},
}
KINDS = ("forward", "forward_cpu", "both", "both_cpu", "select", "select_cpu")
COLUMNS = ("length", "contender", "select_s", "forward_s", "both_s", "forward_ratio", "both_ratio", "forward_cpu_ratio",
           "both_cpu_ratio", "peak_mb", "inputs_mb", "floor_mb", "flop_bound")  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    """Run, print the table, and write results.csv, results.json and figures where --output names a folder."""
    options = parse(argv)
    if options.memory_of:
        print(json.dumps(cpu_peak_mb(options)))
        return []
    missing: list[dict] = []
    rows = [row for length in options.lengths for row in compare(options, length, missing)]
    print(*filter(None, (conditions(), table(rows), crossing(rows), absences(missing))), sep="\n")
    if options.output:
        write(options, rows, missing)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, help="shapes of docs/benchmarks.md; other options override them")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--engines", nargs="+", default=None, help="default: what engine='auto' takes on the device")
    others = "beside our engines and PyTorch's dense attention; default: all; none where no name follows"
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=list(OTHERS), help=others)
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


def problem_of(options, length: int) -> Problem:
    names = ("batch", "heads", "kv_heads", "head_dim", "block_size", "top_k", "device")
    return Problem(length, dtype=getattr(torch, options.dtype), **{name: getattr(options, name) for name in names})


# ---- one length ----------------------------------------------------------------------------------------------------


def compare(options, length: int, missing: list[dict]) -> list[dict]:
    """One row per contender at this length; what does not run goes into `missing`."""
    problem = problem_of(options, length)
    sets = [problem.states(seed) for seed in range(2)]
    running = contenders(options, problem, sets[0], missing)
    times: dict[str, dict[str, list[float]]] = {each.name: {kind: [] for kind in KINDS} for each, _ in running}
    for round_ in range(-1, options.rounds):  # round −1 warms up
        for each, backward in running:
            found = one_round(problem.device, each, sets[round_ % 2], backward)
            if round_ >= 0:
                for kind, seconds in zip(KINDS, found):
                    times[each.name][kind].append(seconds)
    dense = [each.name for each, _ in running if each.dense]
    fastest = times[min(dense, key=lambda name: statistics.median(times[name]["forward"]))]
    least = [part / 2**20 for part in problem.least_bytes(not options.no_backward)]
    rows = []
    for each, backward in running:
        row = {"length": length, "contender": each.name, "dense": each.dense, "flop_bound": problem.flop_bound}
        for kind in KINDS:
            own = times[each.name][kind]
            row[f"{kind}_s"] = statistics.median(own)
            row[f"{kind}_spread_s"] = max(own) - min(own)
            row[f"{kind}_ratio"] = statistics.median(d / ours for d, ours in zip(fastest[kind], own))
        whole = backward or options.no_backward
        row["peak_mb"] = peak_mb(options, problem, each, missing) if whole else NAN
        rows.append(row | {"inputs_mb": least[0], "floor_mb": sum(least)})
    return rows


def contenders(options, problem: Problem, states, missing: list[dict]) -> list[tuple[Contender, bool]]:
    """(contender, whether its backward runs) of all that compute what ours does; the others go into `missing`.

    Raises SystemExit where one of our engines does not, or where no dense attention of PyTorch's runs.
    """
    running = []
    for name in (*DENSE[problem.device], *(each for each in OTHERS if each in options.others), *options.engines):
        contender, backward, reason = admitted(name, problem, states, not options.no_backward)
        if reason:
            what = "forward + backward" if contender else "anything"
            missing.append({"length": problem.length, "contender": name, "what": what, "reason": reason})
            if name in options.engines:
                raise SystemExit(absences(missing[-1:]))
        if contender:
            running.append((contender, backward))
    if not any(contender.name in DENSE[problem.device] for contender, _ in running):
        raise SystemExit(f"no dense attention of PyTorch's runs: nothing to compare with\n{absences(missing)}")
    return running


def admitted(name: str, problem: Problem, states, backward: bool) -> tuple[Contender | None, bool, str | None]:
    """(contender, whether its backward may be timed, why not all of it): held to the float64 formula before."""
    reason = None
    for both in (True, False) if backward else (False,):
        try:
            contender = make(name, problem)
            wrong = disagreement(problem, contender, states, both)
        except Absent as error:
            return None, False, str(error)
        except Exception as error:  # other people's code: whatever it raises is why it does not run
            reason = said(error)
            continue
        if wrong is None:
            return contender, both, reason
        reason = wrong
    return None, False, reason


def said(error: BaseException) -> str:
    """Type and first line of what was raised first: a compiler wraps that in errors of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'without a message')}"


def one_round(device: str, contender: Contender, states, backward: bool) -> tuple[float, ...]:
    """Times in the order of KINDS; NaN for what is not done: a backward not asked for, routing in dense attention."""
    nothing, tensors = (NAN, NAN), [x.detach() for x in states[:3]]
    with torch.no_grad():
        forward = clock(device, lambda: contender.attend(*tensors))
        select = clock(device, lambda: contender.select(*tensors[:2])) if contender.select else nothing
    both = clock(device, lambda: run_once(contender, states, True)) if backward else nothing
    return (*forward, *both, *select)


def run_once(contender: Contender, states, backward: bool) -> None:
    *tensors, grad = states
    if backward:
        torch.autograd.grad(contender.attend(*tensors), tensors, grad)
    else:
        with torch.no_grad():
            contender.attend(*(x.detach() for x in tensors))


def clock(device: str, run) -> tuple[float, float]:
    """Seconds of one call: by the clock, and of CPU time in all threads (NaN on CUDA)."""
    if device == "cpu":
        start = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - start[0], time.process_time() - start[1]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, NAN


# ---- memory --------------------------------------------------------------------------------------------------------


def peak_mb(options, problem: Problem, contender: Contender, missing: list[dict]) -> float:
    """MiB above the inputs at the peak of one step (one forward with --no-backward)."""
    if problem.device == "cuda":
        states = problem.states(0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(contender, states, not options.no_backward)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--lengths", str(problem.length), "--memory-of", contender.name]
    for flag in ("dtype", "batch", "heads", "kv_heads", "head_dim", "block_size", "top_k"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
    command += ["--no-backward"] * options.no_backward
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        absence = {"length": problem.length, "contender": contender.name, "what": "peak memory", "reason": reason}
        missing.append(absence)
        return NAN
    return json.loads(done.stdout)


def cpu_peak_mb(options) -> float:
    """In a fresh process: the highest resident set of one step less that before it."""
    problem, backward = problem_of(options, options.lengths[0]), not options.no_backward
    contender = make(options.memory_of, problem)
    if options.memory_of == "flex":  # compiles for the length itself; what that took goes back to the system
        run_once(contender, problem.states(0), backward)
        ctypes.CDLL(None).malloc_trim(0)
    else:  # libraries and thread pools load now
        small = problem_of(argparse.Namespace(**vars(options) | {"block_size": 64}), 512)
        run_once(make(options.memory_of, small), small.states(0), backward)
    states = problem.states(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident_kb("VmRSS")
    run_once(contender, states, backward)
    return (_resident_kb("VmHWM") - before) / 1024


def _resident_kb(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1])


# ---- results -------------------------------------------------------------------------------------------------------


def conditions() -> str:
    """What the times depend on beside the machine: waiting threads spin or sleep as OMP_WAIT_POLICY says."""
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY {waiting}\n"


def table(rows: list[dict]) -> str:
    """Markdown; the ratio is the fastest dense time over this contender's. A cell is empty where nothing was timed."""
    columns = {
        "tokens": "d", "attention": "s", "routing, s": ".4g", "forward, s": ".4g", "ratio": ".2f", "(CPU time)": ".2f",
        "both, s": ".4g", "ratio ": ".2f", "(CPU time) ": ".2f", "FLOP bound": ".2f", "peak, MiB": ".0f",
    }  # fmt: skip
    keys = ("length", "contender", "select_s", "forward_s", "forward_ratio", "forward_cpu_ratio", "both_s",
            "both_ratio", "both_cpu_ratio", "flop_bound", "peak_mb")  # fmt: skip
    lines = ["| " + " | ".join(name.strip() for name in columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        row = row | {"flop_bound": NAN} if row["dense"] else row
        cells = ("" if row[key] != row[key] else format(row[key], form) for key, form in zip(keys, columns.values()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def crossing(rows: list[dict]) -> str:
    """The first length measured from which each MoBA is faster than dense attention: forward, and with backward."""
    sentences = []
    for name in dict.fromkeys(r["contender"] for r in rows if not r["dense"]):
        for key, what in (("forward_ratio", "forward"), ("both_ratio", "forward + backward")):
            ratios = {r["length"]: r[key] for r in rows if r["contender"] == name and r[key] == r[key]}
            if not ratios:
                continue
            slower = max((length for length, ratio in ratios.items() if ratio <= 1), default=0)
            first = min((length for length in ratios if length > slower), default=None)
            where = f"from {first} tokens on (of the lengths measured)" if first else "at no length measured"
            sentences.append(f"{name}, {what}: faster than dense attention {where}.")
    return "\n".join(sentences)


def absences(missing: list[dict]) -> str:
    """One line for each contender and reason, with the lengths."""
    lengths: dict[tuple[str, str, str], list[int]] = {}
    for each in missing:
        lengths.setdefault((each["contender"], each["what"], each["reason"]), []).append(each["length"])
    return "\n".join(
        f"{name} did not run {what} at {', '.join(map(str, at))} tokens: {reason}"
        for (name, what, reason), at in lengths.items()
    )


def write(options, rows: list[dict], missing: list[dict]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "memory_of")}
    # JSON has no NaN
    known = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    result = {"settings": settings, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": known,
              "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"), "not_run": missing}  # fmt: skip
    (options.output / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    with (options.output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.output)


def draw(rows: list[dict], folder: Path) -> None:
    """time.png and memory.png over length, with their floors: dense time over the FLOP bound, and what must exist."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {"time": {"forward_s": " forward", "both_s": " forward + backward"}, "memory": {"peak_mb": ""}}
    labels, lengths = {"time": "seconds", "memory": "MiB, inputs included"}, sorted({r["length"] for r in rows})
    for file, keys in curves.items():
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for name, marker in zip(dict.fromkeys(r["contender"] for r in rows), itertools.cycle("osD^vPX*<>")):
            for (key, kind), style in zip(keys.items(), ("-", "--")):
                points = [(r["length"], value(r, key)) for r in rows if r["contender"] == name and r[key] == r[key]]
                if points:
                    axes.plot(*zip(*points), style, marker=marker, label=name + kind)
        for (key, kind), style in zip(keys.items(), (":", "-.")):
            if floor := floors(rows, key):
                axes.plot(*zip(*floor), style, marker=".", color="grey", label="floor" + kind)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=labels[file])
        axes.set_xticks(lengths, labels=map(str, lengths))
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=7)
        figure.savefig(folder / f"{file}.png", dpi=120)
        plt.close(figure)


def value(row: dict, key: str) -> float:
    return row["peak_mb"] + row["inputs_mb"] if key == "peak_mb" else row[key]


def floors(rows: list[dict], key: str) -> list[tuple[int, float]]:
    """(length, floor): of a time the fastest dense one over the FLOP bound, of memory what must exist."""
    found: dict[int, float] = {}
    for row in rows:
        if key == "peak_mb":
            found[row["length"]] = row["floor_mb"]
        elif row["dense"] and row[key] == row[key]:
            found[row["length"]] = min(found.get(row["length"], float("inf")), row[key] / row["flop_bound"])
    return sorted(found.items())


if __name__ == "__main__":
    main()
