"""Cross entropy at every position of held-out sequences, and what it comes to far into them."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .checkpoint import digest
from .modes import Mode, running
from .result_log import ResultLog

_LOGITS = 2**27  # elements of fp32 logits held at once: 512 MB


@dataclass(frozen=True)
class HeldOutLoss:
    """Cross entropy in nats at every position of held-out sequences.

    Attributes:
        by_token: float32 [sequences, sequence_length − 1], on the CPU; column i is the loss of predicting token i + 1.
    """

    by_token: torch.Tensor

    def mean(self) -> float:
        return self.by_token.mean().item()

    def trailing(self, tokens: int) -> float:
        """Over the last `tokens` positions, where attention has most to choose from."""
        return self.by_token[:, -tokens:].mean().item()

    def by_position(self, window: int = 1) -> torch.Tensor:
        """float32 [⌈(sequence_length − 1) / window⌉]: averaged over the sequences and over windows of positions."""
        return torch.stack([part.mean() for part in self.by_token.mean(0).split(window)])

    def first(self, sequences: int) -> "HeldOutLoss":
        return HeldOutLoss(self.by_token[:sequences])

    def summary(self, trailing_tokens: int) -> dict[str, float]:
        return {"mean": self.mean(), "trailing": self.trailing(trailing_tokens)}


def token_losses(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy at every position, float32 [sequences, length − 1], without holding all the logits.

    Args:
        input_ids: int64 [sequences, length], one document each.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
    return target_losses(model, input_ids, positions, input_ids.roll(-1, dims=1))[:, :-1]


@torch.no_grad()
def target_losses(model: PreTrainedModel, input_ids, position_ids, targets) -> torch.Tensor:
    """Cross entropy of `targets`, each the token after its position: float32 [sequences, length].

    The decoder runs once. The model's own forward then turns slices of its output into logits, so that each family
    keeps what it does there (scaling, soft caps): only the decoder inside is replaced by what it has returned. All
    calls are the whole model's, which gathers the weights where they are sharded (FSDP2).

    The decoder's last module, its norm, runs again beside each slice, on one token: accelerate shards it in one group
    with the head, and PyTorch 2.11 leaves the group's weights sharded when not all of its modules have run.

    Args:
        input_ids, position_ids, targets: int64 [sequences, length].
    """
    inputs = dict(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    decoder, found, losses = model.get_decoder(), {}, []

    def ran(module, args, kwargs, output):
        if module is decoder:
            found["output"] = output
        else:
            token = [x[:, :1].clone() for x in args[:1]]  # a view would keep the whole sequence's states
            found["last"] = functools.partial(module, *token, *args[1:], **kwargs)

    hooks = [module.register_forward_hook(ran, with_kwargs=True) for module in (*decoder.children(), decoder)]
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    slice_length = max(1, _LOGITS // (input_ids.shape[0] * model.config.get_text_config().vocab_size))
    with _replay(decoder, **found):
        for where in torch.arange(input_ids.shape[1], device=input_ids.device).split(slice_length):
            logits = model(**inputs, logits_to_keep=where).logits.float()
            losses.append(torch.nn.functional.cross_entropy(logits.mT, targets[:, where], reduction="none"))
    return torch.cat(losses, dim=1)


@contextlib.contextmanager
def _replay(module: torch.nn.Module, output, last: Callable) -> Iterator[None]:
    """Within it, calling `module` calls `last` and returns `output`."""
    former = module.__dict__.get("forward")
    module.forward = lambda *_, **__: (last(), output)[1]
    try:
        yield
    finally:
        del module.forward
        if former is not None:
            module.forward = former


def full_length(documents: Iterable[Sequence[int]], length: int, sequences: int) -> tuple[torch.Tensor, int]:
    """The paper's counting rule: a sequence counts only where one document fills it.

    Were shorter ones counted, early positions would be averaged over other text than late ones, and the curve over
    positions would show the text, not the attention.

    Args:
        documents: token numbers of each.
        length: tokens per sequence. sequences: how many are wanted; documents are read until they are found.

    Returns:
        int64 [at most `sequences`, length], the first pieces of long documents before their second ones; and how many
        of the documents read were too short.

    Raises:
        ValueError: no document is that long.
    """
    pieces, short, found = [], 0, 0
    for document in documents:
        whole = len(document) // length
        short += whole == 0
        pieces += [(i, len(pieces), document[i * length : (i + 1) * length]) for i in range(whole)]
        found += whole > 0
        if found == sequences:
            break
    if not pieces:
        raise ValueError(f"none of the {short} documents has {length} tokens; shorten the sequences or give other text")
    return torch.tensor([piece for *_, piece in sorted(pieces)[:sequences]]), short


def missing(
    results: Iterable[dict], sequences: torch.Tensor, modes: Sequence[Mode]
) -> list[tuple[str, torch.Tensor, Mode]]:
    """(name, tokens, mode) of what `measure` has to do yet. A sequence's name is made of its tokens, so that a log can
    be gone on with when more of them are asked for."""
    done = {(result["sequence"], result["mode"]) for result in results}
    rows = {digest(row.tolist()): row for row in sequences}
    return [(name, row, mode) for name, row in rows.items() for mode in modes if (name, mode.name) not in done]


def measure(model: PreTrainedModel, sequences: torch.Tensor, modes: Sequence[Mode], log: ResultLog) -> Iterator[None]:
    """Measure every sequence in every mode, but for what the log has; yields after each. Losses are kept to 1e-6.

    Args:
        sequences: int64 [sequences, length], one document each.
    """
    for name, row, mode in missing(log.results, sequences, modes):
        with running(model, mode):
            losses = token_losses(model, row[None].to(model.device))[0].tolist()
        log.add([{"sequence": name, "mode": mode.name, "losses": [round(loss, 6) for loss in losses]}])
        yield


def collect(results: Iterable[dict], sequences: torch.Tensor, modes: Sequence[Mode]) -> dict[str, HeldOutLoss]:
    """The losses of these sequences, by mode, out of what `measure` has logged."""
    losses = {(result["sequence"], result["mode"]): result["losses"] for result in results}
    names = [digest(row.tolist()) for row in sequences]
    return {mode.name: HeldOutLoss(torch.tensor([losses[name, mode.name] for name in names])) for mode in modes}
