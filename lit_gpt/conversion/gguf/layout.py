"""Where a model's tensors lie in a GGUF file: one table for reading and writing.

llama.cpp has one set of names for all architectures. A family says what is different about its own in `gguf(config)`.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import gguf
from torch import Tensor

from lit_gpt.conversion import weights
from lit_gpt.errors import UserError
from lit_gpt.families.registry import family_of_config
from lit_gpt.families.tables import ExpertStacks, Layout, Named, Offset, Place, Stacked, Table, Turned, neighbors_apart
from lit_gpt.model.config import Config
from lit_gpt.model.rope import rope_frequencies

ROPE_FACTORS = "rope_freqs.weight"
DIVIDED = ("llama3", "proportional")  # rotary scaling that is a tensor of divisors
NEVER = 1e30  # by which a frequency is divided that is 0
# Modules whose tensors lie there as they are here.
NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "ln_e": "token_embd_norm", "ln_f": "output_norm", "lm_head": "output",
    "h.{}.norm_1": "blk.{}.attn_norm", "h.{}.norm_2": "blk.{}.ffn_norm",
    "h.{}.post_norm_1": "blk.{}.post_attention_norm", "h.{}.post_norm_2": "blk.{}.post_ffw_norm",
    "h.{}.attn.qk_norm.q": "blk.{}.attn_q_norm", "h.{}.attn.qk_norm.k": "blk.{}.attn_k_norm",
    "h.{}.attn.proj": "blk.{}.attn_output", "h.{}.mlp.fc": "blk.{}.ffn_up", "h.{}.mlp.proj": "blk.{}.ffn_down",
    "h.{}.mlp.router": "blk.{}.ffn_gate_inp", "h.{}.mlp.shared.proj": "blk.{}.ffn_down_shexp",
    "h.{}.mlp.shared_gate": "blk.{}.ffn_gate_inp_shexp",
}  # fmt: skip


def layout_of(config: Config) -> Layout:
    """Return the family's layout; raise UserError if llama.cpp does not know the family, or not with these settings."""
    family = family_of_config(config)
    if not hasattr(family, "gguf"):
        raise UserError(f"--format gguf: the {config.family} family has no layout of llama.cpp here; export it as hf")
    layout = family.gguf(config)
    if config.mlp_class and config.activation not in layout.activations:
        known = " or ".join(layout.activations)
        raise UserError(
            f"--format gguf: llama.cpp computes {layout.architecture} with {known}, not {config.activation}"
        )
    return layout


def rows(config: Config, layout: Layout) -> Iterator[weights.TensorRow]:
    """Yield the table written out: one row for each tensor of the GPT's state dict, with its names in a GGUF file.

    Raises:
        UserError: llama.cpp has no place for one of them.
    """
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = {gguf.TENSOR_NAMES[tensor].format(bid="{}") for tensor in gguf.MODEL_TENSORS[kinds[layout.architecture]]}
    common = places(config, layout)
    for row in weights.rows(config):
        place = weights.entry(layout.places, row.lit) or mlp_place(row) or weights.entry(common, row.lit)
        if place is None or not known.issuperset(map(in_general, place.modules)):
            raise UserError(f"--format gguf: llama.cpp's {layout.architecture} has no place for the tensor {row.lit}")
        yield weights.row_of(row.lit, row.shape, place)


def in_general(name: str) -> str:
    """Return a tensor's name without its layer and its kind, as the package gguf lists it."""
    return re.sub(r"^blk\.\d+\.", "blk.{}.", re.sub(r"\.(weight|bias|scale)$", "", name))


def places(config: Config, layout: Layout) -> Table:
    """Return the places of what all architectures have alike."""
    table: dict[str, str | Place] = {
        ours: Offset((name,), layout.norm_offset) if layout.norm_offset and "norm" in name else name
        for ours, name in NAMES.items()
    }
    qkv, order = tuple(f"blk.{{}}.attn_{x}" for x in "qkv"), neighbors_apart(config.rope_n_elem, config.head_size)
    sizes = config.qkv_sizes
    table["h.{}.attn.qkv"] = Turned(qkv, sizes, order) if layout.interleaved else Stacked(qkv, sizes)
    table["h.{}.attn.sinks"] = Named(("blk.{}.attn_sinks.weight",))
    table["h.{}.mlp.router.e_score_correction_bias"] = Named(("blk.{}.exp_probs_b.bias",))
    return table


def mlp_place(row: weights.TensorRow) -> Place | None:
    """Return the place of gate and up, which lie apart, and of experts, which lie together."""
    layer, _, module = row.lit.rpartition(".mlp.")
    if not layer:
        return None
    name, _, kind = module.rpartition(".")
    experts = len(row.shape) == (3 if kind == "weight" else 2)
    suffix = "_exps" if experts else "_shexp" if name.startswith("shared.") else ""
    if name.endswith("gate_up"):
        half = row.shape[1 if experts else 0] // 2
        modules = tuple(f"blk.{{}}.ffn_{part}{suffix}" for part in ("gate", "up"))
        return (ExpertStacks if experts else Stacked)(modules, (half, half))
    return Place((f"blk.{{}}.ffn_{'down' if name == 'proj' else 'up'}{suffix}",)) if experts else None


def rope_divisors(config: Config) -> Tensor:
    """Return what rotary scaling divides each frequency by, float32 (rope_n_elem / 2,)."""
    config = config.without_window
    divisors = rope_frequencies(replace(config, rope_scaling=None))[0] / rope_frequencies(config)[0]
    return divisors.clamp(max=NEVER)
