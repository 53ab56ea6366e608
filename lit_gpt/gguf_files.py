"""GGUF, the one-file format of llama.cpp: its Llama models as a checkpoint folder.

The tensors are presented under their Hugging Face names, so that `hf_files.convert` does the rest. Metadata becomes
config.json and the tokenizer's files. What the file says and this module does not know is refused, not guessed.
"""

import json
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from lit_gpt import checkpoint, hf_files
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.model import rope_llama3


def convert(gguf_path: Path, checkpoint_dir: Path, dtype: torch.dtype) -> Config:
    """Write a converted checkpoint folder, whole or not at all.

    Raises:
        UserError: the file is damaged, or holds what cannot be taken over; or the folder holds something.
    """
    with checkpoint.new_folder(checkpoint_dir) as folder:
        file = GGUFFile(gguf_path)
        refuse_unknown(file)
        tokens = Vocabulary(file)
        write_json(folder / "config.json", hf_config(file, tokens, dtype))
        write_json(folder / "generation_config.json", generation_config(file, tokens))
        write_json(folder / "tokenizer_config.json", tokenizer_config(file, tokens))
        build_tokenizer(file, tokens).save(str(folder / "tokenizer.json"))
        if template := file.get("tokenizer.chat_template", str):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        config = hf_files.convert(folder, LlamaWeights(file, dtype), dtype)
        config = replace(config, name=Path(checkpoint_dir).resolve().name)  # the temporary folder's until here
        (folder / "lit_config.json").write_text(config.to_json())
    return config


