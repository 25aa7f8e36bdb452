"""Loss by position and trailing loss of one checkpoint: full attention, MoBA, and a hybrid with some layers full.

    python scripts/eval_position_loss.py --model_name_or_path runs/demo/model --length 2048
    python scripts/eval_position_loss.py --model_name_or_path my/model --dataset books/ --length 32768 \
        --trailing_tokens 2048 --hybrid_layers -3 -2 -1

"moba" has every layer sparse, "hybrid" keeps --hybrid_layers in full attention. A document counts only where it fills
the whole length, as in the paper. The output folder gets

    position_loss.json   settings, trailing and mean loss, the curves, how many documents were too short
    position_loss.png    loss over the position, and what is added to the loss of full attention

The text is a file or folder (.txt, .md, .jsonl, .parquet), a hub data set, or pydoc: Python's own manual.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from moba_hf.evaluation import position_loss
from moba_hf.evaluation.checkpoint import describe, load
from moba_hf.evaluation.evaluation_figures import position_figure
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.modes import MOBA, Mode
from moba_hf.training.arguments import ModelArguments, model_location, parse
from moba_hf.training.run_folder import write_json
from moba_hf.training.sources import read_documents


@dataclass
class PositionLossArguments:
    """Which text, how much of it, and which layers the hybrid keeps full."""

    dataset: str = field(default="pydoc", metadata={"help": "File, folder, hub id, or pydoc."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    length: int = field(default=8192, metadata={"help": "Tokens per sequence."})
    sequences: int = field(default=8, metadata={"help": "Sequences measured."})
    trailing_tokens: int | None = field(
        default=None, metadata={"help": "Last positions that make the trailing loss; by default a quarter of length."}
    )
    window: int = field(default=256, metadata={"help": "Positions averaged for a point of the curve."})
    hybrid_layers: list[int] = field(
        default_factory=lambda: [-3, -2, -1], metadata={"help": "Layers the hybrid keeps in full attention."}
    )
    output_dir: str = field(default="runs/position_loss", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        if self.trailing_tokens is None:
            self.trailing_tokens = max(1, self.length // 4)
        for name, most in (
            ("length", None),
            ("sequences", None),
            ("trailing_tokens", self.length - 1),
            ("window", None),
        ):
            value = getattr(self, name)
            if value < 1 or (most is not None and value > most):
                raise ValueError(f"{name} must be at least 1{f' and at most {most}' if most else ''}, but was {value}")


def main(argv: list[str] | None = None) -> dict:
    """Measure and draw; returns the report."""
    model_args, args = parse((ModelArguments, PositionLossArguments), argv, description=__doc__)
    documents = read_documents(args.dataset, text_column=args.text_column)
    model, tokenizer = load(
        model_location(model_args),
        longest=args.length,
        gguf_file=model_args.gguf_file,
        dtype=model_args.dtype,
        moba=model_args.moba,
    )
    tokens = (tokenizer(document, verbose=False)["input_ids"] for document in documents)
    sequences, short = position_loss.full_length(tokens, args.length, args.sequences)
    modes = (
        Mode("full", model_args.dense_attention),
        Mode("moba", MOBA, {"full_attention_layers": ()}),
        Mode("hybrid", MOBA, {"full_attention_layers": tuple(args.hybrid_layers)}),
    )
    measured = position_loss.measure(model, sequences, modes)
    total = len(sequences) * len(modes)
    losses = position_loss.collect(tqdm(measured, total=total, desc="Position loss", unit="forward"))
    return report(losses, short, describe(model, model_args.model_name_or_path, args), args)


def report(
    losses: dict[str, position_loss.HeldOutLoss], short: int, settings: dict, args: PositionLossArguments
) -> dict:
    """Write JSON and figure; print the table."""
    folder = Path(args.output_dir)
    number = losses["full"].by_token.shape[0]
    result = {
        "settings": settings,
        "sequences": number,
        "documents_too_short": short,
        "loss": {mode: loss.summary(args.trailing_tokens) for mode, loss in losses.items()},
        "by_position": {mode: loss.by_position(args.window).tolist() for mode, loss in losses.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "position_loss.json", result)
    layers = ", ".join(map(str, args.hybrid_layers))
    names = {"full": "full attention", "moba": "MoBA", "hybrid": f"MoBA, layers {layers} full"}
    title = f"Loss by position, {number} × {args.length} tokens ({settings['model']})"
    save(position_figure(result["by_position"], args.window, names=names, title=title), folder / "position_loss.png")
    print(f"{'':<8}{'mean':>8}{'last ' + str(args.trailing_tokens):>12}")
    for mode, loss in result["loss"].items():
        print(f"{mode:<8}{loss['mean']:>8.3f}{loss['trailing']:>12.3f}")
    print(f"{number} sequences; {short} documents were shorter than {args.length} tokens and do not count.")
    print(f"Curves: {folder / 'position_loss.json'}; figure: {folder / 'position_loss.png'}")
    return result


if __name__ == "__main__":
    main()
