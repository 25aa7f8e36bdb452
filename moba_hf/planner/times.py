"""Predicted times: the counts over a device's rates. Nothing overlaps that is not said to."""

import math
from dataclasses import dataclass

from . import counts
from .counts import AttentionCounts
from .devices import Device
from .shapes import ModelShape, Sharing, Work

_OPTIMIZER_BYTES = {True: 28, False: 7}  # a parameter: mixed 7 float32 reads and writes; else 7 elements of `dtype`
_MOST_CROSSOVER = 1 << 27  # tokens: where the search for a crossover gives up


@dataclass(frozen=True)
class AttentionTime:
    """Seconds of one attention layer over one sequence, on one device."""

    select: float
    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.select + self.forward + self.backward


def attention_time(count: AttentionCounts, device: Device) -> AttentionTime:
    """select: FLOP / gate + selections · select_entry; forward and backward: FLOP / rate + selection bytes / gather.

    Each at least its least bytes over the copy rate and, for MoBA, the time of its launches.
    """
    if not count.selections:
        forward = max(count.forward_flops / device.dense_rate(count.length), count.forward_bytes / device.copy)
        backward = max(count.backward_flops / device.dense_backward, count.backward_bytes / device.copy)
        return AttentionTime(0.0, forward, backward)
    select = count.gate_flops / device.gate + count.selections * device.select_entry
    forward = count.forward_flops / device.forward + count.selection_forward_bytes / device.gather
    backward = count.backward_flops / device.backward + count.selection_backward_bytes / device.gather_backward
    return AttentionTime(
        max(select, count.gate_bytes / device.copy, device.launch_select),
        max(forward, count.forward_bytes / device.copy, device.launch_forward),
        max(backward, count.backward_bytes / device.copy, device.launch_backward),
    )


def floor_time(count: AttentionCounts, flops: float = 650e12, bandwidth: float = 3.0e12) -> AttentionTime:
    """The floor of the design's table: FLOPs at `flops`, bytes at `bandwidth`, whichever is longer, stage by stage.

    The means are a stage of their own: K is read before the gate can begin.
    """
    queries = count.gate_bytes - count.key_bytes
    select = count.key_bytes / bandwidth + max(count.gate_flops / flops, queries / bandwidth)
    forward = max(count.forward_flops / flops, count.forward_bytes / bandwidth)
    return AttentionTime(select, forward, max(count.backward_flops / flops, count.backward_bytes / bandwidth))


@dataclass(frozen=True)
class Times:
    """Seconds by part; `total` is their sum. One step over `batch` sequences, on the GPUs of one group."""

    attention: float
    linear: float
    elementwise: float
    head: float
    communication: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum((self.attention, self.linear, self.elementwise, self.head, self.communication, self.optimizer))


def layer_attention(shape: ModelShape, work: Work, sharing: Sharing, sparse: bool) -> AttentionCounts:
    """Counts of one layer on one rank: the whole sequence, its share of the heads."""
    heads, kv_heads = sharing.local_heads(shape)
    count = counts.moba_counts if sparse else counts.dense_counts
    return count(heads, kv_heads, shape.head_dim, work)


def full_layers(shape: ModelShape, work: Work, sparse: bool) -> int:
    """Layers in full attention. ValueError where the model has fewer than asked for."""
    if work.full_layers > shape.layers:
        raise ValueError(f"full_layers is {work.full_layers}, but {shape.name} has {shape.layers} layers")
    return work.full_layers if sparse else shape.layers


def prefill_time(shape: ModelShape, work: Work, sharing: Sharing, device: Device, sparse: bool) -> Times:
    """One prompt. With stages, chunks follow each other without bubbles (assumed): the time is divided by them.

    Split weights are gathered once a chunk.
    """
    full = full_layers(shape, work, sparse)
    dense, moba = (attention_time(layer_attention(shape, work, sharing, s), device) for s in (False, True))
    attention = full * dense.forward + (shape.layers - full) * (moba.select + moba.forward)
    share = work.batch / sharing.stages
    chunks = math.ceil(work.length / work.prefill_chunk) if work.prefill_chunk else 1
    tokens = work.length / sharing.sequence
    return Times(
        share * attention,
        share * shape.layers * counts.linear_flops(shape, tokens) / device.matmul,
        share * shape.layers * counts.elementwise_bytes(shape, tokens, work.item) / device.copy,
        work.batch * counts.head_flops(shape, 1) / device.matmul,
        share * shape.layers * _ulysses_seconds(shape, work, sharing, device)
        + chunks * _gather_seconds(shape, work, sharing, device, sharing.sequence),
    )


