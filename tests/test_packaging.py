"""Wheel and sdist: what they say, what they hold, and that the wheel works where nothing else of this repository is."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import moba_hf

ROOT = Path(__file__).parent.parent
SMOKE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import moba_hf

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, moba={"block_size": 4, "top_k": 2},
)
ids = torch.arange(24)[None]
config._attn_implementation = "moba"
sparse = LlamaForCausalLM(config).eval()
with torch.no_grad():
    found = sparse(ids).logits
    sparse.set_attn_implementation("sdpa")
    full = sparse(ids).logits
assert found.isfinite().all() and torch.allclose(found[:, :8], full[:, :8], atol=1e-5)
assert not torch.allclose(found, full, atol=1e-5)
print(moba_hf.__file__)
"""


def run(*command, **how) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, built from the working tree."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


INFO = f"moba_hf-{moba_hf.__version__}.dist-info"


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(contents(wheel)[f"{INFO}/METADATA"].decode())


def test_metadata_is_complete(wheel, metadata):
    files = contents(wheel)
    assert (metadata["Name"], metadata["Version"]) == ("moba_hf", moba_hf.__version__)
    assert metadata["Author"] == "The moba_hf contributors"
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    assert files[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "MoBA" in metadata["Summary"] and "MoBA" in metadata["Keywords"]
    assert any("arxiv.org/abs/2502.13189" in url for url in metadata.get_all("Project-URL"))
    assert "[console_scripts]\nmoba-hf = moba_hf.cli:main" in files[f"{INFO}/entry_points.txt"].decode()


def test_python_versions_agree(metadata):
    """Requires-Python and the classifiers name the same ones."""
    allowed = SpecifierSet(metadata["Requires-Python"])
    prefix = "Programming Language :: Python :: 3."
    named = {c.removeprefix(prefix) for c in metadata.get_all("Classifier") if c.startswith(prefix)}
    assert named == {str(minor) for minor in range(30) if f"3.{minor}.0" in allowed} == {"10", "11", "12", "13"}


def test_the_eval_extra_brings_what_lm_evals_ruler_imports(metadata):
    """Without its extra "ruler" (nltk, wonderwords), `moba-hf lm-eval --tasks niah_single_1` stops at an import."""
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    (lm_eval,) = (one for one in wanted if one.name == "lm-eval")
    assert lm_eval.extras == {"hf", "ruler"}


def test_extras_lean_on_extras_that_exist(metadata):
    requirements = list(map(Requirement, metadata.get_all("Requires-Dist")))
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"train", "sft", "eval", "notebooks", "deepspeed", "liger", "triton", "dev"} == extras
    for requirement in requirements:
        if requirement.name == "moba_hf":
            assert requirement.extras <= extras, requirement
    needed = {r.name for r in requirements if r.marker is None}
    assert needed == {"torch", "transformers", "numpy", "safetensors"}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    files = {name for name in contents(wheel) if ".dist-info/" not in name}
    present = (path for path in (ROOT / "moba_hf").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert files == {path.relative_to(ROOT).as_posix() for path in present}


def test_sdist_builds_the_same_wheel(built, wheel, tmp_path):
    """The sdist alone is enough, and nothing of the working tree slips into a wheel past it."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        top = {Path(name).parts[1] for name in archive.getnames()}
    assert top >= {"moba_hf", "tests", "configs", "docs", "notebooks", "scripts", "Makefile", "constraints.txt"}
    assert not top & {"runs", ".git", ".venv", "dist"}
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *offline, sdist, "-w", tmp_path)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name and contents(again) == contents(wheel)


def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """Installed without this repository; what it depends on is lent by the environment that runs the tests."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    (packages,) = (tmp_path / "venv").rglob("site-packages")
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "lent.pth").write_text("\n".join(lent))
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outside = {"cwd": empty, "env": environment}
    assert Path(run(python, "-c", SMOKE, **outside).strip()).is_relative_to(packages)
    doctor = run(programs / "moba-hf", "doctor", **outside)
    assert re.search(rf"^moba_hf +{moba_hf.__version__}$", doctor, re.M)
    assert not list(empty.iterdir())
