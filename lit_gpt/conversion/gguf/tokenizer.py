"""Convert between the tokenizer in a GGUF file's metadata and tokenizer.json with tokenizer_config.json."""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Sequence, Split
from tokenizers.processors import TemplateProcessing

from lit_gpt.conversion.gguf.reader import GGUFFile
from lit_gpt.errors import UserError
from lit_gpt.text.tokenizer import BYTE_TOKEN, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # where the metadata does not say
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral")
WHOLE = (*LLAMA3, "tekken")  # text that is a token is not split, and there is a BOS before it, if a file says no other
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Vocabulary:
    """The metadata's tokens.

    Attributes:
        model: "gpt2" or "llama", llama.cpp's names for byte-level BPE and SentencePiece.
        pre: llama.cpp's name for the way in which byte-level BPE splits text before merging.
        ids: {token: id}, without those that only fill up the embedding's rows.
        types: the type of each id.
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
        self.adds_bos = file.get("tokenizer.ggml.add_bos_token", bool, self.model == "llama" or self.pre in WHOLE)
        self.adds_eos = file.get("tokenizer.ggml.add_eos_token", bool, False)

    def text(self, name: str) -> str | None:
        """Return the token that `named` has the id of, if any."""
        return None if self.named[name] is None else self.tokens[self.named[name]]

    def added(self) -> list[AddedToken]:
        """Return the tokens that are searched for in a text before anything else happens to it."""
        special = {i for i, kind in enumerate(self.types) if kind in (UNKNOWN, CONTROL)} | set(self.named.values())
        return [
            AddedToken(token, special=i in special, normalized=False)
            for token, i in self.ids.items()
            if i in special or self.types[i] == USER_DEFINED
        ]


def tokenizer_config(file: GGUFFile, tokens: Vocabulary) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens.text(name) for name in IDS},
        "add_bos_token": tokens.adds_bos,
        "add_eos_token": tokens.adds_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.need(f"{file.need('general.architecture', str)}.context_length", int),
    }


def build_tokenizer(file: GGUFFile, tokens: Vocabulary) -> tokenizers.Tokenizer:
    """Return the tokenizer that tokenizer.json is to hold."""
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
        model = BPE(tokens.ids, merges, ignore_merges=tokens.pre in WHOLE)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens ({error})") from None
    result = tokenizers.Tokenizer(model)
    result.pre_tokenizer = pre_tokenizer(file, tokens.pre)
    result.decoder = decoders.ByteLevel()
    return result


def pre_tokenizer(file: GGUFFile, name: str) -> PreTokenizer:
    """Return what splits text as llama.cpp does under this name, in the terms of the model's own tokenizer.json."""
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{file.path}: the pre-tokenizer '{name}' (tokenizer.ggml.pre) is not known; expected one of "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def splitting(*patterns: str) -> PreTokenizer:
    splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


