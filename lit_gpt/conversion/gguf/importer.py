"""Convert GGUF files, the one-file format of llama.cpp, with Llama models to checkpoint folders.

The tensors are presented under their Hugging Face names, so that `conversion.hf.convert` does the rest. Metadata
becomes config.json and the tokenizer's files. What the file says and this module does not know is refused, not guessed.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt import files
from lit_gpt.conversion import hf
from lit_gpt.conversion.gguf.layout import ROPE_FACTORS, layout_of, places, rope_divisors
from lit_gpt.conversion.gguf.reader import GGUFFile
from lit_gpt.conversion.gguf.tokenizer import Vocabulary, build_tokenizer, tokenizer_config
from lit_gpt.conversion.hf_shards import LazyTensors
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.model.config import Config


def convert(gguf_path: Path, checkpoint_dir: Path, dtype: torch.dtype) -> Config:
    """Write a converted checkpoint folder, whole or not at all.

    Raises:
        UserError: the file is damaged, or holds what cannot be taken over; or the folder holds something.
    """
    with files.new_folder(checkpoint_dir) as folder:
        file = GGUFFile(gguf_path)
        refuse_unknown(file)
        tokens = Vocabulary(file)
        fields = hf_config(file, tokens, dtype)
        write_json(folder / "config.json", fields)
        write_tokenizer(folder, file, tokens)
        config = hf.convert(folder, GGUFWeights(file, config_from_hf(fields), dtype), dtype)
        config = replace(config, name=checkpoint_dir.resolve().name)  # the temporary folder's until here
        (folder / "lit_config.json").write_text(config.to_json())
    return config


def write_tokenizer(folder: Path, file: GGUFFile, tokens: Vocabulary) -> None:
    """Write the files of the tokenizer, the chat template and the end tokens."""
    write_json(folder / "generation_config.json", generation_config(file, tokens))
    write_json(folder / "tokenizer_config.json", tokenizer_config(file, tokens))
    build_tokenizer(file, tokens).save(str(folder / "tokenizer.json"))
    if template := file.get("tokenizer.chat_template", str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class GGUFWeights(LazyTensors):
    """The tensors of a file under their Hugging Face names, each dequantized to `dtype`.

    Raises:
        UserError: a tensor that no such model has, or one whose values do not fit `dtype`.
    """

    def __init__(self, file: GGUFFile, config: Config, dtype: torch.dtype) -> None:
        self.file, self._dtype = file, dtype
        known = {place.name: place for place in places(config, layout_of(config))}
        if unknown := sorted(file.tensors.keys() - known.keys() - {ROPE_FACTORS}):
            raise UserError(
                f"{file.path}: the tensor {unknown[0]} is not part of a {config.family} model of "
                f"{config.n_layer} layers as known here"
            )
        self.places = {place.hf: place for place in known.values() if place.name in file.tensors}

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        tensor = self.file.read(place.name)
        least, most = tensor.aminmax()
        if not (torch.finfo(self._dtype).min <= least and most <= torch.finfo(self._dtype).max):  # nan is neither
            raise UserError(f"{self.file.path}: the tensor {place.name} holds values not finite as {self._dtype}")
        if place.heads and tensor.size(0) % (2 * place.heads):
            shape = f"{place.name} {tuple(tensor.shape)}"
            raise UserError(f"{self.file.path}: the tensor {shape} is not {place.heads} even heads")
        return place.to_hf(tensor).to(self._dtype)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype


# The metadata under "llama." that is read below, or that says nothing about what is computed.
KNOWN = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip


def refuse_unknown(file: GGUFFile) -> None:
    """Raise UserError if it is not a Llama, is one of several files, or has a feature that is not known here."""
    architecture = file.need("general.architecture", str)
    if architecture != "llama":
        raise UserError(f"{file.path}: general.architecture is '{architecture}'; only 'llama' can be converted")
    if (parts := file.get("split.count", int, 1)) > 1:
        raise UserError(f"{file.path}: one of {parts} files of a model; merge them first (llama-gguf-split --merge)")
    for key, value in file.fields.items():
        if key.startswith("llama.") and key.removeprefix("llama.") not in KNOWN and value:
            raise UserError(f"{file.path}: the metadata {key} ({value}) is a feature that is not supported")


def head_counts(file: GGUFFile) -> tuple[int, int]:
    """Return the number of query heads, and that of key and value heads."""
    heads = file.need("llama.attention.head_count", int)
    kv_heads = file.get("llama.attention.head_count_kv", int) or heads
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{file.path}: {heads} heads (llama.attention.head_count) cannot share {kv_heads} (.._kv)")
    return heads, kv_heads


def hf_config(file: GGUFFile, tokens: Vocabulary, dtype: torch.dtype) -> dict[str, Any]:
    """Return the contents of config.json."""
    heads, kv_heads = head_counts(file)
    n_embd = file.need("llama.embedding_length", int)
    head_size = file.get("llama.attention.key_length", int) or n_embd // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := file.get(f"llama.{key}", int, head_size)) != head_size:
            raise UserError(
                f"{file.path}: the metadata llama.{key} is {size}; only the head size, {head_size}, will do"
            )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: lacks the tensor token_embd.weight; a vocabulary without a model?")
    rope_base = file.get("llama.rope.freq_base", float, 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "hidden_act": "silu",
        "hidden_size": n_embd,
        "head_dim": head_size,
        "intermediate_size": file.need("llama.feed_forward_length", int),
        "num_hidden_layers": file.need("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": file.need("llama.context_length", int),
        "rms_norm_eps": file.need("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": rope_base,
        "rope_scaling": rope_scaling(file, rope_base, head_size),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "bos_token_id": tokens.named["bos_token"],
        "eos_token_id": tokens.named["eos_token"],
        "pad_token_id": tokens.named["pad_token"],
        "dtype": str(dtype).removeprefix("torch."),
    }


def generation_config(file: GGUFFile, tokens: Vocabulary) -> dict[str, Any]:
    """Return the contents of generation_config.json: the end tokens of a text, a turn and a message all stop."""
    stops = [tokens.named["eos_token"], *(file.get(f"tokenizer.ggml.{x}_token_id", int) for x in ("eot", "eom"))]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    return {
        "bos_token_id": tokens.named["bos_token"],
        "eos_token_id": stops if len(stops) > 1 else (stops or [None])[0],
    }


def rope_scaling(file: GGUFFile, base: float, head_size: int) -> dict[str, Any] | None:
    """Return config.json's rope_scaling."""
    key = "llama.rope.scaling."
    factor = file.get(key + "factor", float) or file.get("llama.rope.scale_linear", float) or 1.0
    kind = file.get(key + "type", str) or "linear"  # as llama.cpp takes a lone factor
    if kind == "none" or factor == 1.0:
        return llama3_scaling(file, base, head_size) if ROPE_FACTORS in file.tensors else None
    if kind not in ("linear", "yarn") or ROPE_FACTORS in file.tensors:
        extra = f" together with the tensor {ROPE_FACTORS}" if ROPE_FACTORS in file.tensors else ""
        raise UserError(f"{file.path}: {key}type '{kind}'{extra} is not supported")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.need(key + "original_context_length", int),
        "beta_fast": file.get(key + "yarn_beta_fast", float, 32.0),
        "beta_slow": file.get(key + "yarn_beta_slow", float, 1.0),
    }


def llama3_scaling(file: GGUFFile, base: float, head_size: int) -> dict[str, Any] | None:
    """Return the scaling of Llama 3.1 and later, of which the file holds only the divisor of each frequency.

    All published models blend between 1 and 4 turns within the original context, so only that context is searched for.
    """
    divisors = file.read(ROPE_FACTORS)
    if torch.all(divisors == 1):
        return None
    head = Config("", "llama", n_layer=1, n_head=1, n_embd=head_size, vocab_size=1, block_size=1, rope_base=base)
    for original in (8192, *(2**n for n in range(4, 21))):
        scaling = {
            "rope_type": "llama3",
            "factor": divisors.max().item(),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = rope_divisors(replace(head, rope_scaling=scaling))
        if divisors.shape == expected.shape and torch.allclose(divisors, expected, rtol=1e-5, atol=0):
            return scaling
    raise UserError(f"{file.path}: the tensor {ROPE_FACTORS} is no scaling that config.json can express (llama3)")