def train_time(shape: ModelShape, work: Work, sharing: Sharing, device: Device, sparse: bool) -> Times:
    """One step: forward, backward (twice the forward's products; attention 2.5 times), the forward again where
    activations are checkpointed, and the optimizer over this GPU's share."""
    full = full_layers(shape, work, sparse)
    dense, moba = (attention_time(layer_attention(shape, work, sharing, s), device) for s in (False, True))
    routed = shape.layers - full
    forward = full * dense.forward + routed * (moba.select + moba.forward)
    backward = full * dense.backward + routed * moba.backward
    forwards = 1 if work.checkpointing == "none" else 2
    tokens = work.length / sharing.sequence
    linear = shape.layers * counts.linear_flops(shape, tokens) / device.matmul
    touched = _OPTIMIZER_BYTES[work.mixed] * (1 if work.mixed else work.item) * shape.parameters / sharing.gpus
    return Times(
        work.batch * (forwards * forward + backward),
        work.batch * (forwards + 2) * linear,
        work.batch * (forwards + 2) * shape.layers * counts.elementwise_bytes(shape, tokens, work.item) / device.copy,
        work.batch * 3 * counts.head_flops(shape, tokens) / device.matmul,
        work.batch * (forwards + 1) * shape.layers * _ulysses_seconds(shape, work, sharing, device)
        + (forwards + 2) * _gather_seconds(shape, work, sharing, device, sharing.gpus),
        touched / device.copy,
    )


def decode_time(shape: ModelShape, work: Work, sharing: Sharing, device: Device, sparse: bool) -> float:
    """Seconds of one new token: weights once for the whole batch, each sequence's cache once, all at the copy rate.

    The ranks of a stage work side by side, stages one after the other; KV heads that are replicated are read by each.
    """
    full = full_layers(shape, work, sparse)
    count = counts.decode_counts(shape, work, full)
    heads, kv_heads = sharing.local_heads(shape)
    cache = (count.cache_bytes + count.means_bytes) * kv_heads / shape.kv_heads
    reading = (count.weight_bytes / sharing.sequence + work.batch * cache) / device.copy
    return max(reading, work.batch * count.flops * heads / shape.heads / device.matmul)


def _bandwidth(ranks: int, device: Device) -> float:
    return device.link if ranks <= device.node else device.network


def _ulysses_seconds(shape: ModelShape, work: Work, sharing: Sharing, device: Device) -> float:
    """Two all-to-alls of one layer's forward: query, key, value one way, the output back; no overlap assumed."""
    if sharing.sequence == 1:
        return 0.0
    _, kv_heads = sharing.local_heads(shape)
    rows = work.length / sharing.sequence * shape.head_dim * work.item
    sent = rows * (2 * shape.heads + 2 * kv_heads * sharing.sequence) * (1 - 1 / sharing.sequence)
    return sent / _bandwidth(sharing.sequence, device)


def _gather_seconds(shape: ModelShape, work: Work, sharing: Sharing, device: Device, ranks: int) -> float:
    """Every weight of a stage sent to every rank once (FSDP); a reduce-scatter of gradients is as much."""
    if ranks == 1:
        return 0.0
    return shape.parameters / sharing.stages * work.item * (1 - 1 / ranks) / _bandwidth(ranks, device)


def crossover(shape: ModelShape, work: Work, device: Device, training: bool) -> int | None:
    """The shortest length from which one MoBA layer is faster than a dense one; None where none is found.

    training: forward and backward together. The search starts where MoBA begins to leave anything out.
    """
    alone = Sharing()

    def faster(length: int) -> bool:
        dense, moba = (
            attention_time(layer_attention(shape, work.at(length), alone, sparse), device) for sparse in (False, True)
        )
        return moba.both < dense.both if training else moba.select + moba.forward < dense.forward

    low, high = work.block_size * work.top_k, work.block_size * work.top_k + 1
    while not faster(high):
        low, high = high, 2 * high
        if high > _MOST_CROSSOVER:
            return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high
