"""Tiles measured on the user's own GPU, in place of those of the fixed tables.

MOBA_HF_LAUNCH_SETTINGS names a file that `scripts/tune_kernels.py` wrote; without it nothing is read and nothing is
measured. The file is JSON, a list of

    {"capability": [9, 0], "dtype": "bfloat16", "head_dim": 128, "block_size": 128,
     "forward": {"gate": {"rows": 64, "keys": 64, "warps": 4, "stages": 1}, …}, "backward": {…}}

and is looked up by the four first: the kernels of any other shape, and those it does not name, keep the tables' tiles.
"""

import functools
import json
import os
from dataclasses import dataclass

import torch

VARIABLE = "MOBA_HF_LAUNCH_SETTINGS"
ROLES = {"forward": ("gate", "past", "own"), "backward": ("own_keys", "own_queries", "past_keys", "past_queries")}
_ALLOWED = {"rows": (16, 32, 64, 128, 256), "keys": (16, 32, 64, 128, 256), "warps": (1, 2, 4, 8, 16),
            "stages": (1, 2, 3, 4, 5)}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched: rows × keys per step of its loop, warps per program, `num_stages` of its loop.

    With n stages, loads run (n − 1) // 2 steps ahead where a step's addresses are loaded too (entries of a bucket),
    n − 1 elsewhere.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def tuned_tiles(
    direction: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int, block_size: int
) -> dict[str, Tile]:
    """Tiles by kernel, "forward" or "backward"; empty where the user points to no file or it is of other shapes.

    Raises ValueError for a file that is not what the tuner writes, OSError for one that cannot be read.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    found = _read(path).get((*capability, str(dtype).removeprefix("torch."), head_dim, block_size), {})
    return found.get(direction, {})


@functools.cache
def _read(path: str) -> dict[tuple, dict[str, dict[str, Tile]]]:
    """A file is read once; to change settings, name another."""
    with open(path) as file:
        try:
            records = json.load(file)
            return {
                (*r["capability"], r["dtype"], r["head_dim"], r["block_size"]): {
                    direction: {name: _tile(name, tile, roles) for name, tile in r.get(direction, {}).items()}
                    for direction, roles in ROLES.items()
                }
                for r in records
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{VARIABLE}={path!r} is not what scripts/tune_kernels.py writes: {what}") from error


def _tile(name: str, given: dict, roles: tuple[str, ...]) -> Tile:
    if name not in roles:
        raise ValueError(f"there is no kernel {name!r} beside {', '.join(roles)}")
    if set(given) != set(_ALLOWED):
        raise ValueError(f"{name} must have {', '.join(_ALLOWED)}, but has {', '.join(given)}")
    for field, allowed in _ALLOWED.items():
        if given[field] not in allowed:
            raise ValueError(f"{name}: {field} must be one of {allowed}, but was {given[field]!r}")
    return Tile(**given)
