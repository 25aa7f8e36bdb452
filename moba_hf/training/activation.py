"""Is MoBA activated yet? What it selects and what it leaves out, in figures and in one sentence."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import MobaConfig
from ..evaluation import recall
from ..evaluation.routing import Routing, record_routing


def attended_pairs(position_ids: torch.Tensor, settings: MobaConfig) -> torch.Tensor:
    """Pairs of query and key that a MoBA layer attends, and those of full attention: float64 [2].

    A query at position p of its document attends p mod B + 1 keys of its own block and B keys of each of
    min(top_k − 1, p // B) past blocks; full attention p + 1. Padding counts as one more document, as it is attended.

    Args:
        position_ids: int [...], from 0 in each document.
    """
    block = settings.block_size
    past = (position_ids // block).clamp(max=settings.top_k - 1)
    pairs = torch.stack([position_ids % block + 1 + past * block, position_ids + 1])
    return pairs.flatten(1).double().sum(1)


@dataclass(frozen=True)
class Selection:
    """What MoBA selects in one held-out document.

    Attributes:
        recall: layer → share of full attention's mass on the own and the selected blocks, of the queries that cannot
            see everything; layers that stay full are asked too. Empty where MoBA sees everything.
        recent: layer that ran sparse → share of those queries whose selected blocks are just the latest ones.
    """

    recall: dict[int, float]
    recent: dict[int, float]

    @classmethod
    def measure(cls, model: PreTrainedModel, input_ids: torch.Tensor, queries: int = 256) -> "Selection":
        """Run the document twice, in full attention and in MoBA.

        Args:
            model: with attn_implementation "moba". input_ids: int64 [1, length], one document.
            queries: how many are looked at, evenly spread.
        """
        settings = MobaConfig.from_dict(model.config.get_text_config(decoder=True).moba)
        if input_ids.shape[1] <= settings.block_size * settings.top_k:
            return cls({}, {})
        masses = recall.measure(model, input_ids, settings, queries)
        routing = record_routing(model, input_ids.to(model.device), queries)
        return cls({layer: mass.selected.mean().item() for layer, mass in masses.items()}, recent(routing, settings))

    def metrics(self) -> dict[str, float]:
        """Figures to be logged: the means, and recall by layer."""
        means = {"recall": self.recall, "recent": self.recent}
        found = {name: sum(of.values()) / len(of) for name, of in means.items() if of}
        return found | {f"recall_layer_{layer:02}": share for layer, share in self.recall.items()}


def recent(routing: Routing, settings: MobaConfig) -> dict[int, float]:
    """Layer → share of queries with a choice (more past blocks than top_k − 1) that chose just the latest blocks."""
    slots, own = settings.top_k - 1, routing.positions // settings.block_size
    choosing = own > slots
    if not choosing.any():
        return {}
    oldest = (own[choosing] - slots)[:, None, None]
    return {
        layer: (selected[choosing] >= oldest).all(-1).float().mean().item()
        for layer, selected in sorted(routing.layers.items())
    }


def activated(
    config: PreTrainedConfig,
    sequence_length: int,
    moba_tokens: int,
    sparsity: float,
    gaps: Mapping[str, float],
    trailing_tokens: int,
) -> str:
    """The answer to "is it activated yet?", in plain words.

    Args:
        config: of the trained model (its text config).
        sequence_length: tokens of a training sequence.
        moba_tokens: trained with a sparse layer.
        sparsity: share of the query-key pairs that sparse layers left out in those.
        gaps: "before" and "after" training, trailing MoBA loss − trailing full loss.
        trailing_tokens: what trailing means.
    """
    settings, layers = MobaConfig.from_dict(config.moba), config.num_hidden_layers
    sight, sparse = settings.block_size * settings.top_k, layers - len(settings.full_layers(layers))
    cost = f"{gaps['after']:+.3f} nats on the last {trailing_tokens:,} positions"
    if sight >= sequence_length:
        return (
            f"Not activated: block_size · top_k = {sight:,} covers all {sequence_length:,} tokens of a sequence: MoBA "
            f"is full attention there, and nothing was trained sparse."
        )
    if moba_tokens == 0:
        return f"Not activated: every token was trained in full attention. Switched on now, MoBA costs {cost}."
    if sparsity == 0:
        return (
            f"Not activated: {moba_tokens:,} tokens were trained in MoBA mode, but no document is longer than "
            f"block_size · top_k = {sight:,}, so nothing was trained sparse. Switched on now, MoBA costs {cost}."
        )
    return (
        f"MoBA is on: {moba_tokens:,} tokens were trained with {sparsity:.1%} of the query-key pairs left out in "
        f"{sparse} of {layers} layers. Beside full attention it costs {cost}; before this run, {gaps['before']:+.3f}."
    )
