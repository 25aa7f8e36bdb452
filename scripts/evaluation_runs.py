"""What the evaluation scripts share: arguments, checks that come before any work, what a report says of a run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moba_hf.evaluation import position_loss
from moba_hf.evaluation.checkpoint import Checkpoint, weights_digest
from moba_hf.evaluation.modes import Mode
from moba_hf.evaluation.result_log import ResultLog
from moba_hf.training.arguments import ModelArguments, model_location
from moba_hf.training.sources import read_documents


@dataclass
class TextArguments:
    """Which text, and how much of it."""

    dataset: str = field(default="pydoc", metadata={"help": "File, folder, hub id, or pydoc."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    length: int = field(default=8192, metadata={"help": "Tokens per sequence."})
    sequences: int = field(default=8, metadata={"help": "Sequences measured."})

    def __post_init__(self):
        at_least(2, length=self.length)
        at_least(1, sequences=self.sequences)


@dataclass
class LossArguments(TextArguments):
    """Those of a loss: which positions are the trailing ones."""

    trailing_tokens: int | None = field(
        default=None, metadata={"help": "Last positions that make the trailing loss; by default a quarter of length."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.trailing_tokens is None:
            self.trailing_tokens = max(1, self.length // 4)
        if not 1 <= self.trailing_tokens < self.length:
            raise ValueError(
                f"trailing_tokens must be at least 1 and at most {self.length - 1}, but was {self.trailing_tokens}"
            )


@dataclass
class PromptArguments:
    """How prompts are run."""

    batch_size: int = field(default=1, metadata={"help": "Prompts of one length run at once."})
    prefill_chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt run at a time, to bound the memory of long ones."}
    )

    def __post_init__(self):
        at_least(1, batch_size=self.batch_size)
        if self.prefill_chunk_size is not None:
            at_least(1, prefill_chunk_size=self.prefill_chunk_size)


def at_least(least: int, **numbers: int) -> None:
    """ValueError, naming the argument, where a number is smaller."""
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, but was {number}")


def different(**lists: list) -> None:
    """ValueError, naming the argument, where a list is empty or names something twice."""
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be different ones, at least one, but were {values}")


def open_checkpoint(arguments: ModelArguments, *, longest: int, needs_settings: bool = True) -> Checkpoint:
    """The checkpoint that the arguments name, checked but not loaded. Raises as `Checkpoint.open` does."""
    return Checkpoint.open(
        model_location(arguments),
        longest=longest,
        gguf_file=arguments.gguf_file,
        dtype=arguments.dtype,
        moba=arguments.moba,
        needs_settings=needs_settings,
    )


def long_sequences(arguments: TextArguments, tokenizer) -> tuple[torch.Tensor, int]:
    """What `position_loss.full_length` returns for the text that the arguments name."""
    documents = read_documents(arguments.dataset, text_column=arguments.text_column)
    tokens = (tokenizer(document, verbose=False)["input_ids"] for document in documents)
    return position_loss.full_length(tokens, arguments.length, arguments.sequences)


def describe(model: PreTrainedModel, model_args: ModelArguments, arguments: object) -> dict:
    """What was measured, for the record: the model, its weights, its MoBA settings, whether it was trained with them,
    versions, and the script's arguments (a dataclass) but for output_dir."""
    config = model.config.get_text_config(decoder=True)
    return {
        "model": model_args.model_name_or_path,
        "parameters": model.num_parameters(),
        "weights": weights_digest(model),
        "moba": config.moba,
        "moba_trained_tokens": getattr(model.config, "moba_trained_tokens", None) or 0,
        "dense_attention": model_args.dense_attention,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **{name: value for name, value in asdict(arguments).items() if name != "output_dir"},
    }


def measure_losses(
    model: PreTrainedModel, sequences: torch.Tensor, modes: Sequence[Mode], log: ResultLog, *, title: str
) -> dict[str, position_loss.HeldOutLoss]:
    """By mode; what the log does not have is measured, under a progress bar."""
    total = len(position_loss.missing(log.results, sequences, modes))
    for _ in tqdm(position_loss.measure(model, sequences, modes, log), total=total, desc=title, unit="forward"):
        pass
    return position_loss.collect(log.results, sequences, modes)
