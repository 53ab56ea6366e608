"""The configuration of a model. Which checkpoints exist is the families' business (lit_gpt/families)."""

import json
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError


@dataclass
class Config:
    """The architecture of a GPT.

    Sizes count elements; `padded_vocab_size` is the number of rows of the stored embedding, `vocab_size` that of the
    ids in use. `rope_scaling` holds the fields of the Hugging Face dictionary of the same name ("rope_type", "factor",
    ...) or None.
    """

    name: str
    family: str  # the file in lit_gpt/families that maps its weights
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int  # longest sequence that the model was made for
    padded_vocab_size: int = 0  # 0: vocab_size
    n_query_groups: int = 0  # key and value heads; 1: multi-query, 0: one per head (multi-head)
    head_size: int = 0  # 0: n_embd // n_head
    # positions
    learned_positions: bool = False  # an embedding of block_size positions, which no sequence may exceed
    position_offset: int = 0  # rows of that embedding before the first position's
    alibi: bool = False  # nearer keys weigh more, by a slope per head
    alibi_rounded: bool = False  # see lit_gpt.model.alibi.with_alibi
    rotary_percentage: float = 1.0
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    local_rope_base: float | None = None  # for layers with the window, which then scale nothing; None: rope_base
    unrotated_layers: list[int] = field(default_factory=list)  # these have no positions (Kazemnejad et al. 2023, NoPE)
    # queries are scaled by 1 + query_growth * ln(1 + floor(position / query_growth_length)), and keep their entropy
    query_growth: float | None = None
    query_growth_length: int = 0
    query_growth_start: int = 0  # the first position's number
    query_growth_unrotated: bool = False  # those of the unrotated layers are scaled, and no others
    # attention
    sliding_window: int | None = None  # a token sees this many, itself included
    global_layers: list[int] = field(
        default_factory=list
    )  # these see all tokens in spite of window or chunks; families.fields.windows chooses them
    attention_chunk: int | None = None  # but for global_layers, a token sees none before its chunk of so many
    attention_scale: float | None = None  # multiplies the scores; None: head_size ** -0.5
    attention_softcap: float | None = None  # see lit_gpt.kernels.attention.ScoreParams
    qk_norm: str | None = None  # over the "projection"s of queries and keys, each "head", or "heads": own weights each
    qk_norm_class: str = ""  # a key of lit_gpt.model.norms.NORMS; "": norm_class
    qk_norm_rotated: bool = False  # they are normed after they are rotated, not before, and only if they are
    clip_qkv: float | None = None  # queries, keys and values are clamped to this from 0 on either side
    attention_sinks: bool = False  # a score of each head's own, of a key without a value (Xiao et al. 2024)
    attention_gate: bool = False  # a sigmoid of another projection multiplies what attention gives, element by element
    value_norm: bool = False  # each head's values are normed, without weights
    # layers without the window may have heads of another size, and another number of key and value heads
    global_head_size: int = 0  # 0: head_size
    global_query_groups: int = 0  # 0: n_query_groups
    values_from_keys: list[int] = field(default_factory=list)  # these layers' values are the keys before norm, rotation
    # each layer attends to the keys and values of this one, itself or one before it; []: all to their own
    kv_layers: list[int] = field(default_factory=list)
    # latent attention: queries, and all heads' keys and values, are made of fewer numbers
    query_latent: int = 0  # so many, normed, make the queries; 0: the input does
    latent_size: int = 0  # make keys and values, and are what a cache holds
    rotated_size: int = 0  # of a head, and of one key that all heads share; 0: what rotary_percentage says
    value_head_size: int = 0
    # token mixers besides attention
    # each layer's: "attention", a key of mixers.registry.MIXERS, or both beside each other, "attention+" and such a key
    mixers: list[str] = field(default_factory=list)
    # of both, attention's first: these multiply what they are given, and what they give
    mixer_input_scales: list[float] = field(default_factory=lambda: [1.0, 1.0])
    mixer_output_scales: list[float] = field(default_factory=lambda: [1.0, 1.0])
    conv_size: int = 4  # tokens that a mixer's convolution sees, itself included
    conv_bias: bool = False
    state_heads: int = 0  # a recurrence's state has so many heads, each (state_size, state_head_size)
    state_head_size: int = 0  # of a value
    state_groups: int = 0  # heads of queries and keys, which as many heads of values share
    state_size: int = 0  # of a query or key
    state_norm_eps: float = 1e-6  # of Mamba's norms of queries, keys and time steps
    state_norm_groups: int = 1  # Mamba-2's output is normed in so many parts; 0: it is not
    state_scales: list[float] = field(default_factory=list)  # multiply its gate, values, keys, queries and time steps
    min_step: float = 0.0  # Mamba-2's time steps are no shorter
    step_rank: int = 0  # Mamba's time steps are made of so many numbers
    # block
    parallel_residual: bool = False
    shared_attention_norm: bool = False  # with parallel_residual: attention and MLP read one norm
    norm_class: str = "LayerNorm"  # a key of lit_gpt.model.norms.NORMS
    norm_eps: float = 1e-5
    pre_norm: bool = True  # attention and MLP read norms of the stream
    post_norm: bool = False  # norms of what attention and MLP give are added to it
    residual_scale: float = 1.0  # multiplies what attention and MLP add, with sequential residuals
    mlp_class: str = "GptNeoxMLP"  # or XIELUMLP, another key of mlp.MLPS; "": a block is a token mixer alone
    mlp_scales: list[float] = field(default_factory=list)  # of ScaledSwiGLU: multiply the gate, and the output
    sparse_layers: list[int] = field(default_factory=list)  # these have a SparseSwiGLU, which sets to 0
    sparsity: float = 0.0  # this part of its activations
    mixer_layers: list[int] = field(default_factory=list)  # these are a token mixer alone
    layer_input_size: int = 0  # of each layer's own input, see lit_gpt.model.stream.layer_inputs; 0: none
    layer_vocab_size: int = 0  # ids that have such an input of their own; 0: padded_vocab_size
    n_stream: int = 1  # residual streams, of which a layer computes one, see lit_gpt.model.stream.altup
    laurel_rank: int = 0  # of a product beside attention, see there; 0: there is none
    layer_scale: bool = False  # a number that does not train multiplies what a layer gives
    activation: str = "gelu"  # a key of lit_gpt.kernels.functional.ACTIVATIONS
    intermediate_size: int = 0  # 0: 4 * n_embd; of MoE: each expert's
    n_expert: int = 0  # how many experts an MoE has
    n_expert_per_token: int = 0
    router_score: str = "softmax"  # or sigmoid, which scores each expert by itself, or sparsemixer
    router_margin: float = 0.0  # of sparsemixer, see lit_gpt.model.moe.sparse_mixer
    router_bias: bool = False
    router_norm: bool = False  # it reads a norm of its own of the stream, and has a factor for each expert's weights
    router_correction: bool = False  # is added to the scores that choose, not to the weights (DeepSeek-AI 2024, V3)
    n_expert_group: int = 1  # experts are chosen in the `n_group_per_token` best of so many groups
    n_group_per_token: int = 1
    n_best_of_group: int = 2  # a group is as good as so many of its best experts together
    norm_expert_weights: bool = True  # the weights of a token's experts sum to 1
    expert_scale: float = 1.0  # multiplies those weights
    weigh_expert_inputs: bool = False  # they multiply what experts are given, not what they give
    expert_gate: bool = True  # experts are SwiGLUs, else GptNeoxMLPs, as the shared one and dense layers are
    expert_bias: bool = False  # the experts' linear layers have one
    gate_limit: float | None = None  # see lit_gpt.model.mlp.clamped_gate, as for the slope
    gate_slope: float = 1.0
    shared_intermediate_size: int = 0  # of an expert that all tokens go to; 0: there is none
    shared_expert_gate: bool = False  # which each token scales by itself
    dense_layers: list[int] = field(default_factory=list)  # these have one MLP in the place of experts, of this size;
    dense_intermediate_size: int = 0  # or without experts, of another size than the other layers'
    bias: bool = False  # the MLP's linear layers have one
    qkv_bias: bool = False
    proj_bias: bool = False  # the attention's output projection has one
    # the ends
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    head_bias: bool = False
    logit_divisor: float = 1.0
    logit_softcap: float | None = None  # c, by which a logit x becomes c * tanh(x / c)
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for size in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size"):
            if not isinstance(value := getattr(self, size), int) or value < 1:
                raise UserError(f"{self.name}: {size} is {value!r}, expected a whole number above 0")
        for name in (
            "norm_eps",
            "rope_base",
            "rotary_percentage",
            "embedding_scale",
            "residual_scale",
            "logit_divisor",
        ):
            if not isinstance(value := getattr(self, name), int | float):
                raise UserError(f"{self.name}: {name} is {value!r}, expected a number")
        self.padded_vocab_size = self.padded_vocab_size or self.vocab_size
        self.n_query_groups = self.n_query_groups or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.intermediate_size = self.intermediate_size or 4 * self.n_embd
        if self.n_head % self.n_query_groups:
            raise UserError(f"{self.name}: {self.n_head} heads cannot share {self.n_query_groups} key/value heads")

    @property
    def rope_n_elem(self) -> int:
        """Return how many elements of each head are rotated."""
        return self.rotated_size or int(self.rotary_percentage * self.head_size)

    def mlp(self, layer: int) -> tuple[str, int]:
        """Return the class of this layer's MLP, "" for none, and its intermediate size."""
        if layer in self.mixer_layers:
            return "", 0
        if layer in self.dense_layers:
            return "SwiGLU" if self.expert_gate else "GptNeoxMLP", self.dense_intermediate_size
        return "SparseSwiGLU" if layer in self.sparse_layers else self.mlp_class, self.intermediate_size

    def window(self, layer: int) -> int | None:
        """Return how many tokens one sees in this layer, itself included; None for all before it."""
        return None if layer in self.global_layers else self.sliding_window

    def chunk(self, layer: int) -> int | None:
        """Return how many tokens a chunk has beyond which none sees in this layer; None where there are no chunks."""
        return None if layer in self.global_layers else self.attention_chunk

    def mixer(self, layer: int) -> str:
        """Return by what this layer mixes tokens, "attention" unless `mixers` names another."""
        return self.mixers[layer] if self.mixers else "attention"

    def kv_layer(self, layer: int) -> int:
        """Return the layer to whose keys and values this one attends: itself, or one before it."""
        return self.kv_layers[layer] if self.kv_layers else layer

    @property
    def without_window(self) -> "Config":
        """Return the Config with the sizes that attention has in layers without the window."""
        if not (self.global_head_size or self.global_query_groups):
            return self
        head_size, groups = self.global_head_size or self.head_size, self.global_query_groups or self.n_query_groups
        return replace(self, head_size=head_size, n_query_groups=groups)

    def at(self, layer: int) -> "Config":
        """Return the Config with the sizes that attention has in this layer."""
        return self.without_window if self.window(layer) is None else self

    def qkv_rows(self, layer: int) -> tuple[int, int, int]:
        """Return the rows of query, key and value in this layer's fused projection, 0 of what it does not project."""
        q, k, v = self.at(layer).qkv_sizes
        if self.kv_layer(layer) != layer:
            return q, 0, 0
        return q, k, 0 if layer in self.values_from_keys else v

    @property
    def layers_differ(self) -> bool:
        """Return whether layers differ in more than their windows and MLPs."""
        kinds = len({*self.mixers}) > 1
        return bool(kinds or self.kv_layers or self.global_head_size or self.global_query_groups)

    @property
    def other_mixers(self) -> list[int]:
        """Return the layers that mix tokens by something else than attention to keys and values in a cache."""
        return [layer for layer in range(self.n_layer) if self.mixer(layer) != "attention"]

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Return the rows of query, key and value in the fused projection."""
        kv = self.n_query_groups * self.head_size
        return self.n_head * self.head_size, kv, kv

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path) -> "Config":
        """Read the Config of a converted checkpoint folder from its `lit_config.json`.

        Raises:
            UserError: the file is missing, or is not what scripts/convert_hf_checkpoint.py writes.
        """
        path = Path(checkpoint_dir) / "lit_config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"unknown fields {sorted(unknown)}")
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: not a readable model configuration ({error}); convert the checkpoint again with "
                f"`python scripts/convert_hf_checkpoint.py --checkpoint_dir {shlex.quote(str(checkpoint_dir))}`"
            ) from None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"
