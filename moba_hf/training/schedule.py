"""Which part of a run trains in MoBA and which in full attention, and the callback that switches between them.

A schedule is a list of phases; in a stage's YAML file the key `schedule`:

    - {mode: moba, share: 0.9}          the paper's 90/10: its last tenth of the tokens in full attention
    - {mode: full}

    - {mode: full, tokens: 1_000_000_000}
    - {mode: moba, tokens: 500_000_000, full_attention_layers: [-10, -9, -8, -7, -6, -5, -4, -3, -2, -1]}
    - {mode: moba}                      the layers of the run's `moba` settings; a last phase takes the rest

A phase ends with the first step that begins at or after its last token. Which phase a step belongs to depends on the
tokens seen before it, or for shares on its number, alone: so a resumed run is where it was.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..config import MobaConfig

logger = logging.getLogger(__name__)

MODES = ("moba", "full")
_FIELDS = ("mode", "tokens", "share", "full_attention_layers")


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        mode: "moba", or "full": every layer in full attention.
        tokens: how many it lasts; or
        share: of all the run's steps, between 0 and 1. Neither: the rest.
        full_attention_layers: in MoBA mode, those that stay full; None: those of the run's settings.
    """

    mode: str
    tokens: int | None = None
    share: Fraction | None = None
    full_attention_layers: tuple[int, ...] | None = None

    @classmethod
    def from_mapping(cls, settings: Mapping, where: str) -> "Phase":
        """Raises TypeError, ValueError, naming `where` and the field."""
        if not isinstance(settings, Mapping):
            raise TypeError(f"{where} must be a mapping, but was {settings!r}")
        if unknown := sorted(set(settings) - set(_FIELDS)):
            raise ValueError(f"{where}: unknown field {unknown[0]!r}; the fields are {_FIELDS}")
        mode, tokens, share, layers = (settings.get(name) for name in _FIELDS)
        if mode not in MODES:
            raise ValueError(f"{where}: mode must be one of {MODES}, but was {mode!r}")
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise ValueError(f"{where}: tokens must be an int of at least 1, but was {tokens!r}")
        if share is not None:
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise ValueError(f"{where}: share must lie above 0 and be at most 1, but was {share!r}")
            share = Fraction(str(share))  # 0.1 + 0.2 shall be 0.3
        if layers is not None:
            if mode == "full":
                raise ValueError(f"{where}: full_attention_layers has no meaning in mode full, where all layers are")
            layers = MobaConfig(full_attention_layers=layers).full_attention_layers
        return cls(mode, tokens, share, layers)

    def settings(self, moba: MobaConfig, layers: int) -> MobaConfig:
        """What a model of so many layers trains with in this phase. ValueError for layers that it does not have."""
        full = range(layers) if self.mode == "full" else self.full_attention_layers
        result = moba if full is None else replace(moba, full_attention_layers=tuple(full))
        result.full_layers(layers)
        return result


@dataclass(frozen=True)
class Schedule:
    """Phases one after the other, all measured in tokens or all in shares; see the top of the file."""

    phases: tuple[Phase, ...] = (Phase("moba"),)

    @classmethod
    def from_list(cls, phases: Iterable[Mapping] | None) -> "Schedule":
        """From what a YAML file holds; None: all of the run in MoBA.

        Raises:
            TypeError, ValueError: a field that a phase does not have or a value that it cannot have; phases without an
                end before the last; a mixture of tokens and shares; a last phase that does not take the rest.
        """
        if phases is None:
            return cls()
        if isinstance(phases, (str, Mapping)) or not isinstance(phases, Iterable) or not phases:
            raise TypeError(f"schedule must be a list of phases, but was {phases!r}")
        found = tuple(Phase.from_mapping(phase, f"schedule, phase {i + 1}") for i, phase in enumerate(phases))
        measures = {name for name in ("tokens", "share") for phase in found if getattr(phase, name) is not None}
        if len(measures) > 1:
            raise ValueError("schedule: give tokens in every phase, or share in every phase, but not both")
        for i, phase in enumerate(found[:-1]):
            if phase.tokens is None and phase.share is None:
                raise ValueError(f"schedule, phase {i + 1} needs tokens or share: only the last one takes the rest")
        total = sum(phase.share or 0 for phase in found)
        closed = found[-1].share is not None
        if found[-1].tokens is not None or (closed and total != 1) or (not closed and total >= 1):
            raise ValueError(
                "schedule: the last phase takes the rest: leave out its tokens and share"
                + (f" (the shares sum to {float(total):g})" if "share" in measures else "")
            )
        return cls(found)

    def at(self, step: int, max_steps: int, tokens: int) -> int:
        """Number of the phase that a step belongs to.

        Args:
            step: steps done before it. max_steps: of the run. tokens: seen before it.
        """
        end = 0
        for number, phase in enumerate(self.phases[:-1]):
            end += phase.tokens or phase.share
            if (tokens if phase.tokens else Fraction(step, max_steps)) < end:
                return number
        return len(self.phases) - 1

    def check(self, moba: MobaConfig, layers: int) -> None:
        """ValueError where a phase names layers that a model of so many layers does not have."""
        for phase in self.phases:
            phase.settings(moba, layers)


