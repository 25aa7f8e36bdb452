"""Imports go strictly downward; heavy packages stay where they belong; files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "moba_hf"

# Who may import whom inside the package, by the first path parts; the longest match wins.
ALLOWED = {
    "config": set(),
    "ops": {"ops"},
    "ops.engines": {
        "ops.blocks",
        "ops.kernels",
        "ops.engines.softmax_merge",
        "ops.engines.tiles",
        "ops.engines.flash_plan",
        "ops.engines.flash_providers",
        "ops.engines.gradient_sums",
    },
    "ops.kernels": {"ops.blocks", "ops.kernels"},
    "integration": {"ops", "config", "integration"},
    "evaluation": {"ops", "config", "evaluation"},
    "planner": {"ops", "config", "planner"},
    "training": {"ops", "config", "integration", "evaluation", "planner", "training"},
    "cli": {"ops", "config", "integration", "evaluation", "planner", "doctor", "cli", "__init__"},
    "doctor": {"ops", "config"},
    "__init__": {"ops", "config", "integration"},
}
# of ops, its public names alone
PUBLIC_ONLY = {"integration", "evaluation", "planner", "training", "doctor", "cli", "__init__"}
ONLY_IN = {  # external packages and the files that may import them
    "triton": ("ops/kernels/", "ops/engines/triton.py"),
    "flash_attn": ("ops/engines/flash_providers.py",),
    "flash_attn_interface": ("ops/engines/flash_providers.py",),
    "kernels": ("ops/engines/flash_providers.py",),
    "transformers": ("integration/", "training/", "evaluation/", "planner/", "cli.py"),
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path):
    """(dotted names imported from the package, top names of other packages) of a file, wherever it imports them."""
    package = ["moba_hf", *path.relative_to(PACKAGE).parts[:-1]]
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            full = [f"{module}.{alias.name}" for alias in node.names] if node.level or "moba_hf" in module else [module]
        else:
            continue
        for name in full:
            (inside if name.startswith("moba_hf") else outside).add(
                name.removeprefix("moba_hf.").removeprefix("moba_hf")
            )
    return inside, {name.split(".")[0] for name in outside}


def floor_of(name: str) -> str:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in ALLOWED:
            return ".".join(parts[:end])
    raise AssertionError(f"{name} stands on no floor: give it one in ALLOWED")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    floor = floor_of(name_of(path))
    inside, outside = imports(path)
    for name in inside:
        assert any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED[floor]) or not name, (
            f"{name_of(path)} may not import {name}"
        )
        if floor in PUBLIC_ONLY and name.startswith("ops"):
            assert name.count(".") == 1, f"{name_of(path)} reaches into {name}; use the public names of moba_hf.ops"
    relative = str(path.relative_to(PACKAGE))
    for package, places in ONLY_IN.items():
        assert package not in outside or relative.startswith(places), f"{relative} may not import {package}"


def test_engines_import_neither_routing_nor_each_other():
    for path in (PACKAGE / "ops" / "engines").glob("*.py"):
        inside, _ = imports(path)
        assert not any(name.startswith("ops.routing") for name in inside), path.name


@pytest.mark.parametrize("path", MODULES + sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_files_and_functions_stay_small(path):
    assert len(path.read_text().splitlines()) < 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            length = node.end_lineno - node.lineno + 1
            assert length < (120 if jitted else 60), f"{node.name} has {length} lines"


def test_public_names_are_documented():
    import moba_hf

    assert sorted(moba_hf.__all__) == moba_hf.__all__
    for name in moba_hf.__all__:
        assert getattr(moba_hf, name).__doc__, name


def seconds(code: str) -> float:
    """The least of three fresh processes without any optional package; code prints what it took."""
    missing = "import sys; sys.modules.update(dict.fromkeys(('triton', 'flash_attn', 'deepspeed', 'kernels')))"
    missing += "; sys.modules.update(dict.fromkeys(('accelerate', 'datasets')))"
    command = [sys.executable, "-c", f"{missing}\nimport time, transformers\n{code}"]
    return min(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3))


def test_import_is_as_light_as_that_of_transformers():
    """It imports no PyTorch, as Transformers' does not."""
    took = seconds(
        "start = time.perf_counter(); import moba_hf; took = time.perf_counter() - start\n"
        "assert 'torch' not in sys.modules; print(took)"
    )
    assert took < 0.2, took


def test_import_adds_little_to_that_of_a_model():
    """With all that registration has to write to, and all of our own attention."""
    took = seconds(
        "from transformers import PreTrainedModel\n"
        "from transformers.generation.continuous_batching import ContinuousBatchingManager\n"
        "start = time.perf_counter(); import moba_hf; moba_hf.MobaCache; print(time.perf_counter() - start)"
    )
    assert took < 0.2, took
