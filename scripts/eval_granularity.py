"""Granularity: the loss at equal sparsity, with the sequence cut into few large blocks or many small ones.

    python scripts/eval_granularity.py --model_name_or_path runs/demo/model --length 2048
    python scripts/eval_granularity.py --model_name_or_path my/model --dataset books/ --length 32768

By default the five splits of the paper, all 75 % sparse: 2 of 8 blocks, 4 of 16, 8 of 32, 16 of 64, 32 of 128. Any
checkpoint will do: block size and top-k are set here. Layers that its settings keep in full attention stay so. The
output folder gets

    granularity.jsonl  every loss as it came; started again, the script goes on after the last one
    granularity.json   settings, mean and trailing loss of every split and of full attention
    granularity.png    the same as a figure
"""

from dataclasses import dataclass, field
from pathlib import Path

from evaluation_runs import LossArguments, describe, different, long_sequences, measure_losses, open_checkpoint

from moba_hf.evaluation import position_loss
from moba_hf.evaluation.evaluation_figures import granularity_figure
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.modes import MOBA, Mode
from moba_hf.evaluation.result_log import ResultLog
from moba_hf.training.arguments import ModelArguments, parse
from moba_hf.training.run_folder import write_json


@dataclass
class GranularityArguments(LossArguments):
    """Which splits, on which text."""

    splits: list[str] = field(
        default_factory=lambda: ["2/8", "4/16", "8/32", "16/64", "32/128"],
        metadata={"help": "Blocks taken / blocks there are, each."},
    )
    output_dir: str = field(default="runs/granularity", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        super().__post_init__()
        different(splits=self.splits)
        self.pairs = [split_of(text, self.length) for text in self.splits]


# More sequences and splits may join the same log; trailing positions are cut out of it.
_NOT_IN_A_LOSS = ("sequences", "splits", "trailing_tokens")


def split_of(text: str, length: int) -> tuple[int, int]:
    """(blocks taken, blocks there are) of "2/8". ValueError where that is no split of `length` tokens."""
    taken, _, blocks = text.partition("/")
    if not (taken.isdigit() and blocks.isdigit() and 1 <= int(taken) <= int(blocks)):
        raise ValueError(f"a split is blocks taken / blocks there are, as in 2/8, but was {text!r}")
    if length % int(blocks):
        raise ValueError(f"length {length} cannot be cut into {blocks} equal blocks (split {text})")
    return int(taken), int(blocks)


def main(argv: list[str] | None = None) -> dict:
    """Measure and draw; returns the report."""
    model_args, args = parse((ModelArguments, GranularityArguments), argv, description=__doc__)
    checkpoint = open_checkpoint(model_args, longest=args.length, needs_settings=False)
    sequences, short = long_sequences(args, checkpoint.tokenizer())
    modes = [Mode("full", model_args.dense_attention)]
    for text, (taken, blocks) in zip(args.splits, args.pairs, strict=True):
        modes.append(Mode(text, MOBA, {"block_size": args.length // blocks, "top_k": taken}))
    model = checkpoint.model()
    settings = describe(model, model_args, args)
    log = ResultLog(Path(args.output_dir) / "granularity.jsonl", settings, leave_out=_NOT_IN_A_LOSS)
    losses = measure_losses(model, sequences, modes, log, title="Granularity")
    return report(losses, short, settings, args)


def report(
    losses: dict[str, position_loss.HeldOutLoss], short: int, settings: dict, args: GranularityArguments
) -> dict:
    """Write JSON and figure; print the table."""
    folder = Path(args.output_dir)
    number = losses["full"].by_token.shape[0]
    summaries = {name: loss.summary(args.trailing_tokens) for name, loss in losses.items()}
    result = {
        "settings": settings,
        "sequences": number,
        "documents_too_short": short,
        "sparsity": {text: 1 - taken / blocks for text, (taken, blocks) in zip(args.splits, args.pairs, strict=True)},
        "loss": summaries,
    }
    write_json(folder / "granularity.json", result)
    figure = granularity_figure(
        args.pairs,
        {key: [summaries[text][key] for text in args.splits] for key in ("mean", "trailing")},
        summaries["full"],
        trailing_tokens=args.trailing_tokens,
        title=f"Granularity, {number} × {args.length} tokens ({settings['model']})",
    )
    save(figure, folder / "granularity.png")
    print(f"{'blocks':<8}{'mean':>8}{'last ' + str(args.trailing_tokens):>12}")
    for name, loss in summaries.items():
        print(f"{name:<8}{loss['mean']:>8.3f}{loss['trailing']:>12.3f}")
    print(f"Figures: {folder / 'granularity.json'}, {folder / 'granularity.png'}")
    return result


if __name__ == "__main__":
    main()