def write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the file

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `nbytes` from `start`, the last dimension of `shape` in blocks of `kind`."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file, mapped.

    Attributes:
        fields: its metadata.
        tensors: {name: where it lies}.

    Raises:
        UserError: it is not a whole GGUF file, or holds a type of tensor that cannot be dequantized.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        with open(path, "rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file; it begins with {magic}, expected b'GGUF'")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 4
        try:
            version, n_tensors, n_fields = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
            if version not in (2, 3):
                raise UserError(f"{path}: GGUF version {version}, expected 2 or 3 in little-endian order")
            self.fields = {self._string(): self._value(self._scalar("I")) for _ in range(n_fields)}
            heads = [self._tensor_head() for _ in range(n_tensors)]
        except (struct.error, ValueError, KeyError, RecursionError) as error:
            raise UserError(f"{path}: damaged or truncated, its header ends in garbage ({error!r})") from None
        alignment = max(self.get("general.alignment", int, 32), 1)
        base = -(-self.at // alignment) * alignment
        self.tensors = {name: self._stored(name, shape, kind, base + offset) for name, shape, kind, offset in heads}

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value. Floats come as the shortest decimal that is the stored float32 (1e-05)."""
        if (value := self.fields.get(key)) is None:
            return default
        if not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"{self.path}: the metadata {key} is of type {type(value).__name__}, not {kind.__name__}")
        return float(str(np.float32(value))) if kind is float else value

    def need(self, key: str, kind: type) -> Any:
        """The same where there is no default; a number must be above 0."""
        value = self.get(key, kind)
        if value is None:
            raise UserError(f"{self.path}: lacks the metadata {key}")
        if kind in (int, float) and value <= 0:
            raise UserError(f"{self.path}: the metadata {key} is {value}, expected a number above 0")
        return value

    def need_list(self, key: str, kind: type) -> list:
        """The same for a list of values of one type."""
        values = self.need(key, list)
        if not all(isinstance(value, kind) for value in values):
            raise UserError(f"{self.path}: the metadata {key} is not a list of {kind.__name__}")
        return values

    def read(self, name: str) -> Tensor:
        """A tensor, dequantized to float32."""
        stored = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, stored.nbytes, stored.start).reshape(*stored.shape[:-1], -1)
        return torch.from_numpy(np.require(dequantize(raw, stored.kind), requirements="W"))

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        start = self.at + 8
        self.at = start + self._scalar("Q")
        if self.at > len(self.data):
            raise ValueError("a string runs past the end of the file")
        return self.data[start : self.at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            kind, length = self._scalar("I"), self._scalar("Q")
            return [self._value(kind) for _ in range(length)]
        return self._scalar(SCALARS[kind])

    def _tensor_head(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        sizes = [self._scalar("Q") for _ in range(self._scalar("I"))]
        return name, tuple(reversed(sizes)), self._scalar("I"), self._scalar("Q")

    def _stored(self, name: str, shape: tuple[int, ...], number: int, start: int) -> Stored:
        kind = str(number)
        try:
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
            dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, NotImplementedError):
            kind = getattr(kind, "name", f"number {kind}")
            raise UserError(f"{self.path}: the tensor {name} is of type {kind}, which cannot be dequantized") from None
        nbytes = prod(shape) // block * size
        if not nbytes or shape[-1] % block:
            raise UserError(
                f"{self.path}: the tensor {name} {shape} does not divide into {kind.name} blocks of {block}"
            )
        if start + nbytes > len(self.data):
            raise UserError(f"{self.path}: truncated, the tensor {name} runs past its end; download it again")
        return Stored(shape, kind, start, nbytes)


# --- weights

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"


class LlamaWeights(Mapping[str, Tensor]):
    """The tensors of a Llama under their Hugging Face names, each dequantized when asked for.

    Raises:
        UserError: a tensor that no Llama has, or one whose values do not fit `dtype`.
    """

    def __init__(self, file: GGUFFile, dtype: torch.dtype) -> None:
        self.file, self._dtype = file, dtype
        self.places = {self._hf_name(name): name for name in file.tensors if name != ROPE_FACTORS}

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        tensor = self.file.read(place)
        least, most = tensor.aminmax()
        if not (torch.finfo(self._dtype).min <= least and most <= torch.finfo(self._dtype).max):  # nan is neither
            raise UserError(f"{self.file.path}: the tensor {place} holds values that are not finite as {self._dtype}")
        tensor = tensor.to(self._dtype)
        if ".attn_q." in place or ".attn_k." in place:
            heads = head_counts(self.file)[".attn_k." in place]
            if tensor.size(0) % (2 * heads):
                raise UserError(f"{self.file.path}: the tensor {place} {tuple(tensor.shape)} is not {heads} even heads")
            return unpermute(tensor, heads)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def _hf_name(self, name: str) -> str:
        parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if not parts or parts[2] not in NAMES:
            raise UserError(f"{self.file.path}: the tensor {name} is not part of a Llama model as known here")
        layer = f"model.layers.{parts[1]}." if parts[1] else ""
        return f"{layer}{NAMES[parts[2]]}.{parts[3]}"


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from llama.cpp's order, in which the two elements of a rotated pair are neighbours, to that
    of transformers, in which they are half a head apart. A weight or a bias."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# --- configuration

# The metadata under "llama." that is read below, or that says nothing about what is computed.
KNOWN = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip


def refuse_unknown(file: GGUFFile) -> None:
    """Raises UserError if it is not a Llama, is one of several files, or has a feature that is not known here."""
    architecture = file.need("general.architecture", str)
    if architecture != "llama":
        raise UserError(f"{file.path}: general.architecture is '{architecture}'; only 'llama' can be converted")
    if (parts := file.get("split.count", int, 1)) > 1:
        raise UserError(f"{file.path}: one of {parts} files of a model; merge them first (llama-gguf-split --merge)")
    for key, value in file.fields.items():
        if key.startswith("llama.") and key.removeprefix("llama.") not in KNOWN and value:
            raise UserError(f"{file.path}: the metadata {key} ({value}) is a feature that is not supported")


def head_counts(file: GGUFFile) -> tuple[int, int]:
    """Heads of the queries, and of keys and values."""
    heads = file.need("llama.attention.head_count", int)
    kv_heads = file.get("llama.attention.head_count_kv", int) or heads
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{file.path}: {heads} heads (llama.attention.head_count) cannot share {kv_heads} (.._kv)")
    return heads, kv_heads


def hf_config(file: GGUFFile, tokens: "Vocabulary", dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json."""
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


def generation_config(file: GGUFFile, tokens: "Vocabulary") -> dict[str, Any]:
    """The contents of generation_config.json: the end tokens of a text, a turn and a message all stop."""
    stops = [tokens.named["eos_token"], *(file.get(f"tokenizer.ggml.{x}_token_id", int) for x in ("eot", "eom"))]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    return {
        "bos_token_id": tokens.named["bos_token"],
        "eos_token_id": stops if len(stops) > 1 else (stops or [None])[0],
    }


def rope_scaling(file: GGUFFile, base: float, head_size: int) -> dict[str, Any] | None:
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
    """The scaling of Llama 3.1 and later, of which the file holds only the result: a divisor for each frequency.

    All published models blend between 1 and 4 turns within the original context, so that alone is to be found.
    """
    divisors = file.read(ROPE_FACTORS)
    if torch.all(divisors == 1):
        return None
    frequencies = 1.0 / base ** (torch.arange(0, head_size, 2).float() / head_size)
    for original in (8192, *(2**n for n in range(4, 21))):
        scaling = {
            "rope_type": "llama3",
            "factor": divisors.max().item(),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = rope_llama3(frequencies, scaling, None)[0]
        if divisors.shape == expected.shape and torch.allclose(frequencies / divisors, expected, rtol=1e-5, atol=0):
            return scaling
    raise UserError(f"{file.path}: the tensor {ROPE_FACTORS} is no scaling that config.json can express (llama3)")


# --- tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # tokenizer.ggml.token_type; 6 is a byte
IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # where the metadata does not say

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


class Vocabulary:
    """The metadata's tokens.

    Attributes:
        model: "gpt2" or "llama", as llama.cpp calls byte-level BPE and SentencePiece.
        pre: how a byte-level one splits text before merging.
        ids: {token: id}, without those that only fill up the embedding's rows.
        types: of all ids.
        named: {"bos_token": id or None, ...}.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.model = file.need("tokenizer.ggml.model", str)
        if self.model not in ("gpt2", "llama"):
            raise UserError(
                f"{file.path}: tokenizer.ggml.model '{self.model}' is not supported, only gpt2 and llama are"
            )
        self.pre = file.need("tokenizer.ggml.pre", str) if self.model == "gpt2" else ""
        self.tokens = file.need_list("tokenizer.ggml.tokens", str)
        self.types = file.need_list("tokenizer.ggml.token_type", int)
        if len(self.types) != len(self.tokens):
            raise UserError(f"{file.path}: {len(self.types)} tokenizer.ggml.token_type for {len(self.tokens)} tokens")
        filling = {i for i, token in enumerate(self.tokens) if self.types[i] == UNUSED and token == f"[PAD{i}]"}
        self.ids: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            if i not in filling and self.ids.setdefault(token, i) != i:
                raise UserError(f"{file.path}: the token {token!r} has two ids, {self.ids[token]} and {i}")
        defaults = SENTENCEPIECE_IDS if self.model == "llama" else {}
        self.named = {
            name: file.get(f"tokenizer.ggml.{key}_token_id", int, defaults.get(name)) for name, key in IDS.items()
        }
        for name, i in self.named.items():
            if i is not None and (not 0 <= i < len(self.tokens) or i in filling):
                raise UserError(f"{file.path}: the id of the {name}, {i}, is none of {len(self.tokens)} tokens")
        self.adds_bos = file.get("tokenizer.ggml.add_bos_token", bool, self.model == "llama" or self.pre in LLAMA3)
        self.adds_eos = file.get("tokenizer.ggml.add_eos_token", bool, False)

    def text(self, name: str) -> str | None:
        """The token of "bos_token", ..."""
        return None if self.named[name] is None else self.tokens[self.named[name]]

    def added(self) -> list[AddedToken]:
        """The tokens that are found in a text before anything else happens to it."""
        special = {i for i, kind in enumerate(self.types) if kind in (UNKNOWN, CONTROL)} | set(self.named.values())
        return [
            AddedToken(token, special=i in special, normalized=False)
            for token, i in self.ids.items()
            if i in special or self.types[i] == USER_DEFINED
        ]


def tokenizer_config(file: GGUFFile, tokens: Vocabulary) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens.text(name) for name in IDS},
        "add_bos_token": tokens.adds_bos,
        "add_eos_token": tokens.adds_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.need("llama.context_length", int),
    }


def build_tokenizer(file: GGUFFile, tokens: Vocabulary) -> tokenizers.Tokenizer:
    """What tokenizer.json holds."""
    result = byte_level(file, tokens) if tokens.model == "gpt2" else sentencepiece(file, tokens)
    result.add_tokens(tokens.added())
    around = [name for name, adds in (("bos_token", tokens.adds_bos), ("eos_token", tokens.adds_eos)) if adds]
    if around:
        if missing := [name for name in around if tokens.named[name] is None]:
            raise UserError(f"{file.path}: asks for a {missing[0]} around each text but names none")
        frame = [tokens.text("bos_token")] * tokens.adds_bos + ["$A"] + [tokens.text("eos_token")] * tokens.adds_eos
        special = list({(tokens.text(name), tokens.named[name]) for name in around})
        result.post_processor = TemplateProcessing(single=frame, special_tokens=special)
    return result


def byte_level(file: GGUFFile, tokens: Vocabulary) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in file.need_list("tokenizer.ggml.merges", str)]
    try:
        model = BPE(tokens.ids, merges, ignore_merges=tokens.pre in LLAMA3)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens ({error})") from None
    result = tokenizers.Tokenizer(model)
    result.pre_tokenizer = pre_tokenizer(file, tokens.pre)
    result.decoder = decoders.ByteLevel()
    return result


def pre_tokenizer(file: GGUFFile, name: str) -> PreTokenizer:
    """How the model of that name in llama.cpp splits text, in the words of its own tokenizer.json."""
    if name == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    if name in ("smollm", "starcoder", "refact"):
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in LLAMA3:
        patterns = [LLAMA3_SPLIT]
    elif name == "default":  # no model's own: what llama.cpp does for a file that says so
        patterns = [r"[\p{P}$+<=>^~|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"]
    else:
        raise UserError(
            f"{file.path}: the pre-tokenizer '{name}' (tokenizer.ggml.pre) is not known; expected one of default, "
            f"gpt-2, {', '.join(LLAMA3)}, refact, smollm, starcoder"
        )
    splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(file: GGUFFile, tokens: Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece BPE, in the form that Llama 2's tokenizer.json has; also what llama.cpp does: a space goes before
    the text and after each special token."""
    scores = file.need_list("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens.tokens):
        raise UserError(f"{file.path}: {len(scores)} tokenizer.ggml.scores for {len(tokens.tokens)} tokens")
    unknown = tokens.text("unk_token")
    model = BPE(tokens.ids, ranked_merges(tokens, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    result = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    result.normalizer = spaces
    result.decoder = decoders.Sequence(steps)
    return result


def ranked_merges(tokens: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """The ways to make each piece of two others, the piece with the highest score first."""
    pieces = {token: i for token, i in tokens.ids.items() if tokens.types[i] == NORMAL}
    ways = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left, right = pieces.get(piece[:cut]), pieces.get(piece[cut:])
            if left is not None and right is not None:
                ways.append((-scores[i], i, left, right))
    return [(tokens.tokens[left], tokens.tokens[right]) for _, _, left, right in sorted(ways)]
