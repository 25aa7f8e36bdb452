"""Is MoBA activated yet? The loss of one model on the same held-out text, in full and in MoBA attention."""

import time
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..config import MobaConfig
from ..evaluation.modes import Mode, running, side_by_side
from ..evaluation.position_loss import HeldOutLoss, token_losses
from .activation import Selection, attended_pairs
from .schedule import ModeSwitch
from .sequence_parallel import SharingRanks

WINDOWS = 8  # of positions, in the loss by position


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

    def by_position(self) -> dict[str, list[float]]:
        """Loss in windows of positions: `ends`, the last position of each, and both losses."""
        length = self.full.by_token.shape[1]
        width = -(-length // WINDOWS)
        ends = [min(start + width, length) for start in range(0, length, width)]
        losses = {mode: getattr(self, mode).by_position(width).tolist() for mode in ("full", "moba")}
        return {"ends": ends, **losses}

    def by_sequence(self) -> dict[str, list[float]]:
        """Mean loss of each sequence, in both attentions: whether a difference of two runs is more than chance."""
        return {mode: getattr(self, mode).by_token.mean(1).tolist() for mode in ("full", "moba")}

    def metrics(self, trailing_tokens: int) -> dict[str, float]:
        """All of it, under the names that are logged."""
        curves = self.by_position()
        found = {"loss": self.moba.mean()}
        for mode in ("full", "moba"):
            summary = getattr(self, mode).summary(trailing_tokens)
            found |= {f"{mode}_{key}": value for key, value in summary.items()}
            found |= {f"{mode}_position_{end}": value for end, value in zip(curves["ends"], curves[mode], strict=True)}
        return found | {"gap": self.gap(trailing_tokens)}


@dataclass(frozen=True)
class Meter:
    """Measures held-out sequences in full and in MoBA attention; `ranks` that share sequences measure them together.

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

    def measure(
        self, model: PreTrainedModel, sequences: int | None = None, ranks: SharingRanks | None = None
    ) -> Measurement:
        """Both losses of all the sequences, or of the first few. The model's mode and attention are left as found."""
        batches = self.sequences[:sequences].split(self.batch_size)
        modes = side_by_side(self.dense_attention) if ranks is None else ranks.side_by_side(model)
        training = model.training
        model.eval()
        try:
            with tqdm(total=2 * len(batches), desc="Held-out text", disable=not self.progress, leave=False) as bar:
                losses = [self._losses(model, batches, mode, ranks, bar) for mode in modes]
        finally:
            model.train(training)
        return Measurement(*losses)

    def measure_selection(self, model: PreTrainedModel, ranks: SharingRanks | None = None) -> Selection:
        """What MoBA selects in the first sequence, or in as much of it as each of the ranks holds in training. The
        model's mode is left as found."""
        length = self.sequences.shape[1] // (1 if ranks is None else ranks.size)
        training = model.training
        model.eval()
        try:
            return Selection.measure(model, self.sequences[:1, :length])
        finally:
            model.train(training)

    def _losses(self, model, batches, mode: Mode, ranks, bar) -> HeldOutLoss:
        measured, losses = token_losses if ranks is None else ranks.token_losses, []
        with running(model, mode):
            for batch in batches:
                losses.append(measured(model, batch.to(model.device)).cpu())
                bar.update()
        return HeldOutLoss(torch.cat(losses))


class MeteredTrainer(Trainer):
    """A Trainer that follows a schedule of MoBA and full attention, and whose evaluation is the meter.

    Logged wherever report_to says:

        eval_full_*, eval_moba_*       mean and trailing loss; eval_gap: their trailing difference
        eval_*_position_N              loss of the positions up to N, in windows
        eval_recall, eval_recall_layer_*, eval_recent    every `recall_steps` steps: see `activation.Selection`
        moba_layers                    layers that trained sparse in the latest step; 0: full attention
        sparsity                       share of query-key pairs that these layers left out since the last log
        tokens_per_second              the time of evaluations and saving left out

    Needs include_num_input_tokens_seen.

    Args (besides Trainer's):
        meter: what to measure.
        meter_sequences: how many of the meter's sequences each evaluation takes.
        trailing_tokens: last positions that make the trailing loss.
        schedule: phases as `Schedule.from_list` takes them; None: all of the run in MoBA.
        recall_steps: the selection is measured in evaluations at multiples of so many steps; 0: in none.
    """

    sharing_ranks: SharingRanks | None = None  # set by sequence_parallel.enable

    def __init__(
        self,
        *args,
        meter: Meter,
        meter_sequences: int,
        trailing_tokens: int,
        schedule: list | None = None,
        recall_steps: int = 0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.meter, self.meter_sequences, self.trailing_tokens = meter, meter_sequences, trailing_tokens
        self.recall_steps = recall_steps
        self.switch, self.clock = ModeSwitch(schedule), StepClock()
        self.add_callback(self.switch)
        self.add_callback(self.clock)

    def measure(self, sequences: int | None = None) -> Measurement:
        """The meter's measurement of the model as it is now, in the precision it is trained in."""
        with self.compute_loss_context_manager():
            return self.meter.measure(self.accelerator.unwrap_model(self.model), sequences, self.sharing_ranks)

    def measure_selection(self) -> Selection:
        """What MoBA selects in the first of the meter's sequences."""
        with self.compute_loss_context_manager():
            return self.meter.measure_selection(self.accelerator.unwrap_model(self.model), self.sharing_ranks)

    def training_step(self, model, inputs, *args, **kwargs):
        if self.switch.sparse_layers:
            positions = inputs["position_ids"] if "position_ids" in inputs else _positions(inputs["input_ids"])
            settings = MobaConfig.from_dict(self.model.config.get_text_config(decoder=True).moba)
            pairs = attended_pairs(positions.to(self.args.device), settings)
            self.clock.count(*self.accelerator.reduce(pairs, "sum").tolist())
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        found = self.measure(self.meter_sequences).metrics(self.trailing_tokens)
        if self.recall_steps and self.state.global_step % self.recall_steps == 0:
            found |= self.measure_selection().metrics()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"moba_layers": self.switch.sparse_layers, **self.clock.read()}
        super().log(logs, start_time)


def _positions(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


class StepClock(TrainerCallback, ExportableState):
    """The time that steps took, the tokens in them, and how many query-key pairs sparse layers attended.

    Attributes:
        attended, causal: pairs of the whole run, before an interruption too: attended ones, and those of full
            attention.
    """

    def __init__(self):
        self.attended = self.causal = 0.0
        self._seconds, self._tokens, self._tokens_seen, self._started = 0.0, 0, 0, 0.0
        self._read = (0.0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self._read = self.attended, self.causal = saved.get("attended", 0.0), saved.get("causal", 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._started, self._tokens_seen = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds += time.perf_counter() - self._started
        self._tokens += state.num_input_tokens_seen - self._tokens_seen

    def count(self, attended: float, causal: float) -> None:
        self.attended, self.causal = self.attended + attended, self.causal + causal

    @property
    def sparsity(self) -> float:
        """Share of the pairs that sparse layers left out, over the whole run; 0 where none ran."""
        return _left_out(self.attended, self.causal)

    def read(self) -> dict[str, float]:
        """Speed and sparsity since the last reading."""
        sparsity = _left_out(self.attended - self._read[0], self.causal - self._read[1])
        speed = self._tokens / self._seconds if self._seconds else 0.0
        self._seconds, self._tokens, self._read = 0.0, 0, (self.attended, self.causal)
        return {"tokens_per_second": speed, "sparsity": sparsity}

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"args": {}, "attributes": {"attended": self.attended, "causal": self.causal}}


def _left_out(attended: float, causal: float) -> float:
    return 1 - attended / causal if causal else 0.0
