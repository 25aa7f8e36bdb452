"""TRL's SFTTrainer for MoBA models: it is evaluated in full and in MoBA attention, and counts what it trained."""

import contextlib

import torch
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..evaluation.modes import MOBA, Mode, running, side_by_side
from .sequence_parallel import SharingRanks

# SFTConfig's own data settings, and what takes their place: answers are found and packed before the trainer sees them.
_REPLACED = {
    "max_length": "sequence_length",
    "packing": "sequence_length, to which everything is packed",
    "padding_free": "sequence_length, to which everything is packed",
    "assistant_only_loss": "nothing: only what the assistant says carries loss",
    "completion_only_loss": "nothing: only what the assistant says carries loss",
    "eval_packing": "sequence_length, to which everything is packed",
    "pad_to_multiple_of": "sequence_length, to which everything is packed",
    "dataset_text_field": "nothing: rows hold messages, conversations, or prompt and completion",
    "shuffle_dataset": "seed: Trainer shuffles the packed sequences",
    "model_init_kwargs": "the arguments of the model",
    "dataset_kwargs": "dataset",
    "dataset_num_proc": "streaming",
    "trust_remote_code": "nothing: code that comes with a model is not run",
}


def check_sft_config(config: SFTConfig) -> None:
    """ValueError for a setting of SFTConfig that would be ignored."""
    for name, instead in _REPLACED.items():
        value, default = getattr(config, name), SFTConfig.__dataclass_fields__[name].default
        if value not in (default, None, False):
            raise ValueError(f"{name}={value!r} is not read here; instead of it, use {instead}")


class MobaSFTTrainer(SFTTrainer):
    """SFTTrainer over sequences that are packed already: input_ids, labels and position_ids.

    Its evaluation is the loss of the held-out answers in full and in MoBA attention: eval_full_loss, eval_moba_loss
    (eval_loss too) and their difference, eval_gap. While it trains in MoBA mode, `config.moba_trained_tokens` grows.

    Args (besides SFTTrainer's):
        dense_attention: name of the full attention.
    """

    sharing_ranks: SharingRanks | None = None  # set by sequence_parallel.enable

    def __init__(self, *args, dense_attention: str, **kwargs):
        config = kwargs["args"]
        config.dataset_kwargs, config.remove_unused_columns = {"skip_prepare_dataset": True}, False
        config.include_num_input_tokens_seen = "all"
        super().__init__(*args, **kwargs)
        self.dense_attention = dense_attention
        self.add_callback(_TrainedTokens(getattr(self.model.config, "moba_trained_tokens", None) or 0))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        model, ranks = self.accelerator.unwrap_model(self.model).eval(), self.sharing_ranks
        modes = side_by_side(self.dense_attention) if ranks is None else ranks.side_by_side(model)
        full, moba = [self.answer_loss(model, mode) for mode in modes]
        losses = {"loss": moba, "full_loss": full, "moba_loss": moba, "gap": moba - full}
        metrics = {f"{metric_key_prefix}_{name}": loss for name, loss in losses.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def answer_loss(self, model: PreTrainedModel, mode: Mode) -> float:
        """Mean cross entropy in nats over all tokens of all held-out answers, in this attention.

        Every process measures all of them, or those that share sequences do so together: the number of processes
        changes nothing.
        """
        ranks, found = self.sharing_ranks, torch.zeros(2, dtype=torch.float64, device=model.device)
        with running(model, mode), self.compute_loss_context_manager():
            for row in self.eval_dataset:
                batch = {name: value.to(model.device) for name, value in self.data_collator([row]).items()}
                with contextlib.nullcontext() if ranks is None else ranks.sharing(model):
                    batch = batch if ranks is None else ranks.part(batch)
                    output = model(**batch, use_cache=False, fused_lm_head=True)
                found += torch.stack([-output.log_probs.double().sum(), output.label_mask.sum()])
        if ranks is not None:
            torch.distributed.all_reduce(found, group=ranks.group)
        total, tokens = found.tolist()
        return total / tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for metrics in self._metrics.values():  # wrong for batches of more than one row; num_input_tokens_seen is right
            metrics.pop("num_tokens", None)
        super().log(logs, start_time)


class _TrainedTokens(TrainerCallback):
    """Keeps `config.moba_trained_tokens`: tokens before this run and those it trained in MoBA mode."""

    def __init__(self, before: int):
        self.before = before

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if model.config._attn_implementation == MOBA:
            model.config.moba_trained_tokens = self.before + state.num_input_tokens_seen
