"""Tokens/s and peak memory of a whole model, full attention beside MoBA: prefill, decoding, training steps.

    python scripts/benchmark_model.py --preset smollm2-135m --layers 4 --lengths 4096 --block-size 128 --top-k 4
    python scripts/benchmark_model.py --model runs/demo/model --modes prefill decode --lengths 2048
    python scripts/benchmark_model.py --preset llama-3.1-8b --device cuda --dtype bfloat16 --modes prefill \
        --lengths 32768 131072 262144 --block-size 4096 --top-k 12 --no-cache --output runs/benchmark-8b   # needs a GPU

A preset is a model of that shape with random weights; --layers keeps the first few. Every round runs full attention,
then MoBA, so that a busy machine slows both alike: the table has medians over the rounds, the spread between fastest
and slowest, and the median of the rounds' ratios. Times are CUDA events on a GPU and the wall clock on a CPU. What
does not fit the memory leaves its row empty ("out of memory"), and the others go on.

prefill: one prompt; logits of its last token alone. --no-cache computes the same without keeping keys and values.
decode: --decode-tokens single tokens after a cache of --lengths random keys and values, which is not timed; with
    --decode moba they are routed too. Both attend over a MobaCache, which does not copy itself for each token.
train: forward, backward and a step of AdamW; the loss is that of the last --loss-tokens positions, because logits of
    all positions would be the largest tensor of the model. --checkpointing recomputes each layer.

Peak memory is everything: weights, cache and temporaries; the allocator's on CUDA, the process's resident set on a CPU.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

import moba_hf
from moba_hf import planner
from moba_hf.evaluation.modes import MOBA, Mode, running

MODES = ("prefill", "decode", "train")
# PyTorch does not choose its fastest dense kernel by itself: each is taken where it can be, in this order. cuDNN is the
# fastest for long inputs, but makes a plan for every length of a cache that grows: 32 ms a token.
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
FASTEST_DECODING = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Row:
    """One mode, length and attention. seconds: median of a run of `tokens` tokens; None where it did not fit.

    spread: slowest less fastest. ratio: full attention's seconds over these, median of the rounds' ratios.
    """

    mode: str
    length: int
    attention: str
    tokens: int
    seconds: float | None = None
    spread: float | None = None
    tokens_per_second: float | None = None
    ratio: float | None = None
    peak_gib: float | None = None


def main(argv: list[str] | None = None) -> list[Row]:
    """Run, print a line for each row, and write model.json where --output names a folder."""
    options = parse(argv)
    model = load(options)
    print(f"{describe(model, options)}\n{HEAD}", flush=True)
    rows = []
    for mode in options.modes:
        for length in options.lengths:
            rows += compare(options, model, mode, length)
            print("\n".join(line(row) for row in rows[-2:]), flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        report = {"model": describe(model, options), "options": vars(options) | {"output": str(options.output)}}
        (options.output / "model.json").write_text(
            json.dumps(report | {"rows": [asdict(row) for row in rows]}, indent=1)
        )
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a checkpoint: folder or hub id")
    which.add_argument("--preset", choices=planner.PRESETS, help="random weights of that shape")
    parser.add_argument("--layers", type=int, help="of a preset; default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--full-layers", type=int, default=0, help="last layers that MoBA keeps in full attention")
    parser.add_argument("--decode", choices=["full", "moba"], default="moba")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--dense", default="sdpa", help="attn_implementation of full attention")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=planner.DTYPE_BYTES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--loss-tokens", type=int, default=4096)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--no-cache", action="store_true", help="prefill without keeping keys and values")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    if options.layers and options.model:
        parser.error("--layers belongs to --preset")
    return options


# ---- the model -----------------------------------------------------------------------------------------------------


def load(options) -> torch.nn.Module:
    """The model in full attention, with MoBA's settings in its config."""
    moba = {name: getattr(options, name) for name in ("block_size", "top_k", "decode", "engine")}
    moba["full_attention_layers"] = [-i - 1 for i in range(options.full_layers)]
    dtype = getattr(torch, options.dtype)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation=MOBA, moba=moba)
        return model.to(options.device)
    shape = planner.PRESETS[options.preset]
    config = LlamaConfig(
        **replace(shape, layers=options.layers or shape.layers).llama_settings(),
        max_position_embeddings=max(options.lengths) + options.decode_tokens * (options.rounds + 1),
        # random weights are not trained for anything: no warning needed that they are not trained for MoBA
        moba=moba, moba_trained_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=MOBA)


def describe(model, options) -> str:
    shape = planner.ModelShape.from_config(model.config, options.model or options.preset)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    size = f"{shape.layers} layers, {shape.parameters / 1e9:.3g}B parameters, {options.dtype}"
    return f"{shape.name}: {size}; {device}; torch {torch.__version__}, moba_hf {moba_hf.__version__}"


# ---- one mode and length -------------------------------------------------------------------------------------------


