"""Ulysses sequence parallelism (arXiv 2309.14509, 2506.13996): several ranks share each sequence.

A rank holds a part of the positions. Around attention, DeepSpeed's all-to-all gives it the whole sequence for a part of
the heads: so routing, which is a matter of each head, sees every block and stays exact.

    trainer = Trainer(model, ...)                  # any Trainer; the model with attn_implementation="moba"
    sequence_parallel.enable(trainer, size=8)      # in our scripts: sequence_parallel_size: 8
    trainer.train()

or, in a training loop of one's own,

    ranks = sequence_parallel.start(model.config, size=8)
    with ranks.sharing(model):
        loss = model(**ranks.part(batch), num_items_in_batch=labels_of_all_ranks).loss
        loss.backward()                            # the whole loss is the sum over the ranks

How the weights are kept (DDP, FSDP2) is another matter, and any accelerate configuration does. Outside of `sharing`,
in Trainer's own evaluation for instance, the model is as ever: each rank runs whole sequences.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, Trainer

from ..evaluation.modes import MOBA, Mode, attention
from ..evaluation.position_loss import target_losses
from ..integration.attention import moba_attention_forward
from ..integration.masking import moba_mask
from .data import IGNORED

ULYSSES = "moba_ulysses"  # the attention implementation inside `sharing`


@dataclass(frozen=True)
class SharingRanks:
    """The ranks that share sequences, seen from one of them.

    Attributes:
        size: how many they are.
        rank: which one this is; it holds the rank-th part of the positions.
        group: their process group.
    """

    size: int
    rank: int
    group: dist.ProcessGroup

    @contextlib.contextmanager
    def sharing(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it, the model's forward and backward take this rank's part of each sequence.

        ValueError where the model does not run "moba": any other attention would see its own part alone.
        """
        if (found := model.config._attn_implementation) != MOBA:
            raise ValueError(
                f"sequence parallelism needs attn_implementation='moba', but it was {found!r}; for full attention keep "
                f"'moba' and name all layers: moba_hf.configure(model, full_attention_layers=range(number of layers))"
            )
        with attention(model, ULYSSES):
            yield

    def part(self, batch: Mapping) -> dict:
        """This rank's part of a batch that all of them hold.

        Args:
            batch: `input_ids` int64 [rows, length]; perhaps `labels` and `position_ids` (from 0 in each document); any
                other tensor has that shape too.

        Returns:
            The same, each [rows, length / size]; position_ids always; with labels, the equal `labels` and
            `shift_labels`: the label of a position's successor, which may lie on the next rank. An attention_mask
            that masks nothing is left out.

        Raises:
            ValueError: a length that the ranks cannot share, padding, cu_seq_lens_*, a tensor of another shape.
        """
        batch = _checked(batch, self.size)
        input_ids, width = batch["input_ids"], batch["input_ids"].shape[1] // self.size
        if "position_ids" not in batch:
            batch["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if "labels" in batch:
            shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
            batch["labels"] = batch["shift_labels"] = shifted
        own = slice(self.rank * width, (self.rank + 1) * width)
        return {name: x[:, own].contiguous() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}

    @staticmethod
    def side_by_side(model: PreTrainedModel) -> tuple[Mode, Mode]:
        """`evaluation.modes.side_by_side` inside `sharing`, where full attention is MoBA with all layers full."""
        layers = range(model.config.get_text_config(decoder=True).num_hidden_layers)
        return Mode("full", MOBA, {"full_attention_layers": list(layers)}), Mode("moba", MOBA)

    def token_losses(self, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
        """`evaluation.position_loss.token_losses` of sequences that all ranks hold, measured together."""
        own = self.part({"input_ids": input_ids, "labels": input_ids})
        with self.sharing(model):
            losses = target_losses(model, own["input_ids"], own["position_ids"], own["shift_labels"])
        parts = [torch.empty_like(losses) for _ in range(self.size)]
        dist.all_gather(parts, losses, group=self.group)
        return torch.cat(parts, dim=1)[:, :-1]

    def check_equal(self, batches: Sequence[Mapping], device: torch.device) -> None:
        """RuntimeError where the ranks do not hold the same batches. device: one that the group communicates on."""
        mine = torch.stack([_digest(batch["input_ids"]) for batch in batches]).to(device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        if not all(torch.equal(other, mine) for other in found):
            raise RuntimeError(
                "the ranks that share a sequence have read different ones: the data set must give the same rows in the "
                "same order to every process"
            )


def start(config: PreTrainedConfig, size: int) -> SharingRanks:
    """Split the processes into groups of `size` neighbours that share sequences; once per process and size.

    Args:
        config: of the model that will be trained. size: ranks that share a sequence.

    Raises:
        ValueError: as `check`, or processes that cannot be split so. RuntimeError: no process group.
    """
    check(config, size)
    if not dist.is_initialized():
        raise RuntimeError(
            f"sequence_parallel_size={size} needs {size} processes: start with accelerate launch or torchrun"
        )
    if (processes := dist.get_world_size()) % size:
        raise ValueError(f"sequence_parallel_size={size} must divide the number of processes, which is {processes}")
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as state

    _init_deepspeed()
    if state._SEQUENCE_PARALLEL_GROUP is None:
        state.initialize_sequence_parallel(size)
    group = _group()
    if (former := dist.get_world_size(group)) != size:
        raise ValueError(f"sequence_parallel_size={size}, but in this process it has been {former} before")
    AttentionInterface.register(ULYSSES, ulysses_attention_forward)
    AttentionMaskInterface.register(ULYSSES, ulysses_mask)
    return SharingRanks(size, dist.get_rank(group), group)


def _init_deepspeed() -> None:
    """DeepSpeed's communication over the process group that is there."""
    import deepspeed

    backend = importlib.import_module("deepspeed.comm.torch")
    build, backend.build_shm_op = backend.build_shm_op, lambda: None  # on CPUs it compiles C++, which nobody calls here
    try:
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    finally:
        backend.build_shm_op = build


def enable(trainer: Trainer, size: int) -> SharingRanks:
    """Let the trainer's processes share sequences, `size` of them each. Call it before `train`.

    Gradients and the logged loss are those of fewer processes with whole sequences: processes / size sequences (times
    per_device_train_batch_size and gradient_accumulation_steps) make a step. Trainer's own evaluation runs whole
    sequences on every rank; a MeteredTrainer's shares them too.

    Raises:
        ValueError, RuntimeError, ModuleNotFoundError: as `start`; and for arguments that change the loss or the data.
    """
    _check_trainer(trainer)
    ranks = start(trainer.model.config, size)
    trainer.__class__ = type(f"SequenceParallel{type(trainer).__name__}", (_Sharing, type(trainer)), {})
    trainer.sharing_ranks = ranks
    return ranks


class _Sharing:
    """What `enable` puts in front of a trainer's class."""

    sharing_ranks: SharingRanks

    def get_train_dataloader(self):
        """Trainer's own, but the ranks that share a sequence read the same ones."""
        accelerator, size = self.accelerator, self.sharing_ranks.size

        def prepare(loader, **_):
            return prepare_data_loader(
                loader,
                accelerator.device,
                num_processes=accelerator.num_processes // size,
                process_index=accelerator.process_index // size,
                put_on_device=accelerator.device_placement,
                rng_types=accelerator.rng_types.copy(),
                dispatch_batches=False,
                even_batches=accelerator.even_batches,
                use_seedable_sampler=accelerator.use_seedable_sampler,
                data_seed=accelerator.dataloader_config.data_seed,
                non_blocking=accelerator.non_blocking,
            )

        accelerator.prepare_data_loader = prepare
        try:
            return super().get_train_dataloader()
        finally:
            del accelerator.prepare_data_loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Whole batches are counted, by every rank that shares them, and then divided."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.sharing_ranks.check_equal(batches, device)
        items = None if items is None else items / self.sharing_ranks.size
        return [self.sharing_ranks.part(batch) for batch in batches], items

    def get_total_train_batch_size(self, args) -> int:
        return super().get_total_train_batch_size(args) // self.sharing_ranks.size

    def training_step(self, model, inputs, *args, **kwargs):
        with self.sharing_ranks.sharing(self.accelerator.unwrap_model(self.model)):
            return super().training_step(model, inputs, *args, **kwargs)


# ---- attention -----------------------------------------------------------------------------------------------------


def ulysses_attention_forward(module, query, key, value, attention_mask, *args, **kwargs):
    """MoBA over whole sequences for a part of the heads, between two all-to-alls; see `moba_attention_forward`.

    Args:
        query: [rows, heads, length / size, head_dim]; key, value: [rows, kv_heads, length / size, head_dim].
        attention_mask: None, as `ulysses_mask` makes it. kwargs: `position_ids` [rows or 1, length / size] is needed.

    Returns:
        ([rows, length / size, heads, head_dim], None), the heads flattened into the last dimension.
    """
    _refuse(module, query, key, kwargs)
    core = _core(_group(), query.shape[0], query.shape[1], key.shape[1], query.shape[3])
    groups = getattr(module, "num_key_value_groups", None)
    try:
        return core(module, query, key, value, None, *args, **kwargs)
    finally:
        if groups is not None:  # the core adapts it to replicated key heads; outside of `sharing` it would be wrong
            module.num_key_value_groups = groups


def _group() -> dist.ProcessGroup:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as state

    return state.get_sequence_parallel_group()


@functools.cache
def _core(group: dist.ProcessGroup, rows: int, heads: int, kv_heads: int, head_dim: int):
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF(
        attn=moba_attention_forward,
        batch_size=rows,
        attn_head_count=heads,
        attn_head_size=head_dim,
        kv_head_count=kv_heads,
        num_hidden_layers=1,  # read by a debugging aid alone
        process_group=group,
        seq_length_is_variable=True,
    )


def ulysses_mask(*args, **kwargs) -> None:
    """No mask: documents are known by the position_ids of all ranks. Raises ValueError for what these cannot say."""
    segments = moba_mask(*args, **kwargs)
    if segments is None:
        return
    if segments.dtype != torch.int32:
        raise ValueError(
            "sequence parallelism knows causal attention inside documents, but this model masks in another way "
            "(sliding window, chunks, bidirectional)"
        )
    if (segments < 1).any():
        raise ValueError(_PADDING)


def _refuse(module, query, key, kwargs) -> None:
    """Raise ValueError for what would be computed wrongly."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2:
        found = "were missing" if positions is None else f"had the shape {tuple(positions.shape)}"
        raise ValueError(f"sequence parallelism needs position_ids [rows, length / ranks], but they {found}")
    if any(kwargs.get(name) is not None for name in _CU_SEQ_LENS):
        raise ValueError(_CU_SEQ_LENS_REFUSED)
    if kwargs.get("sliding_window") is not None or not getattr(module, "is_causal", True):
        raise ValueError(
            "sequence parallelism runs causal attention without a window, but this layer has "
            + (f"sliding_window={kwargs['sliding_window']}" if kwargs.get("sliding_window") else "is_causal=False")
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"sequence parallelism takes no key cache, but there are {key.shape[2]} keys for {query.shape[2]} queries; "
            f"set use_cache=False"
        )


# ---- what cannot be shared is refused ------------------------------------------------------------------------------

_CU_SEQ_LENS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_CU_SEQ_LENS_REFUSED = (
    "sequence parallelism takes no cu_seq_lens_*: they cannot be divided among ranks. Say where documents begin by "
    "position_ids that count from 0 in each"
)
_PADDING = (
    "sequence parallelism takes no padding: the attention_mask would have to be whole on every rank. Pack documents to "
    "full sequences, and tell them apart by position_ids"
)


def check(config: PreTrainedConfig, size: int, sequence_length: int | None = None) -> None:
    """Raise ValueError for a model, or sequences of a length, that `size` ranks cannot share; ModuleNotFoundError where
    deepspeed is missing."""
    if type(size) is not int or size < 2:
        raise ValueError(f"sequence_parallel_size must be an int of at least 2, but was {size!r}")
    if sequence_length is not None:
        _check_length(sequence_length, size)
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError('sequence parallelism needs deepspeed: pip install "moba_hf[deepspeed]"')
    config = config.get_text_config(decoder=True)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size:
        raise ValueError(f"sequence_parallel_size={size} must divide the attention heads, which are {heads}")
    if kv_heads % size and size % kv_heads:
        raise ValueError(
            f"sequence_parallel_size={size} must divide the key heads or be a multiple of them, which are {kv_heads}"
        )
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        raise ValueError(f"sequence parallelism needs full_attention in every layer, but the model has {others}")


def _check_trainer(trainer: Trainer) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        raise ValueError(
            "accelerate's own parallelism_config (ring context parallel, sequence or tensor parallel) and "
            "sequence_parallel_size exclude each other: leave it out. A ring cannot route over whole sequences"
        )
    for name, value, allowed in (
        ("label_smoothing_factor", args.label_smoothing_factor, 0),
        ("compute_loss_func", trainer.compute_loss_func, None),
        ("average_tokens_across_devices", args.average_tokens_across_devices, True),
        ("accelerator_config.split_batches", accelerator.split_batches, False),
        ("accelerator_config.dispatch_batches", accelerator.dispatch_batches or False, False),
    ):
        if value != allowed:
            raise ValueError(f"sequence parallelism needs {name}={allowed}, but it was {value!r}")
    if not trainer.model_accepts_loss_kwargs:
        raise ValueError(
            f"sequence parallelism needs a model whose loss takes num_items_in_batch; that of "
            f"{type(trainer.model).__name__} does not"
        )


def _checked(batch: Mapping, size: int) -> dict:
    batch = dict(batch)
    if any(name in batch for name in _CU_SEQ_LENS):
        raise ValueError(_CU_SEQ_LENS_REFUSED)
    shape = tuple(batch["input_ids"].shape)
    _check_length(shape[1], size)
    mask = batch.pop("attention_mask", None)
    if mask is not None and not mask.all():
        raise ValueError(_PADDING)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
            raise ValueError(f"{name} must have the shape of input_ids, {shape}, but had {tuple(value.shape)}")
    return batch


def _check_length(length: int, size: int) -> None:
    if length % size:
        raise ValueError(f"sequence_parallel_size={size} must divide the sequence length, which is {length}")


def _digest(input_ids: torch.Tensor) -> torch.Tensor:
    """A number that other tokens, or another order of them, will hardly have: int64, modulo 2^64."""
    flat = input_ids.flatten()
    return (flat * torch.arange(1, len(flat) + 1, device=flat.device)).sum()
