"""Loss by position and trailing loss of one checkpoint: full attention, MoBA, and a hybrid with some layers full.

    python scripts/eval_position_loss.py --model_name_or_path runs/demo/model --length 2048
    python scripts/eval_position_loss.py --model_name_or_path my/model --dataset books/ --length 32768 \
        --trailing_tokens 2048 --hybrid_layers -3 -2 -1

"moba" has every layer sparse, "hybrid" keeps --hybrid_layers in full attention. A document counts only where it fills
the whole length, as in the paper. The output folder gets

    position_loss.jsonl  every loss as it came; started again, the script goes on after the last one
    position_loss.json   settings, trailing and mean loss, the curves, how many documents were too short
    position_loss.png    loss over the position, and what is added to the loss of full attention

The text is a file or folder (.txt, .md, .jsonl, .parquet), a hub data set, or pydoc: Python's own manual.
"""

from dataclasses import dataclass, field
from pathlib import Path

from evaluation_runs import LossArguments, at_least, describe, long_sequences, measure_losses, open_checkpoint

from moba_hf.evaluation import position_loss
from moba_hf.evaluation.evaluation_figures import position_figure
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.modes import MOBA, Mode
from moba_hf.evaluation.result_log import ResultLog
from moba_hf.training.arguments import ModelArguments, parse
from moba_hf.training.run_folder import write_json


@dataclass
class PositionLossArguments(LossArguments):
    """Which text, how much of it, and which layers the hybrid keeps full."""

    window: int = field(default=256, metadata={"help": "Positions averaged for a point of the curve."})
    hybrid_layers: list[int] = field(
        default_factory=lambda: [-3, -2, -1], metadata={"help": "Layers the hybrid keeps in full attention."}
    )
    output_dir: str = field(default="runs/position_loss", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        super().__post_init__()
        at_least(1, window=self.window)


# More sequences may join the same log; trailing positions and windows are cut out of it.
_NOT_IN_A_LOSS = ("sequences", "trailing_tokens", "window")


def main(argv: list[str] | None = None) -> dict:
    """Measure and draw; returns the report."""
    model_args, args = parse((ModelArguments, PositionLossArguments), argv, description=__doc__)
    checkpoint = open_checkpoint(model_args, longest=args.length)
    check_layers(args.hybrid_layers, checkpoint.config.get_text_config(decoder=True).num_hidden_layers)
    sequences, short = long_sequences(args, checkpoint.tokenizer())
    modes = (
        Mode("full", model_args.dense_attention),
        Mode("moba", MOBA, {"full_attention_layers": ()}),
        Mode("hybrid", MOBA, {"full_attention_layers": tuple(args.hybrid_layers)}),
    )
    model = checkpoint.model()
    settings = describe(model, model_args, args)
    log = ResultLog(Path(args.output_dir) / "position_loss.jsonl", settings, leave_out=_NOT_IN_A_LOSS)
    losses = measure_losses(model, sequences, modes, log, title="Position loss")
    return report(losses, short, settings, args)


def check_layers(hybrid_layers: list[int], layers: int) -> None:
    """ValueError where the model has no such layers."""
    if wrong := [layer for layer in hybrid_layers if not -layers <= layer < layers]:
        raise ValueError(
            f"hybrid_layers must lie in {-layers} … {layers - 1} (the model has {layers} layers), but had {wrong}"
        )


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
