"""A model's settings as metadata of a GGUF file, both ways: from a Config, and to the contents of a config.json.

What all architectures have alike is here; a family adds its own in `gguf(config)` and in `from_gguf(said)`. A file is
taken in if its metadata is what would be written for the model that it gives, so that no setting is passed over.
"""

import itertools
import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from lit_gpt.conversion.gguf.layout import DIVIDED, NEVER, ROPE_FACTORS, rope_divisors
from lit_gpt.conversion.gguf.reader import GGUFFile
from lit_gpt.conversion.gguf.tokenizer import Vocabulary
from lit_gpt.errors import UserError
from lit_gpt.families.registry import families
from lit_gpt.families.tables import Layout
from lit_gpt.model.config import Config

# Metadata that says nothing about what is computed, or that `hf_rope_scaling` reads and refuses.
APART = {
    "context_length", "vocab_size", "tensor_data_layout", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip


def metadata(config: Config, layout: Layout) -> dict[str, Any]:
    """Return the metadata for a model's architecture."""
    window = None if layout.keeps_window else config.sliding_window
    eps = "layer_norm_epsilon" if config.norm_class.endswith("LayerNorm") else "layer_norm_rms_epsilon"
    mixes = [layer for layer in range(config.n_layer) if config.mixer(layer) == "attention"]
    groups = [config.n_query_groups if layer in mixes else 0 for layer in range(config.n_layer)]
    fields = {
        "block_count": config.n_layer,
        "context_length": min(config.block_size, window or config.block_size),
        "embedding_length": config.n_embd,
        "feed_forward_length": config.dense_intermediate_size or config.intermediate_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": groups if config.mixers else config.n_query_groups,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        f"attention.{eps}": config.norm_eps,
        "rope.dimension_count": config.rope_n_elem,
        "rope.freq_base": config.rope_base,
        "vocab_size": config.padded_vocab_size,
        **(experts(config) if config.n_expert else {}),
        **rope_scaling(config, layout),
        **layout.metadata,
    }
    return {f"{layout.architecture}.{key}": value for key, value in fields.items()}


def experts(config: Config) -> dict[str, Any]:
    """Return the metadata for experts."""
    return {
        "expert_count": config.n_expert,
        "expert_used_count": config.n_expert_per_token,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_shared_feed_forward_length": config.shared_intermediate_size or None,
        "leading_dense_block_count": len(config.dense_layers) or None,
    }


def rope_scaling(config: Config, layout: Layout) -> dict[str, Any]:
    """Return the metadata for rotary scaling; there is none for what is a tensor of divisors."""
    scaling = config.rope_scaling
    if not scaling or scaling["rope_type"] in DIVIDED:
        return {}
    key = "rope.scaling."
    if scaling["rope_type"] == "linear":
        return {key + "type": "linear", key + "factor": float(scaling["factor"])}
    plain = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}
    plain.update(layout.scaling)
    if math.isclose(scaling.get("attention_factor") or 0, 0.1 * math.log(scaling.get("factor") or 1) + 1, rel_tol=1e-6):
        plain.add("attention_factor")  # the one that is taken where none is given
    further = sorted(name for name, value in scaling.items() if name not in plain and value is not None)
    if scaling["rope_type"] != "yarn" or further or not (layout.rounds_yarn or scaling.get("truncate", True)):
        what = ", ".join(further) or ("truncate" if scaling["rope_type"] == "yarn" else scaling["rope_type"])
        raise UserError(f"--format gguf: rotary scaling with {what} is not known of llama.cpp")
    return {
        key + "type": "yarn",
        key + "factor": float(scaling["factor"]),
        key + "original_context_length": scaling.get("original_max_position_embeddings") or config.block_size,
        key + "yarn_beta_fast": float(scaling.get("beta_fast") or 32),
        key + "yarn_beta_slow": float(scaling.get("beta_slow") or 1),
    }


