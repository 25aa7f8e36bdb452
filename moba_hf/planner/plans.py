"""The plan itself: dense beside MoBA for prefill, decode and training, and what fits."""

from dataclasses import asdict, dataclass

from . import counts, memory, times
from .devices import GIB, Device
from .memory import Memory
from .shapes import ModelShape, Sharing, Work, sharings

MODES = ("prefill", "decode", "train")
_MEMORY = {"prefill": memory.prefill_memory, "decode": memory.decode_memory, "train": memory.train_memory}
_LONGEST = 1 << 30  # tokens: where the search for the largest length ends


@dataclass(frozen=True)
class Column:
    """One mode under one attention. seconds: of a step of one group of GPUs (decode: of one token a sequence)."""

    attention: str
    flops: float
    attention_bytes: float
    seconds: dict[str, float]
    tokens_per_second: float
    memory: Memory
    fits: bool
    largest_length: int


@dataclass(frozen=True)
class Plan:
    """Everything predicted about one mode. `crossover` in tokens, None where no length up to 2^27 has one."""

    mode: str
    model: ModelShape
    work: Work
    device: Device
    sharing: Sharing
    suggested: Sharing | None
    crossover: int | None
    columns: tuple[Column, ...]

    def to_dict(self) -> dict:
        """Plain values for JSON; seconds, bytes, FLOPs."""
        result = asdict(self) | {"gpus": self.sharing.gpus}
        for made, column in zip(result["columns"], self.columns):
            made["memory"]["total"], made["seconds"]["total"] = column.memory.total, sum(column.seconds.values())
        return result


