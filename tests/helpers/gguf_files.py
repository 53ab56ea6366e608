"""Write GGUF files as llama.cpp writes them, from tiny models and tokenizers."""

import io
import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from tokenizers import Regex, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM

CORPUS = [
    "Hello world, this is a small text about tokens, isn't it?",
    "The quick brown fox jumps over the lazy dog 1234567890 times in 2024.",
    "def f(x):\n    return x + 1\n\n\tif x: pass",
    "Ein süßer Apfel, café, naïve, 日本語 中文 too.",
] * 30
PLAIN = [
    *(
        "",
        " ",
        "   ",
        "Hello world",
        " Hello  world   again ",
        "a\n\n  b\n\t\tc\r\n",
        "isn't it I'M",
        "日本語 中文字 한국어",
    ),
    *(
        "👩‍👩‍👧‍👦 e\u0301 ñ ﬁ",
        "1234567 is 12 and 3.14",
        "½ Ⅷ ²",
        "x=[1,22,333];y+=$4",
        "un▁der � \x00z",
        "<0x0A> <0xE2>",
    ),
    "".join(chr(random.Random(0).randrange(32, 0x3000)) for _ in range(200)),
]


TEMPLATE = "{% for m in messages %}<|im|>{{ m['content'] }}\n{% endfor %}é"


ADDED = {"<s>": 3, "</s>": 3, "<|im|>": 3, "<tool>": 4}  # and their tokenizer.ggml.token_type


def splitting(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": splitting(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "dbrx": splitting(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": splitting(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "deepseek-v3": splitting(
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "qwen35": splitting(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def byte_level(pre: str = "smollm") -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    tok.pre_tokenizer, tok.decoder = SPLITS[pre], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [token for token, kind in ADDED.items() if kind == 3]
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(CORPUS, trainer)
    tok.add_tokens(["<tool>"])
    return tok


def byte_level_fields(tok: tokenizers.Tokenizer, pre: str = "smollm") -> dict[str, Any]:
    tokens = sorted(tok.get_vocab(), key=tok.token_to_id)
    merges = json.loads(tok.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [ADDED.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.ggml.eot_token_id": tokens.index("<|im|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_proto() -> bytes:
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=proto, model_type="bpe", vocab_size=420, byte_fallback=True,
        character_coverage=0.99, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, control_symbols=["<|im|>"],
        user_defined_symbols=["<tool>"], minloglevel=2,
    )  # fmt: skip
    return proto.getvalue()


def sentencepiece_fields(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(model.get_piece_size())
    kinds = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
    types = [next((kind for kind, test in kinds.items() if test(i)), 1) for i in ids]
    types[model.piece_to_id("<tool>")] = 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": types,
    }


def tiny(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = dict(
        vocab_size=440, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**size | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def model_fields(config: LlamaConfig) -> dict[str, Any]:
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.vocab_size": config.vocab_size,
        "llama.expert_count": 0,
    }


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head in llama.cpp's order: first of the lower half, first of the upper, second of the ..."""
    half = tensor.size(0) // heads // 2
    return tensor[[head * 2 * half + j * half + i for head in range(heads) for i in range(half) for j in (0, 1)]]


def gguf_tensors(model: LlamaForCausalLM, kind: Kind) -> dict[str, tuple[np.ndarray, Kind]]:
    """{name: data and type}; matrices are stored as `kind`, and the model's weights become what that can hold."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    tensors = {}
    for name, parameter in model.named_parameters():
        stored = Kind.F32 if parameter.ndim == 1 else kind
        parameter.data = torch.from_numpy(dequantize(quantize(parameter.detach().numpy(), stored), stored).copy())
        projection = name.split(".")[-2]
        tensor = interleaved(parameter.data, heads[projection]) if projection in heads else parameter.data
        tensors[names.get_name(name, (".weight", ".bias"))] = quantize(tensor.numpy(), stored), stored
    return tensors


def write_gguf(path: Path, fields: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Kind]]) -> Path:
    fields = {"general.architecture": "llama"} | fields
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for key, value in fields.items():
        kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds.get(type(value), writer.add_array)(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
