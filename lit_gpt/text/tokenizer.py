"""Text to token ids and back, exactly as the checkpoint's own tokenizer files say.

`tokenizer.json` is run by `tokenizers`, a lone `tokenizer.model` by `sentencepiece`. In both cases a
`tokenizers.Tokenizer` knows the ids, finds the added tokens (`<s>`, `<|im_end|>`, ...) in a text and decodes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import AddedToken, decoders

from lit_gpt.errors import UserError
from lit_gpt.files import read_json, read_text

FILES = ("tokenizer.json", "tokenizer.model")
NAMED = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
CHAT_TEMPLATE_DIR = "additional_chat_templates"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Protobuf messages merge when concatenated; this is a ModelProto with normalizer_spec.add_dummy_prefix = false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Offsets:
    """Where the ids of a text lie in it. Few are looked at, and a tuple for each would take as long as encoding."""

    def __init__(self, spans: tokenizers.Encoding, missing: int) -> None:
        self._spans, self._missing = spans, missing  # `missing`: ids before the first, which the text lacks

    def __len__(self) -> int:
        return self._missing + len(self._spans)

    def __getitem__(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return (self._spans.token_to_chars(i - self._missing) if i >= self._missing else None) or (0, 0)


class Encoding(NamedTuple):
    """The ids of a text and where in it they lie, from and to which character; what the text lacks, at its start."""

    ids: list[int]
    offsets: Offsets | list[tuple[int, int]]


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes:
        bos_token, eos_token: the tokens that begin and end a text, or None.
        bos_id, eos_id: their ids, or None.
        named_tokens: {name: token} of all that the settings name, such as bos_token; what chat templates may write.
        vocab_size: how many tokens there are, added ones included. The model's embedding may have more rows.
        added_tokens: {id: token} of those added to the vocabulary, such as an end of turn; special ones included.
        chat_templates: {name: Jinja source}.
        chat_template: the source of the default one, or None.

    Raises:
        UserError: the folder holds no tokenizer, or one that cannot be read.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)
        self._path = find_tokenizer(self.checkpoint_dir)
        # what encodes the first stretch of text, and those after an added token, of a lone tokenizer.model
        self._spm: tuple[Any, ...] = ()
        settings = read_settings(self.checkpoint_dir)
        if self._path.suffix == ".model":
            self._spm = load_sentencepiece(self._path, settings)
            settings = {**sentencepiece_names(self._spm[0]), **settings}
        stated, special = stated_tokens(self.checkpoint_dir, settings)
        self._tokens = sentencepiece_vocabulary(self._spm[0], stated) if self._spm else load_json(self._path)
        add_tokens(self._tokens, stated, special)
        self.added_tokens: dict[int, AddedToken] = self._tokens.get_added_tokens_decoder()

        self.vocab_size: int = self._tokens.get_vocab_size()
        self.bos_token, self.bos_id = self._find("bos", settings)
        self.eos_token, self.eos_id = self._find("eos", settings)
        self.named_tokens = {
            name: token for name, token in named_tokens(settings).items() if self.token_id(token) is not None
        }
        self.chat_templates = find_chat_templates(self.checkpoint_dir, settings)
        self.chat_template = self.chat_templates.get("default")
        self._lead = self._find_lead(settings)
        self._tokens.post_processor = None  # all that it had to say; it would trim the offsets of blanks

    def encode(self, text: str, bos: bool | None = None, eos: bool = False) -> torch.Tensor:
        """Return the ids of a text, in which special tokens may be written out.

        Args:
            bos: whether the ids begin with BOS; None does as the checkpoint does. A text that begins with it already
                gets no second one.
            eos: whether to append EOS where the text does not end with it. False takes none away that the text
                holds, and appends none even where the checkpoint would: a prompt has no end.

        Returns:
            int64 of shape (T,).

        Raises:
            UserError: BOS or EOS is asked for and the checkpoint has none; bytes that are not UTF-8 are in the text.
        """
        for name, wanted, known in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if wanted and known is None:
                where = self.checkpoint_dir / "tokenizer_config.json"
                raise UserError(f"{where}: {name}=True needs a {name}_token, and none is set; set one")
        ids = next(self.encode_batch([text], bos)).ids
        if eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids = ids + [self.eos_id]
        return torch.tensor(ids, dtype=torch.long)

    def encode_batch(self, texts: Sequence[str], bos: bool | None = None) -> Iterator[Encoding]:
        """Encode many texts as `encode` does, on as many cores as there are; yield ids and their places in the text."""
        lead = [] if bos is False else self._lead
        if bos and self.bos_id is not None and self.bos_id not in lead:
            lead = [self.bos_id]
        try:
            encoded = self._tokens.encode_batch(texts, add_special_tokens=False)
        except TypeError:  # how tokenizers says so
            raise UserError("the text is not UTF-8 text: give it as such, without half characters") from None
        for text, spans in zip(texts, encoded, strict=True):
            ids, offsets = self._sentencepiece(text, spans) if self._spm else (spans.ids, None)
            missing = lead if ids[:1] != lead[:1] else []
            places = Offsets(spans, len(missing)) if offsets is None else [(0, 0)] * len(missing) + offsets
            yield Encoding(missing + ids, places)

    def as_json(self) -> str:
        """Return the tokenizer as a tokenizer.json spells it."""
        return self._tokens.to_str()

    def decode(self, ids: Sequence[int] | torch.Tensor, skip_special_tokens: bool = True) -> str:
        """Return the text of ids of shape (T,). Ids past the vocabulary (padded embedding rows) have no text."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self._tokens.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_stream(self, ids: Iterable[int], skip_special_tokens: bool = True) -> Iterator[str]:
        """Yield pieces of text as the ids come. Joined they equal `decode` of all ids.

        A piece comes as soon as later ids cannot change it, so a character split over several tokens comes whole.
        """
        stream = TextStream(self, skip_special_tokens)
        for token_id in map(int, ids):
            if piece := stream.push(token_id):
                yield piece
        if rest := stream.rest():
            yield rest

    @property
    def adds_bos(self) -> bool:
        """Return whether the checkpoint itself puts a BOS before a text."""
        return self._lead == [self.bos_id]

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, spelled as in the vocabulary, or None."""
        return self._tokens.token_to_id(token)

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) over all that decides the ids, which is the same for a copy in another folder."""
        added = [
            (i, t.content, t.special, t.normalized, t.lstrip, t.rstrip, t.single_word)
            for i, t in sorted(self.added_tokens.items())
        ]
        spaces = [model.normalize("a") for model in self._spm]
        rest = json.dumps([added, spaces, self._lead, self.bos_id, self.eos_id])
        return hashlib.sha256(self._path.read_bytes() + rest.encode()).hexdigest()

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Return a pattern of the special tokens, which a text may write out and which are encoded as such then."""
        contents = sorted(
            (token.content for token in self.added_tokens.values() if token.special), key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    @cached_property
    def _special_ids(self) -> set[int]:
        return {i for i, token in self.added_tokens.items() if token.special}

    def _sentencepiece(self, text: str, spans: tokenizers.Encoding) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text in which `_tokens` has found the added tokens, and knows nothing of the rest."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for token_id, (start, end) in zip(spans.ids, spans.offsets, strict=True):
            span, added = text[start:end], self.added_tokens.get(token_id)
            if added and added.content in span:
                ids.append(token_id)
                offsets.append((start, end))
            else:
                encoded = self._spm[start > 0].encode(span, return_type="offset_mapping")
                ids += encoded["ids"]
                offsets += [(start + a, start + b) for a, b in encoded["offsets"]]
        return ids, offsets

    def _text_after(self, before: list[int], ids: list[int]) -> str:
        start = len(self.decode(before, skip_special_tokens=False))
        return self.decode(before + ids, skip_special_tokens=False)[start:]

    def _find(self, name: str, settings: dict[str, Any]) -> tuple[str | None, int | None]:
        """Find token and id of "bos" or "eos" as the tokenizer's settings say (null: none), else as the model's do."""
        if f"{name}_token" in settings:
            token = content(settings[f"{name}_token"])
            return token, self.token_id(token) if token else None
        for file in ("generation_config.json", "config.json"):
            ids = read_json(self.checkpoint_dir / file, missing_ok=True).get(f"{name}_token_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            if isinstance(first, int) and (token := self._tokens.id_to_token(first)) is not None:
                return token, first
        return None, None

    def _find_lead(self, settings: dict[str, Any]) -> list[int]:
        """Find the ids that the checkpoint itself puts before a text. As in transformers 5, `add_bos_token` is for
        tokenizer.model only, absent means no, and the post-processor of tokenizer.json speaks for itself."""
        if self._spm:
            return [self.bos_id] if settings.get("add_bos_token") and self.bos_id is not None else []
        if not self._tokens.num_special_tokens_to_add(False):
            return []
        probe = self._tokens.encode("a 0.")
        return probe.ids[: [*probe.special_tokens_mask, 0].index(0)]


class TextStream:
    """The text of ids that come one by one. Its pieces joined equal `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._shown: list[int] = []  # tokens of the last piece: what stands before decides whether a space is stripped
        self._held: list[int] = []  # tokens since then

    def push(self, token_id: int) -> str:
        """Return the text of the ids since the last piece if later ids cannot change it, else none."""
        token = self._tokenizer._tokens.id_to_token(token_id)
        if token is None or (self._skip and token_id in self._tokenizer._special_ids):
            return ""
        self._held.append(token_id)
        if BYTE_TOKEN.fullmatch(token):  # one bad byte makes U+FFFD of the whole run of byte tokens
            return ""
        piece = self.rest()
        if piece.endswith("\ufffd"):
            return ""
        self._shown, self._held = self._held, []
        return piece

    def rest(self) -> str:
        """Return the text that has not been shown yet, as it is if no id follows."""
        return self._tokenizer._text_after(self._shown, self._held)


def has_tokenizer(folder: Path) -> bool:
    return any((Path(folder) / name).is_file() for name in FILES)


def find_tokenizer(folder: Path) -> Path:
    for path in (folder / name for name in FILES):
        if path.is_file():
            return path
    found = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
    raise UserError(
        f"{folder}: expected tokenizer.json or tokenizer.model, found {found}; fetch the checkpoint with "
        "scripts/download.py, or write a tokenizer.json with transformers (AutoTokenizer, save_pretrained)"
    )


def load_json(path: Path) -> tokenizers.Tokenizer:
    try:
        tokens = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"{path}: expected a tokenizer that tokenizers {tokenizers.__version__} can read ({error}); "
            "download the file again, or update the package: pip install -U tokenizers"
        ) from None
    tokens.no_truncation()
    tokens.no_padding()
    return tokens


def load_sentencepiece(path: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return two processors: for the first stretch of a text, and for those after an added token.

    The model itself puts a space before the first; before the others only where `legacy` is set. This is what the
    model was trained with, where the conversion in transformers 5 is not: that drops a space that the text begins
    with, and ranks pieces by id, not by score ("a  b" in Llama is "▁a ▁ ▁b", there "▁a ▁▁ b").
    """
    from sentencepiece import SentencePieceProcessor

    try:
        proto = path.read_bytes()
        model = SentencePieceProcessor(model_proto=proto)
        bare = SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: expected a SentencePiece model ({error}); download the file again") from None
    first = bare if settings.get("add_prefix_space") is False else model
    return first, first if settings.get("legacy") else bare


def sentencepiece_names(model: Any) -> dict[str, str]:
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    return {name: model.id_to_piece(i) for name, i in ids.items() if i >= 0}


def sentencepiece_vocabulary(model: Any, stated: dict[int, AddedToken]) -> tokenizers.Tokenizer:
    """Make a tokenizer of the model's ids, control pieces and decoder, which encodes only added tokens."""
    pieces = {i: model.id_to_piece(i) for i in range(model.get_piece_size())}
    control = [AddedToken(piece, special=True) for i, piece in pieces.items() if model.is_control(i)]
    pieces.update((i, token.content) for i, token in stated.items())
    vocabulary = {piece: i for i, piece in pieces.items()}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=pieces[model.unk_id()]))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalize("a").startswith("▁"):
        steps.append(decoders.Strip(" ", 1, 0))
    tokens.decoder = decoders.Sequence(steps)
    tokens.add_tokens(control)
    return tokens


def read_settings(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, overruled by special_tokens_map.json where transformers still reads that."""
    settings = read_json(folder / "tokenizer_config.json", missing_ok=True)
    if "added_tokens_decoder" not in settings:
        settings = {**settings, **read_json(folder / "special_tokens_map.json", missing_ok=True)}
    return {key: value for key, value in settings.items() if value != ""}


def stated_tokens(folder: Path, settings: dict[str, Any]) -> tuple[dict[int, AddedToken], list[AddedToken]]:
    """Return {id: token} for the added tokens, and the special ones that the settings name without an id."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    names = NAMED + [key for key in settings if key.endswith("_token") and key not in NAMED]
    values = [settings.get(name) for name in names] + list(extra.values() if isinstance(extra, dict) else extra)
    special = [added_token(value, special=True) for value in values if isinstance(value, (str, dict))]
    if "added_tokens_decoder" in settings:
        return {int(i): added_token(value) for i, value in settings["added_tokens_decoder"].items()}, special
    named = {token.content for token in special}
    added = read_json(folder / "added_tokens.json", missing_ok=True).items()
    return {i: AddedToken(token, special=token in named, normalized=token not in named) for token, i in added}, special


def add_tokens(tokens: tokenizers.Tokenizer, stated: dict[int, AddedToken], special: list[AddedToken]) -> None:
    """Add what `tokens` lacks, in the order of transformers, since new tokens get the next ids."""
    present = list(tokens.get_added_tokens_decoder().values())
    same, named = set(map(repr, present)), {token.content for token in special}
    added = [token for _, token in sorted(stated.items()) if repr(token) not in same]
    for token in added:
        token.special = token.special or token.content in named
    known = {token.content for token in present + added}
    tokens.add_tokens(added + [token for token in special if token.content not in known])


def added_token(value: str | dict[str, Any], **changes: bool) -> AddedToken:
    fields = {"content": value} if isinstance(value, str) else {k: v for k, v in value.items() if k != "__type"}
    return AddedToken(**{**fields, **changes})


def content(token: str | dict[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return {name: token} from a tokenizer's settings, in which further tokens of a model are a dictionary."""
    extra = settings.get("extra_special_tokens") or {}
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    tokens = {name: content(value) for name, value in named.items() if isinstance(value, (str, dict))}
    return {name: token for name, token in tokens.items() if token}


def find_chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return {name: source} of the chat templates. Files overrule the settings, as in transformers."""
    files = {path.stem: path for path in sorted((folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: read_text(path) for name, path in files.items()}
    template = settings.get("chat_template") or {}
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template if isinstance(template, dict) else {"default": template}
