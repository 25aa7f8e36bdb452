"""Is MoBA activated yet? The loss of one model on the same held-out text, in full and in MoBA attention."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback

MOBA = "moba"
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


@dataclass(frozen=True)
class Measurement:
    """The same held-out sequences, the same weights, both attentions."""

    full: HeldOutLoss
    moba: HeldOutLoss

    def first(self, sequences: int) -> "Measurement":
        return Measurement(self.full.first(sequences), self.moba.first(sequences))

    def gap(self, trailing_tokens: int) -> float:
        """Trailing MoBA loss − trailing full loss: what sparsity costs, and what training has to close."""
        return self.moba.trailing(trailing_tokens) - self.full.trailing(trailing_tokens)


@contextlib.contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run the model with another attention implementation; the former one returns at the end."""
    former = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(former)


@torch.no_grad()
def token_losses(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy at every position, float32 [sequences, length − 1], without holding all the logits.

    The decoder runs once. The model's own forward then turns slices of its output into logits, so that each family
    keeps what it does there (scaling, soft caps): only the decoder inside is replaced by what it has returned.

    Args:
        input_ids: int64 [sequences, length], one document each.
    """
    decoder = model.get_decoder()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
    hidden = decoder(input_ids=input_ids, position_ids=positions, use_cache=False)
    slice_length = max(1, _LOGITS // (input_ids.shape[0] * model.config.get_text_config().vocab_size))
    losses = []
    with _replay(decoder, hidden):
        for where in positions[0, :-1].split(slice_length):
            logits = model(input_ids=input_ids, logits_to_keep=where, use_cache=False).logits.float()
            losses.append(torch.nn.functional.cross_entropy(logits.mT, input_ids[:, where + 1], reduction="none"))
    return torch.cat(losses, dim=1)


@contextlib.contextmanager
def _replay(module: torch.nn.Module, output) -> Iterator[None]:
    """Within it, calling `module` returns `output`."""
    module.forward, former = (lambda *_, **__: output), module.__dict__.get("forward")
    try:
        yield
    finally:
        del module.forward
        if former is not None:
            module.forward = former


@dataclass(frozen=True)
class Meter:
    """Measures held-out sequences in full and in MoBA attention.

    Attributes:
        sequences: int64 [sequences, length], one document each.
        dense_attention: name of the full attention.
        batch_size: sequences run at once.
        progress: show a bar.
    """

    sequences: torch.Tensor
    dense_attention: str = "sdpa"
    batch_size: int = 1
    progress: bool = False

    def measure(self, model: PreTrainedModel, sequences: int | None = None) -> Measurement:
        """Both losses of all the sequences, or of the first few. The model's mode and attention are left as found."""
        batches = self.sequences[:sequences].split(self.batch_size)
        training = model.training
        model.eval()
        try:
            with tqdm(total=2 * len(batches), desc="Held-out text", disable=not self.progress, leave=False) as bar:
                losses = [self._losses(model, batches, name, bar) for name in (self.dense_attention, MOBA)]
        finally:
            model.train(training)
        return Measurement(*losses)

    def _losses(self, model, batches, implementation: str, bar) -> HeldOutLoss:
        losses = []
        with attention(model, implementation):
            for batch in batches:
                losses.append(token_losses(model, batch.to(model.device)).cpu())
                bar.update()
        return HeldOutLoss(torch.cat(losses))


class MeteredTrainer(Trainer):
    """A Trainer whose evaluation is the meter: full and MoBA loss, mean and trailing, logged wherever report_to says.

    While it trains in MoBA mode, `config.moba_trained_tokens` grows, in every checkpoint. Logs carry tokens_per_second,
    the time of evaluations and saving left out. Needs include_num_input_tokens_seen.

    Args (besides Trainer's):
        meter: what to measure.
        meter_sequences: how many of the meter's sequences each evaluation takes.
        trailing_tokens: last positions that make the trailing loss.
    """

    def __init__(self, *args, meter: Meter, meter_sequences: int, trailing_tokens: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter, self.meter_sequences, self.trailing_tokens = meter, meter_sequences, trailing_tokens
        self._clock = _TokenClock(getattr(self.model.config, "moba_trained_tokens", None) or 0)
        self.add_callback(self._clock)

    def measure(self, sequences: int | None = None) -> Measurement:
        """The meter's measurement of the model as it is now, in the precision it is trained in."""
        with self.compute_loss_context_manager():
            return self.meter.measure(self.accelerator.unwrap_model(self.model), sequences)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        measurement = self.measure(self.meter_sequences)
        full, moba = (loss.summary(self.trailing_tokens) for loss in (measurement.full, measurement.moba))
        metrics = {
            f"{metric_key_prefix}_loss": moba["mean"],
            f"{metric_key_prefix}_full_mean": full["mean"],
            f"{metric_key_prefix}_moba_mean": moba["mean"],
            f"{metric_key_prefix}_full_trailing": full["trailing"],
            f"{metric_key_prefix}_moba_trailing": moba["trailing"],
            f"{metric_key_prefix}_gap": measurement.gap(self.trailing_tokens),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens_per_second"] = self._clock.read()
        super().log(logs, start_time)


class _TokenClock(TrainerCallback):
    """Counts the tokens trained in MoBA mode, and the time their steps took."""

    def __init__(self, tokens_before: int):
        self.tokens_before = tokens_before
        self.seconds, self.tokens, self._tokens_seen, self._started = 0.0, 0, 0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._started, self._tokens_seen = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seconds += time.perf_counter() - self._started
        self.tokens += state.num_input_tokens_seen - self._tokens_seen
        if model.config._attn_implementation == MOBA:
            model.config.moba_trained_tokens = self.tokens_before + state.num_input_tokens_seen

    def read(self) -> float:
        """Tokens per second since the last reading."""
        speed = self.tokens / self.seconds if self.seconds else 0.0
        self.seconds, self.tokens = 0.0, 0
        return speed
