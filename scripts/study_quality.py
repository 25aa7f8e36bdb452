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
from collections.abc import Callable
from pathlib import Path

import continue_pretrain

FULL = [{"mode": "full"}]
LAST_THREE = [-3, -2, -1]


def blocks(block_size: int, top_k: int, full_attention_layers=()) -> dict:
    return {"block_size": block_size, "top_k": top_k, "full_attention_layers": list(full_attention_layers)}


# name -> arguments of continue_pretrain.py; a MoBA layer of every arm attends at most 1024 keys
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
        settings = {name: json.dumps(value) for name, value in ARMS[arm].items()}
        flags = {"config": options.config, "output_dir": folder, **settings}
        continue_pretrain.main([str(word) for name in flags for word in (f"--{name}", flags[name])] + further, load)
        gc.collect()  # the arm's model and its trainer name each other
    return folders


def loading_once() -> Callable:
    """`continue_pretrain.load_data`, whose result every further call returns again: no arm changes the text."""
    loaded = []

    def load(*arguments):
        if not loaded:
            loaded.append(continue_pretrain.load_data(*arguments))
        return loaded[0]

    return load


if __name__ == "__main__":
    main()