class ModeSwitch(TrainerCallback, ExportableState):
    """Trains every step in the mode that the schedule says; between steps the model has its MoBA settings.

    A switch changes `config.moba` and nothing else: in mode full every layer is one of its full_attention_layers. No
    weight, optimizer state or module is touched; document boundaries and sequence parallelism work as in MoBA mode.
    Between steps (evaluation, saving, and at the end) the settings are those of the latest MoBA phase, or of the run.

    `config.moba_trained_tokens`, tokens trained with a sparse layer, this run's added to those before it, is kept up to
    date and saved with every checkpoint. Needs attn_implementation "moba" and include_num_input_tokens_seen.

    Args:
        phases: as `Schedule.from_list` takes them.

    Attributes:
        sparse_layers: layers that ran MoBA in the latest step; 0 in mode full.
        moba_tokens: trained with a sparse layer in this run, before an interruption too.
    """

    def __init__(self, phases: list | None = None):
        self.phases, self.schedule = phases, Schedule.from_list(phases)
        self.sparse_layers, self.moba_tokens, self.tokens_before = 0, 0, 0
        self._number = self._seen = self._moba = self._config = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.include_num_input_tokens_seen in (False, "no"):
            raise ValueError("the schedule counts tokens: set include_num_input_tokens_seen: all")
        if model.config._attn_implementation != "moba":
            raise ValueError(
                f"the schedule needs attn_implementation='moba', but it was {model.config._attn_implementation!r}"
            )
        self._config = model.config.get_text_config(decoder=True)
        self._moba = MobaConfig.from_dict(self._config.moba or {})
        self.schedule.check(self._moba, self._config.num_hidden_layers)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.moba_tokens = saved.get("moba_tokens", 0)
        self.tokens_before = saved.get("tokens_before", getattr(model.config, "moba_trained_tokens", None) or 0)
        if self.moba_tokens:  # resumed: the next steps may be in full attention, and be saved
            model.config.moba_trained_tokens = self.tokens_before + self.moba_tokens
        self._rest(self.schedule.at(state.global_step, state.max_steps, state.num_input_tokens_seen))

    def on_step_begin(self, args, state, control, **kwargs):
        seen, layers = state.num_input_tokens_seen, self._config.num_hidden_layers
        number = self.schedule.at(state.global_step, state.max_steps, seen)
        settings = self.schedule.phases[number].settings(self._moba, layers)
        self.sparse_layers = layers - len(settings.full_layers(layers))
        if number != self._number and state.is_world_process_zero:
            mode = f"MoBA in {self.sparse_layers} of {layers} layers" if self.sparse_layers else "full attention"
            logger.info("Step %d, after %s tokens: %s.", state.global_step + 1, f"{seen:,}", mode)
        self._number, self._seen = number, seen
        self._config.moba = settings.to_dict()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._rest(self._number)
        if self.sparse_layers:
            self.moba_tokens += state.num_input_tokens_seen - self._seen
            model.config.moba_trained_tokens = self.tokens_before + self.moba_tokens

    def _rest(self, number: int) -> None:
        """Settings between steps."""
        past = [phase for phase in self.schedule.phases[: number + 1] if phase.mode == "moba"]
        settings = past[-1].settings(self._moba, self._config.num_hidden_layers) if past else self._moba
        self._config.moba = settings.to_dict()

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        attributes = {"moba_tokens": self.moba_tokens, "tokens_before": self.tokens_before}
        return {"args": {"phases": self.phases}, "attributes": attributes}
