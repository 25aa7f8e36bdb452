"""Train the arms of docs/quality.md: does a model that was converted to MoBA keep its quality?

    python scripts/study_quality.py                               # all of them, one after the other; needs a GPU
    python scripts/study_quality.py --arms full moba hybrid       # those that are done are left as they are
    python scripts/study_quality.py --arms full --config configs/smollm2-135m/quality.yaml --max_steps 20

Every arm is a run of scripts/continue_pretrain.py with the config and the settings named in `ARMS` below; what else is
given on the command line goes there too. All arms see the same text in the same order (another order where the seed
differs), which is tokenized and packed once. Each leaves its folder below --folder. An interrupted study goes on where
it was.
"""

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import continue_pretrain
import torch

from moba_hf.training.data import IGNORED

FULL = [{"mode": "full"}]
LAST_THREE = [-3, -2, -1]


def blocks(block_size: int, top_k: int, full_attention_layers=()) -> dict:
    return {"block_size": block_size, "top_k": top_k, "full_attention_layers": list(full_attention_layers)}


LOW_RATE, HIGH_RATE = {"learning_rate": 1.5e-4}, {"learning_rate": 1e-3}
MASKED = {
    "start": "moba", "answer": 1024, "learning_rate": 1e-4, "max_steps": 48, "warmup_steps": 4, "eval_steps": 12,
    "lr_scheduler_kwargs": {"num_decay_steps": 12, "decay_type": "linear", "min_lr_ratio": 0.0},
}  # fmt: skip

# name -> arguments of continue_pretrain.py, and two of our own: start, the arm whose weights it goes on from, and
# answer, the last positions of a sequence, which alone carry loss. A MoBA layer attends at most 1024 keys in every arm.
ARMS = {
    "full": {"moba": blocks(128, 8), "schedule": FULL},  # MoBA for the meter alone
    "moba": {"moba": blocks(128, 8)},
    "hybrid": {"moba": blocks(128, 8, LAST_THREE)},
    "switch": {"moba": blocks(128, 8), "schedule": [{"mode": "moba", "share": 0.9}, {"mode": "full"}]},
    "full-seed-1": {"moba": blocks(128, 8), "schedule": FULL, "seed": 1},
    "hybrid-seed-1": {"moba": blocks(128, 8, LAST_THREE), "seed": 1},
    "blocks-512": {"moba": blocks(512, 2)},
    "blocks-256": {"moba": blocks(256, 4)},
    "blocks-64": {"moba": blocks(64, 16)},
    "full-low-rate": {"moba": blocks(128, 8), "schedule": FULL, **LOW_RATE},
    "hybrid-low-rate": {"moba": blocks(128, 8, LAST_THREE), **LOW_RATE},
    "full-high-rate": {"moba": blocks(128, 8), "schedule": FULL, **HIGH_RATE},
    "hybrid-high-rate": {"moba": blocks(128, 8, LAST_THREE), **HIGH_RATE},
    **{f"masked-{last}": {"moba": blocks(128, 8, range(-last, 0)), **MASKED} for last in (0, 1, 3, 5, 10)},
    "masked-30": {"moba": blocks(128, 8), "schedule": FULL, **MASKED},
    "masked-full": {"moba": blocks(128, 8), "schedule": FULL, **MASKED, "start": "full"},
}


def main(argv: list[str] | None = None) -> list[Path]:
    """Run what is not done yet; returns the folders of the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2-135m/quality.yaml"))
    options, further = parser.parse_known_args(argv)
    load = loading_once()
    folders = [options.folder / arm for arm in options.arms]
    for arm, folder in zip(options.arms, folders):
        if (folder / "report.json").is_file():
            print(f"{arm}: done, {folder / 'report.json'}")
            continue
        print(f"{arm}: {ARMS[arm]}", flush=True)
        settings, loader = dict(ARMS[arm]), load
        if start := settings.pop("start", None):
            settings |= {"model_name_or_path": str(options.folder / start / "model"), "gguf_file": ""}
        if answer := settings.pop("answer", None):
            loader = answers_only(load, answer)
        flags = {"config": options.config, "output_dir": folder, **settings}
        words = [word for name, value in flags.items() for word in (f"--{name}", as_word(value))]
        continue_pretrain.main(words + further, loader)
        gc.collect()  # the arm's model and its trainer name each other
    return folders


def as_word(value) -> str:
    """As the command line takes it: JSON, but for texts and paths."""
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value)


def loading_once() -> Callable:
    """`continue_pretrain.load_data`, whose result every further call returns again: no arm changes the text."""
    loaded = []

    def load(*arguments):
        if not loaded:
            loaded.append(continue_pretrain.load_data(*arguments))
        return loaded[0]

    return load


def answers_only(load: Callable, positions: int) -> Callable:
    """A `load` whose training sequences carry loss at their last positions alone; held-out text stays as it is."""

    def load_masked(*arguments):
        held_out, rows, count = load(*arguments)
        return held_out, Answers(rows, positions), count

    return load_masked


@dataclass(frozen=True)
class Answers(torch.utils.data.Dataset):
    """Training sequences whose labels before the last `positions` are −100."""

    rows: Sequence[dict]
    positions: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        """input_ids and position_ids as they are; labels int64 [sequence_length]."""
        row = self.rows[number]
        labels = torch.tensor(row["labels"])
        labels[: -self.positions] = IGNORED
        return {**row, "labels": labels}


if __name__ == "__main__":
    main()