@dataclass(frozen=True)
class Said:
    """What a file says about its model; keys are without the architecture. See `lit_gpt.families.tables.Said`."""

    file: GGUFFile
    architecture: str

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        return self.file.get(f"{self.architecture}.{key}", kind, default)

    def need(self, key: str, kind: type) -> Any:
        return self.file.need(f"{self.architecture}.{key}", kind)

    def each(self, key: str, kind: type) -> list[Any]:
        if isinstance(self.file.fields.get(f"{self.architecture}.{key}"), list):
            return self.file.need_list(f"{self.architecture}.{key}", kind)
        return [self.get(key, kind)] * self.need("block_count", int)

    def holds(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        head_size = self.get("attention.key_length", int) or (
            self.need("embedding_length", int) // head_counts(self)[0]
        )
        base, rotated = self.get("rope.freq_base", float, 10000.0), self.get("rope.dimension_count", int, head_size)
        return hf_rope_scaling(self, base, rotated)


def family_of(file: GGUFFile) -> ModuleType:
    """Return the family of a file; raise UserError if it is of none, or is one of several files of a model."""
    architecture = file.need("general.architecture", str)
    readers = [family for family in families() if hasattr(family, "from_gguf")]
    named = [family for family in readers if architecture in family.ARCHITECTURES]
    if not named:
        known = sorted({name for family in readers for name in family.ARCHITECTURES})
        raise UserError(
            f"{file.path}: general.architecture is '{architecture}', which cannot be converted; expected one of "
            f"{', '.join(known)}"
        )
    if (parts := file.get("split.count", int, 1)) > 1:
        raise UserError(f"{file.path}: one of {parts} files of a model; merge them first (llama-gguf-split --merge)")
    marked = [f for f in named if hasattr(f, "MARK") and file.fields.get(f"{architecture}.{f.MARK}")]
    return (marked or [f for f in named if not hasattr(f, "MARK")])[0]


def check_metadata(file: GGUFFile, config: Config, layout: Layout) -> None:
    """Refuse a file whose metadata is not what would be written for its model.

    Raises:
        UserError: names the key, and the only value that will do if there is one.
    """
    written, prefix = metadata(config, layout), f"{layout.architecture}."
    # with experts in all layers, the size of others' MLPs says nothing
    apart = APART | ({"feed_forward_length"} if config.n_expert and not config.dense_layers else set())
    for key, value in file.fields.items():
        if not key.startswith(prefix) or key.removeprefix(prefix) in apart:
            continue
        if key.endswith(".sliding_window") and value == config.sliding_window:
            continue  # whether llama.cpp keeps it or cuts the context to it
        expected = written.get(key)
        if expected is None and value:
            raise UserError(f"{file.path}: the metadata {key} ({value}) is a feature that is not supported")
        if isinstance(expected, float) and isinstance(value, (int, float)):
            same = math.isclose(value, expected, rel_tol=1e-6)
        else:
            same = value == expected
        if expected is not None and not same:
            raise UserError(f"{file.path}: the metadata {key} is {value}; only {expected} will do")


def head_counts(said: Said) -> tuple[int, int]:
    """Return the number of query heads, and that of key and value heads in the layers that have them."""
    key = f"{said.architecture}.attention.head_count_kv"
    if said.holds("blk.0.ssm_x.weight"):  # Mamba, whose layers are no attention
        return 1, 1
    heads = said.need("attention.head_count", int)
    if isinstance(said.file.fields.get(key), list):  # of each layer, 0 in those that mix tokens by something else
        kv_heads = max(said.file.need_list(key, int), default=0)
    else:
        kv_heads = said.file.get(key, int) or heads
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{said.file.path}: {heads} heads (attention.head_count) cannot share {kv_heads} (.._kv)")
    return heads, kv_heads


def hf_config(file: GGUFFile, tokens: Vocabulary, dtype: torch.dtype) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises:
        UserError: the file lacks what its family needs, or has what config.json cannot express.
    """
    family = family_of(file)
    said = Said(file, file.need("general.architecture", str))
    heads, kv_heads = head_counts(said)
    n_embd = said.need("embedding_length", int)
    head_size = said.get("attention.key_length", int) or n_embd // heads
    if not said.holds("token_embd.weight"):
        raise UserError(f"{file.path}: lacks the tensor token_embd.weight; a vocabulary without a model?")
    return {
        "attention_bias": said.holds("blk.0.attn_q.bias"),
        "mlp_bias": said.holds("blk.0.ffn_up.bias"),
        "hidden_act": "silu",
        "hidden_size": n_embd,
        "head_dim": head_size,
        "intermediate_size": said.each("feed_forward_length", int)[0] or 0,
        "num_hidden_layers": said.need("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": said.need("context_length", int),
        "rms_norm_eps": said.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": said.get("rope.freq_base", float, 10000.0),
        "rope_scaling": said.rope_scaling,
        "tie_word_embeddings": not said.holds("output.weight"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "bos_token_id": tokens.named["bos_token"],
        "eos_token_id": tokens.named["eos_token"],
        "pad_token_id": tokens.named["pad_token"],
        "dtype": str(dtype).removeprefix("torch."),
        **family.from_gguf(said),
    }


def hf_rope_scaling(said: Said, base: float, rotated: int) -> dict[str, Any] | None:
    """Return config.json's rope_scaling."""
    key = "rope.scaling."
    factors = said.holds(ROPE_FACTORS)
    factor = said.get(key + "factor", float) or said.get("rope.scale_linear", float) or 1.0
    kind = said.get(key + "type", str) or "linear"  # as llama.cpp takes a lone factor
    if kind == "none" or factor == 1.0:
        return divided_scaling(said.file, base, rotated) if factors else None
    if kind not in ("linear", "yarn") or factors:
        extra = f" together with the tensor {ROPE_FACTORS}" if factors else ""
        raise UserError(f"{said.file.path}: {said.architecture}.{key}type '{kind}'{extra} is not supported")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": said.need(key + "original_context_length", int),
        "beta_fast": said.get(key + "yarn_beta_fast", float, 32.0),
        "beta_slow": said.get(key + "yarn_beta_slow", float, 1.0),
    }


def divided_scaling(file: GGUFFile, base: float, rotated: int) -> dict[str, Any] | None:
    """Return a scaling of which the file holds only the divisor of each frequency: Llama 3.1's and later, or Gemma 4's.

    All published models but Llama 4's, which do not blend, blend between 1 and 4 turns within the original context, so
    only that context is searched for.
    """
    divisors = file.read(ROPE_FACTORS)
    if torch.all(divisors == 1):
        return None
    turning = int((divisors == 1).sum())
    if torch.all(divisors[turning:] == NEVER):
        return {"rope_type": "proportional", "partial_rotary_factor": turning / len(divisors)}
    head = Config("", "llama", n_layer=1, n_head=1, n_embd=rotated, vocab_size=1, block_size=1, rope_base=base)
    originals = 8192, *(2**n for n in range(4, 21))
    for high, original in itertools.product((4.0, 1.0), originals):
        scaling = {
            "rope_type": "llama3",
            "factor": divisors.max().item(),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        expected = rope_divisors(replace(head, rope_scaling=scaling))
        if divisors.shape == expected.shape and torch.allclose(divisors, expected, rtol=1e-5, atol=0):
            return scaling
    raise UserError(f"{file.path}: the tensor {ROPE_FACTORS} is no scaling that config.json can express")