PLAIN = ByteLevel(add_prefix_space=False)
ONE_DIGIT = Sequence([Digits(individual_digits=True), PLAIN])
PRE_TOKENIZERS = {  # of names for the same, the first is written
    "gpt-2": PLAIN,
    **dict.fromkeys(("smollm", "starcoder", "refact"), ONE_DIGIT),
    **dict.fromkeys((*LLAMA3, "dbrx", "glm4", "chatglm-bpe"), splitting(LLAMA3_SPLIT)),
    "tekken": splitting(TEKKEN_SPLIT),
    "deepseek-v3": splitting(*DEEPSEEK_SPLITS),
    "qwen2": splitting(QWEN2_SPLIT),
    "qwen35": splitting(QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")),
    "falcon": Sequence(
        [Punctuation("contiguous"), PLAIN, Digits(individual_digits=False), Split(Regex("[0-9][0-9][0-9]"), "isolated")]
    ),
    # no model's own: what llama.cpp does for a file that says so
    "default": splitting(r"[\p{P}$+<=>^~|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"),
}


def sentencepiece(file: GGUFFile, tokens: Vocabulary) -> tokenizers.Tokenizer:
    """Return SentencePiece BPE, in the form that Llama 2's tokenizer.json has.

    As in llama.cpp, a space goes before the text and after each special token.
    """
    scores = file.need_list("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens.tokens):
        raise UserError(f"{file.path}: {len(scores)} tokenizer.ggml.scores for {len(tokens.tokens)} tokens")
    merges = ranked_merges({token: i for token, i in tokens.ids.items() if tokens.types[i] == NORMAL}, scores)
    model = BPE(tokens.ids, merges, unk_token=tokens.text("unk_token"), fuse_unk=True, byte_fallback=True)
    result = tokenizers.Tokenizer(model)
    spaces: normalizers.Normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    result.normalizer = spaces
    result.decoder = decoders.Sequence(steps)
    return result


def ranked_merges(pieces: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return the ways to make each piece of two others, those of the piece with the highest score first."""
    names, ways = {i: piece for piece, i in pieces.items()}, []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left, right = pieces.get(piece[:cut]), pieces.get(piece[cut:])
            if left is not None and right is not None:
                ways.append((-scores[i], i, left, right))
    return [(names[left], names[right]) for _, _, left, right in sorted(ways)]


def vocabulary_fields(folder: Path, rows: int, stop_ids: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the metadata for the tokenizer of a checkpoint folder.

    Args:
        rows: the number of rows of the embedding; ids beyond the tokenizer's are filled up.
        stop_ids: the ids that end an answer.

    Raises:
        UserError: llama.cpp has no such tokenizer, or its name there is not known here.
    """
    tokenizer, path = Tokenizer(folder), Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: --format gguf needs tokenizer.json; write one with transformers (AutoTokenizer)")
    stored = json.loads(path.read_text(encoding="utf-8"))
    model = stored["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{path}: the model is {model.get('type')}; --format gguf takes BPE alone")
    added = tokenizer.added_tokens
    ids = model["vocab"] | {token.content: i for i, token in added.items()}
    if max(ids.values()) >= rows:
        raise UserError(f"{path}: has the id {max(ids.values())}, but the embedding has {rows} rows")
    names = {i: token for token, i in ids.items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [NORMAL if i in names else UNUSED for i in range(rows)]
    for i, token in added.items():
        types[i] = CONTROL if token.special else USER_DEFINED
    if model.get("byte_fallback"):
        own = sentencepiece_fields(path, stored, tokens, types)
    else:
        own = byte_level_fields(path, stored)
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    further = [i for i in stop_ids if i != tokenizer.eos_id]
    named |= dict(zip(("eot", "eom"), further, strict=False))
    if len(further) > 2:
        raise UserError(f"{folder}: answers end at {len(stop_ids)} tokens; a GGUF file names 3 at most")
    return {
        **own,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i is not None},
        "tokenizer.ggml.add_bos_token": tokenizer.encode("a")[:1].tolist() == [tokenizer.bos_id],
        "tokenizer.ggml.add_eos_token": False,
    }


def byte_level_fields(path: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata for a byte-level tokenizer.json, `stored`."""
    splits, whole = comparable(stored["pre_tokenizer"]), bool(stored["model"].get("ignore_merges"))
    alike = [k for k, v in PRE_TOKENIZERS.items() if comparable(json.loads(v.__getstate__())) == splits]
    name = next((name for name in alike if (name in WHOLE) == whole), None)
    if name is None:
        raise UserError(
            f"{path}: splits text in a way for which no name in llama.cpp is known here; those of "
            f"{', '.join(sorted(PRE_TOKENIZERS))} are"
        )
    if stored.get("normalizer") not in (None, {"type": "NFC"}):
        raise UserError(f"{path}: has a normalizer, {stored['normalizer'].get('type')}, and llama.cpp would have none")
    if stored.get("normalizer"):
        print(f"{path}: brings text into Unicode's form NFC, and llama.cpp does not; most text is in it")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def comparable(part: Any) -> Any:
    """Return a part of tokenizer.json without what bears on offsets alone, and sequences of one without their frame."""
    if isinstance(part, list):
        return [comparable(p) for p in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence" and len(part["pretokenizers"]) == 1:
        return comparable(part["pretokenizers"][0])
    return {key: comparable(value) for key, value in part.items() if key != "trim_offsets"}


def sentencepiece_fields(path: Path, stored: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Return the metadata for a SentencePiece tokenizer.json, `stored`; completes the types of the tokens.

    By its scores llama.cpp merges as the ranks do: each piece's is the rank of its first merge, negated.
    """
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in stored["model"]["merges"]]
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    scores = [-float(first.get(token, 0)) for token in tokens]
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and BYTE_TOKEN.fullmatch(token):
            types[i] = BYTE
    if (unknown := stored["model"].get("unk_token")) in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    if ranked_merges({token: i for i, token in enumerate(tokens) if types[i] == NORMAL}, scores) != merges:
        raise UserError(f"{path}: its merges are not those that scores of pieces give; llama.cpp would split otherwise")
    splits = json.dumps([stored.get("normalizer"), stored.get("pre_tokenizer")])
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": '"Prepend"' in splits
        or re.search(r'scheme": "(first|always)', splits) is not None,
        "tokenizer.ggml.unknown_token_id": tokens.index(unknown) if unknown in tokens else None,
    }
