"""Needle in a haystack: find one number in a long text, over a grid of lengths and depths, full and MoBA side by side.

    python scripts/eval_needle.py --model_name_or_path runs/demo/model --lengths 1024 2048 --depths 0 50 100
    python scripts/eval_needle.py --model_name_or_path my/1m-model --haystack essays/ --dtype bfloat16 \
        --batch_size 5 --prefill_chunk_size 65536

Without --lengths and --depths the grid is the paper's: 32 lengths to 1,024,000 tokens × 15 depths. The output folder
gets

    cells.jsonl     every answer as it came; started again, the script goes on after the last one
    needle.json     settings, every cell, and the table of each mode
    needle.png      the grids, from dark red (not found) to light green (found)

The haystack is a .txt or .md file, a folder of them, or pydoc: Python's own manual. It is repeated where it is too
short for a length. Like every script here it also takes --config FILE.yaml with any of the arguments below.
"""

from dataclasses import dataclass, field
from pathlib import Path

from evaluation_runs import PromptArguments, describe, open_checkpoint
from tqdm.auto import tqdm

from moba_hf.evaluation import needle
from moba_hf.evaluation.checkpoint import digest
from moba_hf.evaluation.evaluation_figures import needle_figure
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.modes import side_by_side
from moba_hf.evaluation.result_log import ResultLog
from moba_hf.training.arguments import ModelArguments, parse
from moba_hf.training.run_folder import write_json
from moba_hf.training.sources import read_documents


@dataclass
class NeedleArguments(PromptArguments):
    """The grid, and how it is run."""

    lengths: list[int] = field(
        default_factory=lambda: list(needle.PAPER_LENGTHS), metadata={"help": "Tokens of prompt and answer."}
    )
    depths: list[int] = field(
        default_factory=lambda: list(needle.PAPER_DEPTHS), metadata={"help": "Percent of the text before the needle."}
    )
    samples: int = field(default=1, metadata={"help": "Different numbers hidden per cell."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens the model may answer with."})
    seed: int = field(default=0, metadata={"help": "Another one hides other numbers."})
    haystack: str = field(default="pydoc", metadata={"help": "Text file, folder of text files, or pydoc."})
    output_dir: str = field(default="runs/needle", metadata={"help": "Folder of the results."})


# Cells of other lengths and depths, and more of them, may join the same log.
_NOT_IN_A_CELL = ("lengths", "depths", "samples", "batch_size", "prefill_chunk_size")


def main(argv: list[str] | None = None) -> dict:
    """Run the grid; returns the report."""
    model_args, args = parse((ModelArguments, NeedleArguments), argv, description=__doc__)
    grid = needle.Grid(tuple(args.lengths), tuple(args.depths), args.samples, args.new_tokens, args.seed)
    text = "\n\n".join(read_documents(args.haystack))
    needle.check_text(text)
    checkpoint = open_checkpoint(model_args, longest=max(grid.lengths))
    haystack = needle.Haystack(checkpoint.tokenizer(), text)
    haystack.check(grid)
    model = checkpoint.model()
    settings = {**describe(model, model_args, args), "text": digest(text)}
    folder = Path(args.output_dir)
    log = ResultLog(folder / "cells.jsonl", settings, leave_out=_NOT_IN_A_CELL)
    modes = side_by_side(model_args.dense_attention)
    done = len(asked_for(log.results, grid))
    with tqdm(total=len(modes) * len(list(grid.cells())), initial=done, desc="Needles", unit="cell") as bar:
        for added in needle.run(
            model,
            haystack,
            grid,
            modes,
            log,
            batch_size=args.batch_size,
            prefill_chunk_size=args.prefill_chunk_size,
        ):
            bar.update(added)
    settings = {name: value for name, value in settings.items() if name not in _NOT_IN_A_CELL}
    return report(folder, settings, haystack, grid, asked_for(log.results, grid), [mode.name for mode in modes])


def asked_for(results: list[dict], grid: needle.Grid) -> list[dict]:
    """Those of this grid: the log may hold more, of runs before."""
    cells = set(grid.cells())
    return [r for r in results if (r["length"], r["depth"], r["sample"]) in cells]


def report(folder: Path, settings: dict, haystack: needle.Haystack, grid: needle.Grid, results, modes) -> dict:
    """Write JSON and figure; say what was found."""
    tables = {mode: needle.table(results, mode, grid) for mode in modes}
    found = {mode: sum(map(sum, table)) / len(grid.depths) / len(grid.lengths) for mode, table in tables.items()}
    result = {
        "settings": settings,
        "lengths": grid.lengths,
        "depths": grid.depths,
        "samples": grid.samples,
        "haystack_tokens": haystack.tokens,
        "found": found,
        "tables": tables,
        "cells": results,
    }
    write_json(folder / "needle.json", result)
    title = f"Needle in a haystack ({settings['model']})"
    save(needle_figure(tables, grid.lengths, grid.depths, title=title), folder / "needle.png")
    for mode, share in found.items():
        print(f"{mode:<5} found {100 * share:.1f} % of the needles")
    print(f"Every cell: {folder / 'needle.json'}; figure: {folder / 'needle.png'}")
    return result


if __name__ == "__main__":
    main()
