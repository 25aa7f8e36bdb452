"""What is planned: the shape of a model, the work asked of it, and how GPUs share it."""

from dataclasses import dataclass, replace

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CHECKPOINTING = ("none", "layer", "offload")


@dataclass(frozen=True)
class ModelShape:
    """A decoder as in Llama: grouped-query attention, gated MLP, no biases. Sizes in elements."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False  # the output head is the embedding

    @property
    def matrix_elements(self) -> int:
        """Elements of one layer's matrices: query, key, value, output; gate, up, down."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """The matrices and two norms."""
        return self.matrix_elements + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Every parameter: layers, embedding, output head unless tied, last norm."""
        tables = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * self.layer_parameters + tables + self.hidden

    def llama_settings(self) -> dict:
        """Arguments of Transformers' LlamaConfig for a model of this shape, the sizes alone."""
        return {
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "tie_word_embeddings": self.tied,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config, name: str = "") -> "ModelShape":
        """The shape in a Transformers config. ValueError where the formulas would be wrong (mixtures of experts)."""
        config = config.get_text_config(decoder=True)
        experts = [n for n in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(config, n, None)]
        if experts:
            raise ValueError(f"the planner knows dense decoders only, but the config of {name!r} has {experts[0]}")
        heads = config.num_attention_heads
        return cls(
            name or config.model_type, config.num_hidden_layers, config.hidden_size, heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.intermediate_size, config.vocab_size, bool(getattr(config, "tie_word_embeddings", False)),
        )  # fmt: skip


# From the models' public config.json: no network is needed to plan for them.
PRESETS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied=True),
    )
}


def load_shape(model: str) -> ModelShape:
    """A preset's name, or whatever AutoConfig takes: a folder or a hub id (only its config.json is read)."""
    if model in PRESETS:
        return PRESETS[model]
    from transformers import AutoConfig

    return ModelShape.from_config(AutoConfig.from_pretrained(model), model)


@dataclass(frozen=True)
class Work:
    """What a model is asked to do.

    Attributes:
        length: tokens of one sequence. batch: sequences computed together by one group of GPUs.
        block_size, top_k: MoBA's; top_k counts the own block. full_layers: how many layers keep full attention.
        decode: "full" or "moba": how one new token attends the cache.
        dtype: of weights, activations and cache.
        mixed: training keeps float32 weights, gradients and Adam moments beside `dtype`; else everything is in `dtype`.
        checkpointing: "none": every activation is kept for the backward; "layer": each layer's input, the rest is
            recomputed; "offload": these inputs wait in host memory.
        fused_loss: logits exist for a tile of tokens at a time (liger, DeepSpeed TiledFusedLogitsLoss).
        mlp_tiles: the MLP works through the tokens in so many parts (DeepSpeed TiledMLP); training only.
        prefill_chunk: tokens of a prompt that go through the model at a time; 0: all.
    """

    length: int
    block_size: int = 4096
    top_k: int = 12
    full_layers: int = 0
    batch: int = 1
    decode: str = "full"
    dtype: str = "bfloat16"
    mixed: bool = True
    checkpointing: str = "layer"
    fused_loss: bool = True
    mlp_tiles: int = 1
    prefill_chunk: int = 0

    def __post_init__(self):
        for name in ("length", "block_size", "top_k", "batch", "mlp_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but was {getattr(self, name)}")
        for name in ("full_layers", "prefill_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, but was {getattr(self, name)}")
        allowed = {"dtype": tuple(DTYPE_BYTES), "checkpointing": CHECKPOINTING, "decode": ("full", "moba")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, but was {getattr(self, name)!r}")

    @property
    def item(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def sparse(self) -> bool:
        """Whether MoBA leaves out anything at all: block_size · top_k does not cover the sequence."""
        return self.block_size * self.top_k < self.length

    def at(self, length: int) -> "Work":
        return replace(self, length=length)


@dataclass(frozen=True)
class Sharing:
    """How GPUs share a model: sequence · stages · replicas of them.

    sequence: ranks that split the tokens, and inside attention the heads (Ulysses). A rank holds heads / sequence query
        heads and at least one KV head, so beyond kv_heads ranks the KV heads are replicated.
    stages: ranks that split the layers (inference only: chunks of the prompt follow each other through them).
    replicas: such groups, each with sequences of its own.
    In training weights, gradients and moments are split over all GPUs (FSDP); in inference over one group.
    """

    sequence: int = 1
    stages: int = 1
    replicas: int = 1

    @property
    def gpus(self) -> int:
        return self.sequence * self.stages * self.replicas

    def local_heads(self, shape: ModelShape) -> tuple[int, int]:
        """Query and KV heads of one rank. ValueError where Ulysses cannot split the query heads so."""
        if shape.heads % self.sequence:
            raise ValueError(f"{shape.heads} heads cannot be split over {self.sequence} sequence-parallel ranks")
        return shape.heads // self.sequence, max(1, -(-shape.kv_heads // self.sequence))

    def local_layers(self, shape: ModelShape) -> int:
        return -(-shape.layers // self.stages)


def sharings(shape: ModelShape, gpus: int, training: bool) -> list[Sharing]:
    """Ways to share a model over so many GPUs, the least split first: degrees are powers of two that fit the heads."""
    degrees = [n for n in (2**i for i in range(20)) if n <= gpus and gpus % n == 0 and shape.heads % n == 0] or [1]
    found = []
    for sequence in degrees:
        rest = gpus // sequence
        stages = [1] if training else [n for n in (2**i for i in range(20)) if rest % n == 0 and n <= shape.layers]
        found += [Sharing(sequence, n, rest // n) for n in stages]
    # ranks beyond the KV heads replicate them: at equal size, stages are the better split of a cache
    return sorted(found, key=lambda s: (s.sequence * s.stages, max(1, s.sequence // shape.kv_heads), s.stages))