def make_plan(mode: str, shape: ModelShape, work: Work, device: Device, gpus: int, sequence: int | None = None) -> Plan:
    """Plan one mode of `MODES`.

    sequence: sequence-parallel ranks; None takes what is suggested, or, where nothing fits, the widest split.
    ValueError: a mode, degree or number of GPUs that cannot be.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, but was {mode!r}")
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, but was {gpus}")
    ways = sharings(shape, gpus, mode == "train")
    suggested = next(
        (way for way in ways if _MEMORY[mode](shape, work, way, device, True).total <= device.usable), None
    )
    sharing = suggested or min(ways, key=lambda way: _MEMORY[mode](shape, work, way, device, True).total)
    if sequence is not None:
        sharing = next((way for way in ways if way.sequence == sequence), None)
        if sharing is None:
            degrees = sorted({way.sequence for way in ways})
            raise ValueError(f"{sequence} sequence-parallel ranks do not fit {gpus} GPUs; possible: {degrees}")
    crossing = None if mode == "decode" else times.crossover(shape, work, device, mode == "train")
    columns = tuple(_column(mode, shape, work, device, sharing, sparse) for sparse in (False, True))
    return Plan(mode, shape, work, device, sharing, suggested, crossing, columns)


def _column(mode: str, shape: ModelShape, work: Work, device: Device, sharing: Sharing, sparse: bool) -> Column:
    held = _MEMORY[mode](shape, work, sharing, device, sparse)
    if mode == "decode":
        seconds = {"reading": times.decode_time(shape, work, sharing, device, sparse)}
        tokens = work.batch
    else:
        time = (times.prefill_time if mode == "prefill" else times.train_time)(shape, work, sharing, device, sparse)
        seconds, tokens = asdict(time), work.batch * work.length
    flops, moved = operations(mode, shape, work, sparse)
    return Column(
        "moba" if sparse else "dense", flops, moved, seconds, sharing.replicas * tokens / sum(seconds.values()), held,
        held.total <= device.usable, largest_length(mode, shape, work, device, sharing, sparse),
    )  # fmt: skip


def operations(mode: str, shape: ModelShape, work: Work, sparse: bool) -> tuple[float, float]:
    """(FLOPs of the model for one sequence, or one token in decode; bytes that attention must move at least).

    Decode's bytes are all it reads: weights, cache, block means. Recomputation is not counted.
    """
    full = times.full_layers(shape, work, sparse)
    if mode == "decode":
        count = counts.decode_counts(shape, work, full)
        return count.flops, count.weight_bytes + count.cache_bytes + count.means_bytes
    whole = Sharing()
    dense, moba = (times.layer_attention(shape, work, whole, s) for s in (False, True))
    layers = ((full, dense), (shape.layers - full, moba))
    linear = shape.layers * counts.linear_flops(shape, work.length)
    flops = sum(n * (c.forward_flops + c.gate_flops) for n, c in layers) + linear
    moved = float(sum(n * (c.forward_bytes + (c.gate_bytes if c.selections else 0)) for n, c in layers))
    if mode == "prefill":
        return flops + counts.head_flops(shape, 1), moved
    flops += sum(n * c.backward_flops for n, c in layers) + 2 * linear + 3 * counts.head_flops(shape, work.length)
    return flops, moved + sum(n * c.backward_bytes for n, c in layers)


def largest_length(mode: str, shape: ModelShape, work: Work, device: Device, sharing: Sharing, sparse: bool) -> int:
    """The longest sequence, in multiples of 1024 tokens, whose memory fits; 0 where none does. Time is no bound."""

    def fits(units: int) -> bool:
        return _MEMORY[mode](shape, work.at(1024 * units), sharing, device, sparse).total <= device.usable

    low, high = 0, 1
    while fits(high) and 1024 * high < _LONGEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 1024 * low


# ---- text ----------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """The plan as text: one line a quantity, dense beside MoBA."""
    work, sharing = plan.work, plan.sharing
    lines = [
        f"{plan.mode}: {plan.model.name}, {work.length:,} tokens, batch {work.batch}, block {work.block_size}, "
        f"top-{work.top_k}, {work.full_layers} full layers; predicted, not measured",
        f"{sharing.gpus} × {plan.device.name}: {sharing.sequence} sequence-parallel × {sharing.stages} stages × "
        f"{sharing.replicas} replicas; {_suggestion(plan)}",
        f"{'':42}{'dense':>14}{'moba':>14}",
    ]
    both = plan.columns
    lines.append(_line("operations", [_si(c.flops) for c in both], "FLOP"))
    lines.append(_line("least bytes", [_si(c.attention_bytes) for c in both], "B"))
    for part in both[0].seconds:
        if not any(c.seconds[part] for c in both):
            continue
        lines.append(_line(f"time: {part}", [f"{c.seconds[part]:.4g}" for c in both], "s"))
    lines.append(_line("time: all", [f"{sum(c.seconds.values()):.4g}" for c in both], "s"))
    lines.append(_line("tokens per second, all GPUs", [f"{c.tokens_per_second:,.0f}" for c in both]))
    for part in dict.fromkeys(part for c in both for part, size in c.memory.parts.items() if size):
        lines.append(_line(f"memory: {part}", [f"{c.memory.parts.get(part, 0) / GIB:.2f}" for c in both], "GiB"))
    lines.append(_line(f"memory: peak, {both[1].memory.moment}", [f"{c.memory.total / GIB:.2f}" for c in both], "GiB"))
    if any(c.memory.host for c in both):
        lines.append(_line("host memory, one GPU", [f"{c.memory.host / GIB:.2f}" for c in both], "GiB"))
    lines.append(_line(f"fits {plan.device.usable / GIB:.1f} GiB", ["yes" if c.fits else "no" for c in both]))
    lines.append(_line("largest length that fits", [f"{c.largest_length:,}" for c in both], "tokens"))
    if plan.mode != "decode":
        lines.append(f"MoBA's attention is faster from {_tokens(plan.crossover)} on")
    return "\n".join(lines)


def _suggestion(plan: Plan) -> str:
    if plan.suggested is None:
        return "no split of these GPUs fits; more GPUs, offloading, tiles, chunks or a shorter length are needed"
    return f"suggested: {plan.suggested.sequence} sequence-parallel ranks, {plan.suggested.stages} stages"


def _line(name: str, values: list[str], unit: str = "") -> str:
    return f"{name:42}" + "".join(f"{value:>14}" for value in values) + (f" {unit}" if unit else "")


def _si(number: float) -> str:
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.4g} {prefix}"
    return f"{number:.4g} "


def _tokens(number: int | None) -> str:
    return "no length up to 2^27 tokens" if number is None else f"{number:,} tokens"
