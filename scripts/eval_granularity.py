"""Granularity: the loss at equal sparsity, with the sequence cut into few large blocks or many small ones.

    python scripts/eval_granularity.py --model_name_or_path runs/demo/model --length 2048
    python scripts/eval_granularity.py --model_name_or_path my/model --dataset books/ --length 32768

By default the five splits of the paper, all 75 % sparse: 2 of 8 blocks, 4 of 16, 8 of 32, 16 of 64, 32 of 128. Any
checkpoint will do: block size and top-k are set here. Layers that its settings keep in full attention stay so. The
output folder gets

    granularity.json   settings, mean and trailing loss of every split and of full attention
    granularity.png    the same as a figure
"""

from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from moba_hf.evaluation import position_loss
from moba_hf.evaluation.checkpoint import describe, load
from moba_hf.evaluation.evaluation_figures import granularity_figure
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.modes import MOBA, Mode
from moba_hf.training.arguments import ModelArguments, model_location, parse
from moba_hf.training.run_folder import write_json
from moba_hf.training.sources import read_documents


@dataclass
class GranularityArguments:
    """Which splits, on which text."""

    splits: list[str] = field(
        default_factory=lambda: ["2/8", "4/16", "8/32", "16/64", "32/128"],
        metadata={"help": "Blocks taken / blocks there are, each."},
    )
    dataset: str = field(default="pydoc", metadata={"help": "File, folder, hub id, or pydoc."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    length: int = field(default=8192, metadata={"help": "Tokens per sequence."})
    sequences: int = field(default=8, metadata={"help": "Sequences measured."})
    trailing_tokens: int | None = field(
        default=None, metadata={"help": "Last positions that make the trailing loss; by default a quarter of length."}
    )
    output_dir: str = field(default="runs/granularity", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        if self.trailing_tokens is None:
            self.trailing_tokens = max(1, self.length // 4)
        if not 1 <= self.trailing_tokens < self.length or self.sequences < 1:
            raise ValueError(
                f"sequences must be at least 1 and trailing_tokens between 1 and length − 1, but sequences was "
                f"{self.sequences}, trailing_tokens {self.trailing_tokens} and length {self.length}"
            )
        self.pairs = [split_of(text, self.length) for text in self.splits]


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
    documents = read_documents(args.dataset, text_column=args.text_column)
    model, tokenizer = load(
        model_location(model_args),
        longest=args.length,
        gguf_file=model_args.gguf_file,
        dtype=model_args.dtype,
        moba=model_args.moba,
        needs_settings=False,
    )
    tokens = (tokenizer(document, verbose=False)["input_ids"] for document in documents)
    sequences, short = position_loss.full_length(tokens, args.length, args.sequences)
    modes = [Mode("full", model_args.dense_attention)]
    for text, (taken, blocks) in zip(args.splits, args.pairs, strict=True):
        modes.append(Mode(text, MOBA, {"block_size": args.length // blocks, "top_k": taken}))
    measured = position_loss.measure(model, sequences, modes)
    total = len(sequences) * len(modes)
    losses = position_loss.collect(tqdm(measured, total=total, desc="Granularity", unit="forward"))
    return report(losses, short, describe(model, model_args.model_name_or_path, args), args)


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
    folder.mkdir(parents=True, exist_ok=True)
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
