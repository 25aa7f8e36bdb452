"""Predictions before a run: FLOPs, bytes, time and peak memory of prefill, decode and training, dense and MoBA.

shapes: what is planned; counts: FLOPs and bytes; devices: measured rates; times and memory: predictions; plans: all
of it for one mode, and as text.
"""

from .counts import AttentionCounts, dense_counts, linear_flops, moba_counts, selections_per_head
from .devices import DEVICES, GIB, RATES, Device, device_named
from .memory import Memory, decode_memory, prefill_memory, train_memory, train_moments
from .plans import MODES, Plan, make_plan, operations, table
from .shapes import CHECKPOINTING, DTYPE_BYTES, PRESETS, ModelShape, Sharing, Work, load_shape
from .times import attention_time, crossover, floor_time

__all__ = [
    "CHECKPOINTING", "DEVICES", "DTYPE_BYTES", "GIB", "MODES", "PRESETS", "RATES", "AttentionCounts", "Device",
    "Memory", "ModelShape", "Plan", "Sharing", "Work", "attention_time", "crossover", "decode_memory", "dense_counts",
    "device_named", "floor_time", "linear_flops", "load_shape", "make_plan", "moba_counts", "operations",
    "prefill_memory", "selections_per_head", "table", "train_memory", "train_moments",
]  # fmt: skip
