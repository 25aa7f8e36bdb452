"""Recall: which share of full attention's mass the blocks hold that MoBA selects, by layer and head.

    python scripts/eval_recall.py --model_name_or_path runs/demo/model --length 2048
    python scripts/eval_recall.py --model_name_or_path my/model --dataset books/ --length 32768 --suggest 3

The model runs in full attention, and each layer's queries and keys are asked what MoBA would select. Layers with a low
recall lose most by it: --suggest of them are proposed as `full_attention_layers`, with the figures behind that. The
output folder gets

    recall.json   settings, recall of every layer and head, beside a sliding window's and the best possible one
    recall.png    heat map, and the means of the layers
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from moba_hf.evaluation import position_loss, recall
from moba_hf.evaluation.checkpoint import describe, load
from moba_hf.evaluation.evaluation_figures import recall_figure
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.modes import settings_of
from moba_hf.training.arguments import ModelArguments, model_location, parse
from moba_hf.training.run_folder import write_json
from moba_hf.training.sources import read_documents


@dataclass
class RecallArguments:
    """Which text, how much of it, and how many layers to suggest."""

    dataset: str = field(default="pydoc", metadata={"help": "File, folder, hub id, or pydoc."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    length: int = field(default=8192, metadata={"help": "Tokens per sequence."})
    sequences: int = field(default=4, metadata={"help": "Sequences measured."})
    queries: int = field(default=512, metadata={"help": "Queries looked at in each sequence, evenly spread."})
    suggest: int = field(default=3, metadata={"help": "Layers to suggest for full attention; the paper keeps three."})
    output_dir: str = field(default="runs/recall", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        for name in ("length", "sequences", "queries", "suggest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but was {getattr(self, name)}")


def main(argv: list[str] | None = None) -> dict:
    """Measure and draw; returns the report."""
    model_args, args = parse((ModelArguments, RecallArguments), argv, description=__doc__)
    documents = read_documents(args.dataset, text_column=args.text_column)
    model, tokenizer = load(
        model_location(model_args),
        longest=args.length,
        gguf_file=model_args.gguf_file,
        dtype=model_args.dtype,
        moba=model_args.moba,
    )
    tokens = (tokenizer(document, verbose=False)["input_ids"] for document in documents)
    sequences, _short = position_loss.full_length(tokens, args.length, args.sequences)
    rows = tqdm(sequences, desc="Recall", unit="sequence")
    measured = [recall.measure(model, row[None], settings_of(model), args.queries) for row in rows]
    layers = recall.average(measured)
    return report(layers, len(measured), describe(model, model_args.model_name_or_path, args), args)


def report(layers: dict[int, recall.Mass], number: int, settings: dict, args: RecallArguments) -> dict:
    """Write JSON and figure; print the suggestion and its ground."""
    folder = Path(args.output_dir)
    suggestion = recall.suggest(layers, args.suggest)
    result = {
        "settings": settings,
        "sequences": number,
        "suggestion": asdict(suggestion),
        "mean": {name: torch.stack([getattr(m, name) for m in layers.values()]).mean().item() for name in _KINDS},
        "layers": {n: {name: getattr(layers[n], name).tolist() for name in _KINDS} for n in sorted(layers)},
    }
    folder.mkdir(parents=True, exist_ok=True)
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
