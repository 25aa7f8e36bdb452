"""Is MoBA activated yet? The loss of one model on the same held-out text, in full and in MoBA attention."""

import time
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..evaluation.modes import attention
from ..evaluation.position_loss import HeldOutLoss, token_losses

MOBA = "moba"


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
