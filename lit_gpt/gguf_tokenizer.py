"""The tokenizer that a GGUF file's metadata describes, as tokenizer.json and tokenizer_config.json."""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from lit_gpt.errors import UserError
from lit_gpt.gguf_reader import GGUFFile

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
