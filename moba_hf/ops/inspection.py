"""What would compute a given shape on this machine, and how; nothing is computed here."""

import dataclasses
import importlib.util
import os

import torch

from . import engines
from .engines import flash_providers


def automatic_engine(
    device: str, dtype: torch.dtype, head_dim: int, length: int, block_size: int, top_k: int
) -> tuple[str, str]:
    """(name, reason): what engine="auto" takes for sequences of `length` tokens; "dense" where the blocks cover all."""
    if block_size * top_k >= length:
        return "dense", f"block_size · top_k = {block_size * top_k} covers all {length} tokens: MoBA is full attention"
    name = engines.choose("auto", device, dtype, block_size, head_dim)
    if device != "cuda":
        return name, f"on {device!r} it is the fastest that runs"
    flash = engines.load("flash").provider_name(device, dtype, head_dim)
    return name, f"FlashAttention kernels: {flash or 'none that fit'}; Triton: {_reason('triton') or 'runs'}"


def _reason(engine: str) -> str:
    return engines.status()[engine].reason


def providers(dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """The flash engine's kernels on this machine's GPU: None where they run for such tensors, else why not."""
    return flash_providers.status(dtype, head_dim)


def launch_settings(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, block_size: int
) -> dict[str, dict] | None:
    """The Triton kernels' launch settings in force on a GPU of that compute capability; None without triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .kernels.backward_settings import backward_settings
    from .kernels.forward_settings import forward_settings

    shape = (capability, dtype, head_dim, block_size)
    return {
        "forward": dataclasses.asdict(forward_settings(*shape)),
        "backward": dataclasses.asdict(backward_settings(*shape)),
    }


def tuned_launch_settings(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Where those settings come from: the fixed table, or the file that MOBA_HF_LAUNCH_SETTINGS names."""
    from .kernels.tuned_tiles import ROLES, VARIABLE, tuned_tiles

    found = [role for direction in ROLES for role in tuned_tiles(direction, capability, dtype, head_dim, block_size)]
    path = os.environ.get(VARIABLE)
    if not path:
        return "the fixed table"
    return f"{path}: {', '.join(found)}" if found else f"the fixed table; {path} has none for this shape"
