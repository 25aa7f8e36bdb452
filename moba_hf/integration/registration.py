"""The only file that writes to Transformers: its two registries, one config attribute, and two guards.

The guards wrap methods because Transformers has no hook there, and without them a user would get dense attention
without a word: when a checkpoint with MoBA settings is loaded under another attention implementation, and when
continuous batching replaces "moba" by a FlashAttention that happens to be installed. The first also puts
`moba` of `from_pretrained(..., config=config, moba={...})` into the config, as Transformers does where it loads that.
"""

import copy
import functools

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.utils import logging

from ..config import MobaConfig
from .attention import moba_attention_forward
from .masking import moba_mask

logger = logging.get_logger(__name__)

NAME = "moba"


def register() -> None:
    """Make "moba" known to Transformers. Runs at import; calling it again changes nothing."""
    AttentionInterface.register(NAME, moba_attention_forward)
    AttentionMaskInterface.register(NAME, moba_mask)
    if not isinstance(PreTrainedConfig.__dict__.get("moba"), _MobaSettings):
        PreTrainedConfig.moba = _MobaSettings()
    if not hasattr(PreTrainedModel.from_pretrained, "_moba_guard"):
        PreTrainedModel.from_pretrained = classmethod(_loading(PreTrainedModel.from_pretrained.__func__))
    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if not hasattr(switch, "_moba_guard"):
        ContinuousBatchingManager.switch_to_cb_friendly_attn = _refusing_moba(switch)


class _MobaSettings:
    """`config.moba`: None, or a plain dict with every field of MobaConfig; validated when it is set.

    Being an attribute of every config class makes `from_pretrained(..., moba={...})` work and fail early; being kept in
    the instance's own dict makes it saved with the model, and only where it was set.
    """

    def __get__(self, config, owner=None):
        return self if config is None else config.__dict__.get(NAME)

    def __set__(self, config, settings) -> None:
        if settings is not None:
            settings = MobaConfig.from_dict(settings)
            if isinstance(layers := getattr(config, "num_hidden_layers", None), int):
                settings.full_layers(layers)
            settings = settings.to_dict()
            config.__dict__[NAME] = settings
        else:
            config.__dict__.pop(NAME, None)
        text_config = config.__dict__.get("text_config")
        if isinstance(text_config, PreTrainedConfig):  # in vision-language models the language model does the attention
            text_config.moba = settings


def _loading(from_pretrained):
    @functools.wraps(from_pretrained)
    def wrapper(cls, *args, **kwargs):
        config = kwargs.get("config")
        if NAME in kwargs and isinstance(config, PreTrainedConfig):
            config = kwargs["config"] = copy.deepcopy(config)  # the caller's stays as it is, as Transformers keeps it
            config.moba = kwargs.pop(NAME)
        loaded = from_pretrained(cls, *args, **kwargs)
        config = (loaded[0] if isinstance(loaded, tuple) else loaded).config
        if getattr(config, NAME, None) and config._attn_implementation != NAME:
            logger.warning_once(
                f"moba_hf: this checkpoint carries MoBA settings, but it was loaded with "
                f"{config._attn_implementation!r}, so it runs full attention. For MoBA, pass "
                f"attn_implementation='moba' to from_pretrained, or call model.set_attn_implementation('moba')."
            )
        return loaded

    wrapper._moba_guard = True
    return wrapper


def _refusing_moba(switch):
    @functools.wraps(switch)
    def wrapper(self, model, *args, **kwargs):
        if model.config._attn_implementation == NAME:
            raise ValueError(
                "moba does not support continuous batching. Use model.generate with MoBA, or choose full attention "
                "first: model.set_attn_implementation('sdpa')"
            )
        return switch(self, model, *args, **kwargs)

    wrapper._moba_guard = True
    return wrapper
