"""Recall: which share of full attention's mass the blocks hold that MoBA selects, by layer and head.

    python scripts/eval_recall.py --model_name_or_path runs/demo/model --length 2048
    python scripts/eval_recall.py --model_name_or_path my/model --dataset books/ --length 32768 --suggest 3

The model runs in full attention, and each layer's queries and keys are asked what MoBA would select. Layers with a low
recall lose most by it: --suggest of them are proposed as `full_attention_layers`, with the figures behind that. The
output folder gets

    recall.jsonl  every sequence as it came; started again, the script goes on after the last one
    recall.json   settings, recall of every layer and head, beside a sliding window's and the best possible one
    recall.png    heat map, and the means of the layers
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from evaluation_runs import TextArguments, at_least, describe, long_sequences, open_checkpoint
from tqdm.auto import tqdm

from moba_hf.evaluation import recall
from moba_hf.evaluation.checkpoint import digest
from moba_hf.evaluation.evaluation_figures import recall_figure
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.result_log import ResultLog
from moba_hf.training.arguments import ModelArguments, parse
from moba_hf.training.run_folder import write_json


@dataclass
class RecallArguments(TextArguments):
    """Which text, how much of it, and how many layers to suggest."""

    sequences: int = field(default=4, metadata={"help": "Sequences measured."})
    queries: int = field(default=512, metadata={"help": "Queries looked at in each sequence, evenly spread."})
    suggest: int = field(default=3, metadata={"help": "Layers to suggest for full attention; the paper keeps three."})
    output_dir: str = field(default="runs/recall", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        super().__post_init__()
        at_least(1, queries=self.queries, suggest=self.suggest)


# More sequences may join the same log; the suggestion is made of it.
_NOT_IN_A_RECALL = ("sequences", "suggest")


def main(argv: list[str] | None = None) -> dict:
    """Measure and draw; returns the report."""
    model_args, args = parse((ModelArguments, RecallArguments), argv, description=__doc__)
    checkpoint = open_checkpoint(model_args, longest=args.length)
    recall.sparse_from(checkpoint.settings, args.length)
    recall.check_number(args.suggest, checkpoint.full_causal_layers)
    sequences, _short = long_sequences(args, checkpoint.tokenizer())
    model = checkpoint.model()
    settings = describe(model, model_args, args)
    log = ResultLog(Path(args.output_dir) / "recall.jsonl", settings, leave_out=_NOT_IN_A_RECALL)
    rows = {digest(row.tolist()): row for row in sequences}
    done = {result["sequence"] for result in log.results}
    for name in tqdm([name for name in rows if name not in done], desc="Recall", unit="sequence"):
        layers = recall.measure(model, rows[name][None], checkpoint.settings, args.queries)
        log.add([{"sequence": name, "layers": recall.to_dict(layers)}])
    measured = [recall.from_dict(result["layers"]) for result in log.results if result["sequence"] in rows]
    return report(recall.average(measured), len(measured), settings, args)


def report(layers: dict[int, recall.Mass], number: int, settings: dict, args: RecallArguments) -> dict:
    """Write JSON and figure; print the suggestion and its ground."""
    folder = Path(args.output_dir)
    suggestion = recall.suggest(layers, args.suggest)
    result = {
        "settings": settings,
        "sequences": number,
        "suggestion": asdict(suggestion),
        "mean": {name: torch.stack([getattr(m, name) for m in layers.values()]).mean().item() for name in _KINDS},
        "layers": recall.to_dict(layers),
    }
    write_json(folder / "recall.json", result)
    moba = settings["moba"]
    title = f"Recall at {args.length} tokens, block {moba['block_size']}, top-{moba['top_k']} ({settings['model']})"
    save(recall_figure(layers, suggestion.layers, title=title), folder / "recall.png")
    means = ", ".join(f"{name} {share:.3f}" for name, share in result["mean"].items())
    print(f"Share of full attention's mass, mean of all layers and heads: {means}")
    print(f"Suggested full_attention_layers: {list(suggestion.layers)}\nGround: {suggestion.ground}")
    print(f"Figures: {folder / 'recall.json'}, {folder / 'recall.png'}")
    return result


_KINDS = ("selected", "recent", "best")


if __name__ == "__main__":
    main()
