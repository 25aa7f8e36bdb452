"""`moba-hf doctor`: what is installed, what runs here and what would take a given shape."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict

import torch

from .config import ENGINES
from .ops import engine_status, inspection

_PACKAGES = ("moba_hf", "torch", "triton", "transformers", "accelerate", "datasets", "flash-attn", "flash-attn-4",
             "kernels", "deepspeed", "liger-kernel", "trl", "lm-eval")  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand: the shape that is asked about, and what the exit code stands for."""
    for name, value in (("length", 131072), ("block-size", 4096), ("top-k", 12), ("heads", 32), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    parser.add_argument("--engine", choices=ENGINES, help="the exit code says whether this engine runs here")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report. 0 where an engine other than the reference runs, or, with --engine, where that one does."""
    found = report(options)
    print(json.dumps(found, indent=1) if options.json else as_text(found))
    engines = found["engines"]
    if options.engine in (None, "auto"):
        return 0 if any(engine["available"] for name, engine in engines.items() if name != "reference") else 1
    if not engines[options.engine]["available"]:
        print(f"engine {options.engine!r}: {engines[options.engine]['reason']}", file=sys.stderr)
        return 1
    return 0


def report(options: argparse.Namespace) -> dict:
    """Everything the command says, as plain values."""
    dtype = getattr(torch, options.dtype)
    cuda = [_cuda_device(i) for i in range(torch.cuda.device_count())]
    device = options.device or ("cuda" if cuda else "cpu")
    shape = {name: getattr(options, name) for name in
             ("length", "block_size", "top_k", "heads", "kv_heads", "head_dim", "dtype")}  # fmt: skip
    name, reason = _automatic(device, dtype, options, bool(cuda))
    capability = tuple(cuda[0]["capability"]) if cuda else (9, 0)
    where = (capability, dtype, options.head_dim, options.block_size)
    settings = inspection.launch_settings(*where)
    source = inspection.tuned_launch_settings(*where) if settings else None
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [_cpu(), *cuda],
        "engines": {name: asdict(status) for name, status in engine_status().items()},
        "providers": inspection.providers(dtype, options.head_dim),
        "auto": {"device": device, "shape": shape, "engine": name, "reason": reason},
        "launch_settings": {
            "capability": list(capability),
            "here": bool(cuda),
            "source": source,
            "settings": settings,
        },
    }


def _automatic(device: str, dtype: torch.dtype, options, has_cuda: bool) -> tuple[str | None, str]:
    if options.heads % options.kv_heads:
        return None, f"{options.heads} heads are not a multiple of {options.kv_heads} KV heads"
    if device == "cuda" and not has_cuda:
        return None, "PyTorch sees no CUDA device here"
    shape = (options.head_dim, options.length, options.block_size, options.top_k)
    return inspection.automatic_engine(device, dtype, *shape)


def as_text(found: dict) -> str:
    """The report as lines of three columns."""
    lines = [f"{'python':<14}{found['python']}"]
    lines += [f"{package:<14}{version or 'not installed'}" for package, version in found["packages"].items()]
    lines.append(f"{'cuda':<14}{found['cuda'] or 'this PyTorch is built without it'}")
    for device in found["devices"]:
        capability = ", compute capability {}.{}".format(*device["capability"]) if device["capability"] else ""
        lines.append(f"{'device':<14}{device['name']}, {device['memory'] / 2**30:.1f} GiB{capability}")
    for name, status in found["engines"].items():
        lines.append(f"{'engine':<14}{name:<11}{'runs' if status['available'] else 'not here: ' + status['reason']}")
    for name, reason in found["providers"].items():
        lines.append(f"{'flash kernels':<14}{name:<11}{'run' if reason is None else 'not here: ' + reason}")
    auto = found["auto"]
    shape = ", ".join(f"{name} {value}" for name, value in auto["shape"].items())
    lines.append(f"{'auto':<14}{auto['engine'] or 'nothing'} on {auto['device']} for {shape}: {auto['reason']}")
    return "\n".join(lines + _settings_lines(found["launch_settings"]))


def _settings_lines(launch: dict) -> list[str]:
    if launch["settings"] is None:
        return [f"{'kernels':<14}no launch settings: triton is not installed; pip install 'moba_hf[triton]'"]
    where = "sm_{}{}".format(*launch["capability"]) + ("" if launch["here"] else ", were there one")
    lines = [f"{'kernels':<14}launch settings: {launch['source']}"]
    for direction, settings in launch["settings"].items():
        for kernel, tile in settings.items():
            value = " ".join(f"{k} {v}" for k, v in tile.items()) if isinstance(tile, dict) else tile
            lines.append(f"{'kernels':<14}{direction} {kernel}: {value} ({where})")
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"name": f"cpu, {torch.get_num_threads()} threads", "memory": memory, "capability": None}


def _cuda_device(index: int) -> dict:
    properties = torch.cuda.get_device_properties(index)
    capability = [properties.major, properties.minor]
    return {"name": properties.name, "memory": properties.total_memory, "capability": capability}
