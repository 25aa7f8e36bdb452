"""Full, MoBA and hybrid attention: ways to run one and the same model, so that they can be set side by side."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ..config import MobaConfig, configure

MOBA = "moba"


@dataclass(frozen=True)
class Mode:
    """One way to run a model.

    Attributes:
        name: what results and figures call it.
        attention: the attn_implementation.
        settings: fields of MobaConfig that differ from the checkpoint's.
    """

    name: str
    attention: str
    settings: dict = field(default_factory=dict)


def side_by_side(dense_attention: str = "sdpa") -> tuple[Mode, Mode]:
    """Full attention, and MoBA as the checkpoint says."""
    return Mode("full", dense_attention), Mode("moba", MOBA)


@contextlib.contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run the model with another attention implementation; the former one returns at the end."""
    former = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(former)


@contextlib.contextmanager
def running(model: PreTrainedModel, mode: Mode) -> Iterator[None]:
    """Run the model in the mode; its attention and its MoBA settings are as before at the end."""
    config = model.config.get_text_config(decoder=True)
    former = config.moba
    with attention(model, mode.attention):
        try:
            if mode.settings:
                configure(model, **mode.settings)
            yield
        finally:
            config.moba = former


def settings_of(model: PreTrainedModel) -> MobaConfig:
    """The MoBA settings of a model that has some (see `checkpoint.check`)."""
    return MobaConfig.from_dict(model.config.get_text_config(decoder=True).moba)