def compare(options, model, mode: str, length: int) -> list[Row]:
    """Full attention and MoBA, in turn."""
    contenders = (Mode("full", options.dense), Mode("moba", MOBA))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    peaks = dict.fromkeys(times, 0.0)
    states = prepare(options, model, mode, length, contenders)
    for round_ in range(-1, options.rounds):  # round −1 warms up
        for name, contender in zip(times, contenders):
            if states[name] is None:
                continue
            measured = attempt(options, model, mode, contender, states[name])
            if measured is None:
                states[name] = None
                free(options)
            elif round_ >= 0:
                times[name].append(measured[0])
                peaks[name] = max(measured[1], peaks[name])
    done = {name: seconds if states[name] is not None else [] for name, seconds in times.items()}
    states.clear()
    free(options)
    tokens = options.decode_tokens if mode == "decode" else length
    return [row(mode, length, name, tokens, done[name], done["full"], peaks[name]) for name in done]


def attempt(options, model, mode: str, contender: Mode, state) -> tuple[float, float] | None:
    """(seconds, bytes at the peak) of one run; None where it does not fit the memory."""
    try:
        kernels = FASTEST_DECODING if mode == "decode" else FASTEST_FIRST
        with running(model, contender), sdpa_kernel(kernels, set_priority=True):
            return clock(options, lambda: RUNS[mode](model, state, options))
    except torch.OutOfMemoryError:
        model.zero_grad()
        return None


def row(mode: str, length: int, name: str, tokens: int, seconds: list[float], full: list[float], peak: float) -> Row:
    if not seconds:
        return Row(mode, length, name, tokens)
    median = statistics.median(seconds)
    ratio = statistics.median(a / b for a, b in zip(full, seconds)) if full else None
    return Row(
        mode, length, name, tokens, median, max(seconds) - min(seconds), tokens / median, ratio, peak / planner.GIB
    )


def prepare(options, model, mode: str, length: int, contenders) -> dict:
    """What each contender needs besides the model; None where its cache does not fit the memory."""
    generator = torch.Generator().manual_seed(length)
    count = options.decode_tokens if mode == "decode" else length
    ids = torch.randint(0, model.config.vocab_size, (1, count), generator=generator).to(options.device)
    if mode == "decode":
        return {contender.name: with_cache(options, model, length, ids) for contender in contenders}
    return dict.fromkeys([c.name for c in contenders], (ids, optimizer_of(model, options) if mode == "train" else None))


def with_cache(options, model, length: int, ids):
    try:
        return ids, filled_cache(options, model, length)
    except torch.OutOfMemoryError:
        return None


def filled_cache(options, model, length: int):
    """A cache of random keys and values, as if a prompt of that length had gone through the model."""
    config = model.config.get_text_config(decoder=True)
    cache = moba_hf.MobaCache(config)  # a DynamicCache would copy itself for each token, which is not attention
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, length, head_dim)
    with torch.no_grad():
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, device=options.device, dtype=model.dtype) for _ in "kv")
            cache.update(keys, values, layer)
    return cache


def optimizer_of(model, options) -> torch.optim.Optimizer:
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # one for both contenders, or there would be twice the moments; learning rate 0 costs the same and changes nothing
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=options.device == "cuda")


def prefill(model, state, options) -> None:
    with torch.no_grad():
        model.eval()(state[0], use_cache=not options.no_cache, logits_to_keep=1)


def decode(model, state, options) -> None:
    ids, cache = state
    with torch.no_grad():
        for i in range(options.decode_tokens):
            model.eval()(ids[:, i : i + 1], past_key_values=cache, use_cache=True)


def train(model, state, options) -> None:
    ids, optimizer = state
    logits = model.train()(ids, use_cache=False, logits_to_keep=options.loss_tokens).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits.float(), ids[0, -logits.shape[0] :]).backward()
    optimizer.step()
    optimizer.zero_grad()


RUNS = {"prefill": prefill, "decode": decode, "train": train}


def clock(options, run) -> tuple[float, float]:
    """(seconds, bytes at the peak) of one call."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set counts from here; Linux
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text().splitlines()
    return seconds, next(int(text.split()[1]) for text in status if text.startswith("VmHWM")) * 1024


def free(options) -> None:
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()


# ---- text ----------------------------------------------------------------------------------------------------------

HEAD = f"{'mode':9}{'length':>10}  {'attention':10}{'tokens/s':>12}{'seconds':>12}{'spread':>11}{'ratio':>8}{'GiB':>9}"


def line(row: Row) -> str:
    start = f"{row.mode:9}{row.length:>10}  {row.attention:10}"
    if row.seconds is None:
        return f"{start}{'out of memory':>14}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return (
        f"{start}{row.tokens_per_second:>12,.1f}{row.seconds:>12.4g}{row.spread:>11.3g}{ratio:>8}{row.peak_gib:>9.2f}"
    )


if __name__ == "__main__":
    main()
