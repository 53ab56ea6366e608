"""The one path from messages to text and tokens: training, generation, chat and export all render here.

A prompt style is a Jinja template over messages `{"role": "user" | "assistant" | "system" | "tool", "content": text}`,
as in Hugging Face chat templates. Rows of instruction data add `instruction` and `input` to the user's message for
styles that set them apart.
"""

import codecs
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import read_json, read_text
from lit_gpt.text import known_styles, supervision
from lit_gpt.text.chat_template import Template
from lit_gpt.text.messages import REASONING, Message, Tools, spell_arguments
from lit_gpt.text.supervision import Encoded, Rendered
from lit_gpt.text.tokenizer import CHAT_TEMPLATE_DIR, Encoding, Tokenizer

FIELDS = {"own_bos": "template_writes_bos"}  # names of fields in files, where they differ
FILE = "prompt_style.json"


# Each writes the user's turns up to where the answer begins; the answer is closed by the end token. A space before the
# answer belongs to it, for it makes one token with the answer's first word.
def _turns(other: str, before_answer: str = "") -> str:
    answer = "{% for m in messages %}{% if m.role == 'assistant' %}" + before_answer + "{{ m.content + eos_token }}"
    return answer + "{% else %}" + other + "{% endif %}{% endfor %}"


_ALPACA = (
    "{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% else %}"
    "{{ 'Below is an instruction that describes a task' }}"
    "{{ ', paired with an input that provides further context' if m.input }}"
    "{{ '. Write a response that appropriately completes the request.\n\n### Instruction:\n' }}"
    "{{ m.instruction or m.content }}{{ '\n\n### Input:\n' + m.input if m.input }}"
    "{{ '\n\n### Response:\n' }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
_LLAMA2 = (
    "{% if m.role == 'system' %}{{ '[INST] <<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}{% else %}"
    "{{ '[INST] ' if loop.first or loop.previtem.role != 'system' }}{{ m.content + ' [/INST]' }}{% endif %}"
)
_NEXT_BOS = "{{ next_bos if m.role == 'user' and not loop.first and loop.previtem.role == 'assistant' }}"

_FALCON = "{{ m.content + '\n' if m.role == 'system' else 'User: ' + m.content + '\nAssistant:' }}"
STYLES = {
    "plain": _turns("{{ m.content }}"),
    "alpaca": _turns(_ALPACA),
    "chatml": _CHATML,
    "llama2": _turns(_NEXT_BOS + _LLAMA2, before_answer=" "),
    "falcon-instruct": _turns(_FALCON, before_answer=" "),
}
STYLES |= known_styles.STYLES


class DamagedStyle(UserError):
    """Says that what should describe a prompt style does not."""


@dataclass(frozen=True)
class PromptStyle:
    """How messages become text, and which tokens end an answer."""

    name: str
    template: str
    template_writes_bos: bool  # a checkpoint's own template writes its BOS itself; others get what the tokenizer adds
    stop_ids: tuple[int, ...] = ()
    tool_template: str | None = None  # for conversations with tools, if the checkpoint has one for them

    @classmethod
    def from_name(cls, name: str, tokenizer: Tokenizer) -> "PromptStyle":
        """Return a style of STYLES, of a Jinja file, or for "auto" the one that a finetune left in the checkpoint, else
        its own template, else alpaca.

        Raises:
            UsageError: neither a style nor a file.
            UserError: the checkpoint has no template, or the file holds none.
        """
        if name == "auto":
            if left := cls.left_in(tokenizer.checkpoint_dir):
                return left
            name = "checkpoint" if tokenizer.chat_template else "alpaca"
        if name == "checkpoint":
            if not tokenizer.chat_template:
                raise UserError("--prompt_style checkpoint: the checkpoint has no chat template; choose another style")
            with_tools = tokenizer.chat_templates.get("tool_use")
            style = cls(name, tokenizer.chat_template, template_writes_bos=True, tool_template=with_tools)
        elif name in STYLES:
            style = cls(name, STYLES[name], template_writes_bos=False)
        elif (path := Path(name).expanduser()).is_file():
            style = cls(name, read_text(path), template_writes_bos=False)
        else:
            raise UsageError(
                f"--prompt_style {name}: expected auto, checkpoint, {', '.join(STYLES)} or a path to a Jinja file"
            )
        return replace(style, stop_ids=style.find_stop_ids(tokenizer))

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path, tokenizer: Tokenizer) -> "PromptStyle":
        """Return the style that a finetune left in the folder, else the checkpoint's own template, else plain text."""
        if left := cls.left_in(checkpoint_dir):
            return left
        style = cls.from_name("checkpoint" if tokenizer.chat_template else "plain", tokenizer)
        return replace(style, stop_ids=tuple(dict.fromkeys((*style.stop_ids, *generation_stop_ids(checkpoint_dir)))))

    @classmethod
    def left_in(cls, checkpoint_dir: Path) -> "PromptStyle | None":
        """Return the style that a finetune left in the folder, if one did."""
        path = Path(checkpoint_dir) / FILE
        if not path.is_file():
            return None
        try:
            return cls.from_dict(read_json(path))
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UserError(
                f"{path}: expected what a finetune leaves ({reason}); make the folder again, or remove the file to "
                "take the checkpoint's own template"
            ) from None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "PromptStyle":
        """Return the style that `to_dict` has described. Raises DamagedStyle: it has not."""
        try:
            fields = {FIELDS.get(name, name): value for name, value in fields.items()}
            style = cls(**{**fields, "stop_ids": tuple(fields["stop_ids"])})
        except (AttributeError, KeyError, TypeError) as error:
            raise DamagedStyle(f"the prompt style is damaged: {error}") from None
        if not isinstance(style.template, str):
            raise DamagedStyle(f"the prompt style's template is no text: {style.template!r}")
        return style

    def save(self, checkpoint_dir: Path) -> None:
        (Path(checkpoint_dir) / FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return the style as files hold it."""
        names = {name: key for key, name in FIELDS.items()}
        fields = asdict(self) | {"stop_ids": list(self.stop_ids)}
        return {names.get(name, name): value for name, value in fields.items()}

    def write_template(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Write the template into a folder as transformers, vLLM and llama.cpp take it, in place of others there."""
        file, template = folder / "chat_template.jinja", self.for_others(tokenizer)
        marked = file.is_file() and file.read_bytes().startswith(codecs.BOM_UTF8)  # which transformers would render
        if template == tokenizer.chat_template and not marked:
            return
        file.write_text(template, encoding="utf-8")
        shutil.rmtree(folder / CHAT_TEMPLATE_DIR, ignore_errors=True)
        settings = folder / "tokenizer_config.json"
        fields = read_json(settings, missing_ok=True)
        if fields.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def write_stops(self, folder: Path) -> None:
        """Have generation_config.json name the ids that end an answer."""
        path = folder / "generation_config.json"
        fields = read_json(path, missing_ok=True)
        stops = list(dict.fromkeys((*self.stop_ids, *generation_stop_ids(folder))))
        if stops != generation_stop_ids(folder):
            path.write_text(json.dumps(fields | {"eos_token_id": stops}, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def _compiled(self) -> Template:
        return Template(self.template)

    @cached_property
    def _compiled_for_tools(self) -> Template:
        return Template(self.tool_template) if self.tool_template else self._compiled

    def render(
        self, messages: Sequence[Message], tokenizer: Tokenizer, answer: bool = False, tools: Tools = None
    ) -> str:
        """Return the text of a conversation; with `answer`, up to where the assistant's next turn begins.

        Raises:
            UserError: the template is broken, does what it must not, or refuses the messages.
        """
        return self._apply("render", messages, tokenizer, answer, tools)

    def _apply(
        self, function: str, messages: Sequence[Message], tokenizer: Tokenizer, answer: bool, tools: Tools
    ) -> Any:
        tokens = tokenizer.named_tokens if self.template_writes_bos else {"eos_token": tokenizer.eos_token}
        variables: dict[str, Any] = {
            "bos_token": "",
            "eos_token": "",
            **{name: token or "" for name, token in tokens.items()},
        }
        variables |= {"tools": tools, "documents": None, "add_generation_prompt": answer}
        variables |= {"next_bos": tokenizer.bos_token or "" if tokenizer.adds_bos else ""}
        try:
            template = self._compiled if tools is None else self._compiled_for_tools
            if any(message.get("tool_calls") for message in messages):
                wanted = self._arguments_of(template, variables)
                messages = [spell_arguments(message, wanted) for message in messages]
            return getattr(template, function)(messages=[present(message) for message in messages], **variables)
        except Exception as error:  # a template may fail in any way that its code can
            line = f" at line {error.lineno}" if hasattr(error, "lineno") else ""
            where = "in chat_template.jinja or tokenizer_config.json" if self.name == "checkpoint" else "in its file"
            raise UserError(
                f"prompt style '{self.name}': the template failed{line}: {error}; mend it {where}, or choose another "
                "by --prompt_style"
            ) from None

    def _arguments_of(self, template: Template, variables: dict[str, Any]) -> str:
        """Return how a template wants the arguments of calls, "object", "text" or "any", by rendering both."""
        if template not in self._wanted:
            text, object = (template_shows(template, kind, variables) for kind in ("text", "object"))
            self._wanted[template] = "any" if text and object else "text" if text else "object"
        return self._wanted[template]

    @cached_property
    def _wanted(self) -> dict[Template, str]:
        return {}

    def encode_prompt(self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = None) -> list[int]:
        """Return the token ids up to where the assistant answers."""
        return next(self.encode([self.render(messages, tokenizer, True, tools)], tokenizer)).ids

    def encode_sample(self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = None) -> Encoded:
        """Return the token ids of a conversation, tokenized once and whole, and what of them is to be learned."""
        rendered = self.render_sample(messages, tokenizer, tools)
        return supervision.encode(rendered, next(self.encode([rendered.text], tokenizer)), tokenizer, self.stop_ids)

    def render_sample(self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = None) -> Rendered:
        """Return the text of a conversation and where in it each assistant's turn lies.

        Raises:
            UserError: the template is broken, does what it must not, or refuses the messages.
        """

        def render(some: Sequence[Message], answer: bool = False) -> str:
            return self.render(some, tokenizer, answer, tools)

        text = render(messages)
        theirs = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [supervision.find_turn(messages, i, text, render) for i in theirs]
        others = [part for message in messages if message["role"] != "assistant" for part in supervision.parts(message)]
        others += [tool.get("function", tool).get("name", "") for tool in tools or ()]
        content_dropped = not supervision.shown(others, text)
        return Rendered(text, turns, self._apply("generated", messages, tokenizer, False, tools), content_dropped)

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Encoding]:
        """Yield the ids of rendered texts and their places in the texts."""
        return tokenizer.encode_batch(texts, bos=False if self.template_writes_bos else None)

    def for_others(self, tokenizer: Tokenizer) -> str:
        """Return the template with which transformers' `apply_chat_template` makes the same tokens."""
        if self.template_writes_bos:  # it is the checkpoint's own
            return self.template
        before = "{{ bos_token }}" if tokenizer.adds_bos else ""
        if before and "next_bos" in self.template:
            before += "{%- set next_bos = bos_token %}"
        if tokenizer.eos_token != tokenizer.named_tokens.get("eos_token"):
            before = f"{{%- set eos_token = {json.dumps(tokenizer.eos_token)} %}}" + before
        return before + self.template

    def find_stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Find the end token, and the special token with which the template closes an answer if that is another.

        Where nothing closes an answer, the special token that opens the next turn ends it.
        """
        user = {"role": "user", "content": "a"}
        answered = [user, {"role": "assistant", "content": ANSWER}]
        closing = self._after_answer(answered, tokenizer) or self._after_answer([*answered, user], tokenizer)
        stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        if closing:
            first = int(tokenizer.encode(closing, bos=False)[0])
            stops += [first] if first in tokenizer.added_tokens else []
        return tuple(dict.fromkeys(stops))

    def _after_answer(self, turns: list[Message], tokenizer: Tokenizer) -> str:
        """Return what the template writes after an answer, blanks before it apart; "" where it writes no answer."""
        system = [{"role": "system", "content": "a"}]  # some templates want one, others refuse it
        rendered = (supervision.attempt(self.render, [*start, *turns], tokenizer=tokenizer) for start in ([], system))
        whole = next((text for text in rendered if text is not None), "")
        return whole.rpartition(ANSWER)[2].lstrip() if ANSWER in whole else ""


ANSWER = "Quux"  # a word that no template writes
ARGUMENTS: dict[str, Any] = {"text": '{"quux": 1}', "object": {"quux": 1}}  # of a call, as a template may want them


def template_shows(template: Template, kind: str, variables: dict[str, Any]) -> bool:
    """Return whether a template shows arguments of this kind of ARGUMENTS rightly: text as it is, an object as JSON
    or field by field, but not as Python spells it.
    """
    call = {"id": "call00001", "type": "function", "function": {"name": "act", "arguments": ARGUMENTS[kind]}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    for start in ([], [{"role": "system", "content": "a"}]):
        try:
            text = template.render(messages=[*start, *turns], **variables)
        except Exception:  # whatever a template's code can do
            continue
        return ARGUMENTS["text"] in text if kind == "text" else "quux" in text and "'quux'" not in text
    return False


def present(message: Message) -> Message:
    """Return a message as transformers hands it to a template: no empty fields, reasoning under all names in use."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def generation_stop_ids(checkpoint_dir: Path) -> list[int]:
    """Read the end tokens that the checkpoint's generation_config.json names."""
    path = Path(checkpoint_dir) / "generation_config.json"
    ids = as_list(read_json(path, missing_ok=True).get("eos_token_id"))
    if not all(isinstance(i, int) for i in ids):
        raise UserError(f"{path}: eos_token_id: expected a token id or a list of them, found {ids!r}")
    return ids


def as_list(ids: int | list[int] | None) -> list[int]:
    """Return as a list the token ids that a configuration has: several, one or none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
