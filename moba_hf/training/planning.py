"""`--plan`: what a training run would hold in the memory of each GPU, by part; nothing is loaded, nothing trained.

The planner's prediction of one step (`moba_hf.planner.memory`), and on top of it what the scripts can do that it does
not know: LoRA, `selective` and `every_n_layers`.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import planner
from ..config import MobaConfig
from ..planner import GIB
from .arguments import ModelArguments

_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class PlanArguments:
    """A dry run instead of a run."""

    plan: bool = field(default=False, metadata={"help": "Print the memory of each GPU by part, and stop."})
    plan_gpus: int | None = field(
        default=None, metadata={"help": "GPUs to plan for; by default WORLD_SIZE, which accelerate sets, or 1."}
    )
    plan_device: str = field(default="h100", metadata={"help": f"What they are: {', '.join(planner.DEVICES)}."})

    def __post_init__(self):
        if self.plan_gpus is not None and self.plan_gpus < 1:
            raise ValueError(f"plan_gpus must be at least 1, but was {self.plan_gpus}")


def for_planning(argv: list[str] | None) -> list[str]:
    """The command line, such that a run for GPUs can be planned on a machine that has none."""
    given = sys.argv[1:] if argv is None else argv
    return [*given, "--use_cpu", "true"] if "--plan" in given else given


def shape_of(name: str) -> planner.ModelShape:
    """The shape of a model: from its config where it is here; else a preset's whose name stands in the path (the stages
    of one recipe start from folders that are not there yet); else from the hub."""
    if not Path(name).expanduser().exists():
        for preset, shape in planner.PRESETS.items():
            if preset in name.lower():
                return shape
    return planner.load_shape(name)


def lora_parameters(shape: planner.ModelShape, settings: Mapping) -> int:
    """Parameters of the adapters: r · (in + out) for each matrix they stand beside.

    ValueError for target_modules that are none of the matrices of a layer.
    """
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = dict(zip(_MATRICES, (
        shape.hidden + heads, shape.hidden + kv_heads, shape.hidden + kv_heads, heads + shape.hidden,
        *[shape.hidden + shape.intermediate] * 3,
    )))  # fmt: skip
    wanted = settings.get("target_modules") or ("q_proj", "v_proj")
    wanted = _MATRICES if wanted == "all-linear" else [wanted] if isinstance(wanted, str) else wanted
    unknown = sorted(set(wanted) - set(sizes))
    if unknown:
        raise ValueError(f"--plan knows the target_modules {_MATRICES} or all-linear, but not {unknown[0]!r}")
    return settings.get("r", 8) * shape.layers * sum(sizes[name] for name in wanted)


def training_moments(
    shape: planner.ModelShape,
    work: planner.Work,
    sharing: planner.Sharing,
    device: planner.Device,
    *,
    settings: Mapping | None = None,
    lora: Mapping | None = None,
) -> list[planner.Memory]:
    """Bytes of one GPU by part, at the moments of one training step among which the peak is.

    `partials`: what MoBA's partial results add to a moment; nothing, where they are gone while the MLP takes more.

    Args:
        settings: gradient_checkpointing_kwargs. lora: fields of peft.LoraConfig.
    """
    settings = settings or {}
    given = (shape, work, sharing), (shape, replace(work, checkpointing="none"), sharing)
    moments = []
    for now, bare, whole in zip(
        planner.train_moments(*given[0], device, True),
        planner.train_moments(*given[0], replace(device, workspace=0.0), True),
        planner.train_moments(*given[1], device, True),
    ):
        parts = {**now.parts, "partials": now.total - bare.total}
        parts["activations"] -= parts["partials"]
        if (n := settings.get("every_n_layers", 1)) > 1 and work.checkpointing != "none":
            parts["activations"] += (1 - 1 / n) * max(0.0, whole.parts["activations"] - now.parts["activations"])
        if settings.get("selective") and work.checkpointing != "none":
            parts["activations"] += _kept_attention(shape, work, sharing)
        if lora is not None:
            state = 4 * lora_parameters(shape, lora) / sharing.gpus  # peft keeps adapters in float32
            frozen = work.item * shape.parameters / sharing.gpus
            parts |= {"weights": frozen + state, "optimizer": 2 * state, "gradients": state}
        moments.append(planner.Memory(now.moment, parts, now.host))
    return moments


def _kept_attention(shape: planner.ModelShape, work: planner.Work, sharing: planner.Sharing) -> float:
    """Output, log-sum-exp and selection of every layer."""
    row = shape.head_dim * work.item + 4 * (work.top_k if work.sparse else 1)
    return shape.layers * work.batch * work.length / sharing.sequence * shape.heads * row


def plan(
    arguments: PlanArguments,
    model_args: ModelArguments,
    training_args,
    length: int,
    moba: Mapping,
    *,
    fused_loss: bool = True,
) -> dict:
    """Print the plan of a run; returns the bytes by part.

    Raises:
        ValueError: the run does not fit the GPUs, or they cannot be shared so.
    """
    shape = shape_of(model_args.model_name_or_path)
    device = planner.device_named(arguments.plan_device, {})
    gpus = arguments.plan_gpus or int(os.environ.get("WORLD_SIZE", "1"))
    ranks = model_args.sequence_parallel_size
    if gpus % ranks:
        raise ValueError(f"{gpus} GPUs cannot be split into groups of {ranks} sequence-parallel ranks")
    sharing = planner.Sharing(ranks, 1, gpus // ranks)
    sharing.local_heads(shape)
    work = _work(model_args, training_args, length, MobaConfig.from_dict(moba), shape, fused_loss, gpus)
    settings = training_args.gradient_checkpointing_kwargs if training_args.gradient_checkpointing else None
    moments = training_moments(shape, work, sharing, device, settings=settings, lora=model_args.lora)
    held = max(moments, key=lambda m: m.total)
    print(_table(shape, work, sharing, device, moments))
    if held.total > device.usable:
        raise ValueError(
            f"this run cannot fit: {held.total / GIB:.1f} GiB a GPU are needed, {device.usable / GIB:.1f} GiB of "
            f"{device.name} are there. More GPUs (--plan_gpus), more sequence-parallel ranks, "
            f"gradient_checkpointing_kwargs: {{offload: true}}, lora or a shorter sequence_length would help"
        )
    return {
        "gpus": gpus,
        "sequence_parallel": ranks,
        "moments": {moment.moment: moment.parts for moment in moments},
        "peak": held.total,
        "host": held.host,
    }


def _work(model_args, training_args, length, moba: MobaConfig, shape, fused_loss, gpus) -> planner.Work:
    """Over several GPUs accelerate's FSDP2 makes weights float32, and gradients and moments with them."""
    low = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else None
    weights = model_args.dtype if model_args.dtype in planner.DTYPE_BYTES else "bfloat16"
    settings = training_args.gradient_checkpointing_kwargs or {}
    kept = "none" if not training_args.gradient_checkpointing else "offload" if settings.get("offload") else "layer"
    return planner.Work(
        length, moba.block_size, moba.top_k, len(moba.full_layers(shape.layers)),
        batch=training_args.per_device_train_batch_size, dtype=low or weights,
        mixed=weights == "float32" or (low is not None and gpus > 1), checkpointing=kept, fused_loss=fused_loss,
    )  # fmt: skip


def _table(shape, work, sharing, device, moments: list[planner.Memory]) -> str:
    """Parts by moment, in GiB of one GPU."""
    lines = [
        f"{shape.name}, {work.length:,} tokens, batch {work.batch}, block {work.block_size}, top-{work.top_k}, "
        f"{work.full_layers} full layers; predicted, not measured",
        f"{sharing.gpus} × {device.name}: {sharing.sequence} sequence-parallel × {sharing.replicas} replicas; GiB each",
        " " * 16 + "".join(f"{moment.moment:>30}" for moment in moments),
    ]
    for part in moments[0].parts:
        lines.append(f"  {part:<14}" + "".join(f"{moment.parts[part] / GIB:>30.2f}" for moment in moments))
    lines.append(f"  {'all':<14}" + "".join(f"{moment.total / GIB:>30.2f}" for moment in moments))
    lines.append(
        f"  usable: {device.usable / GIB:.1f} GiB; host memory for activations: {moments[0].host / GIB:.1f} GiB"
    )
    return "\n".join(lines)
