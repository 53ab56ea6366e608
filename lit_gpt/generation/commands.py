"""A conversation at the terminal: reads messages, and the commands that begin with a slash."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lit_gpt.errors import UserError, reason
from lit_gpt.files import atomic
from lit_gpt.generation.chat import Chat
from lit_gpt.text.messages import instruction_messages, read_messages


class Command(NamedTuple):
    """A command: what follows its name, what it does in words, and what does it and returns what it has to say."""

    argument: str
    help: str
    run: Callable[[Chat, str], str]


def converse(chat: Chat) -> None:
    """Read messages from standard input until it ends; Ctrl-C stops an answer, not the conversation.

    What begins with the name of a command is no message. Nor is any other word behind a slash alone.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (with it a line can be edited, and called back)
    while True:
        try:
            text = input("> ")
            if text.strip() in ("exit", "quit", "/exit", "/quit"):
                return
            take(chat, text)
        except EOFError:
            return print()
        except UnicodeDecodeError as error:
            say(f"not sent: the message is not UTF-8 text ({error.reason})")
        except KeyboardInterrupt:
            say("/exit or Ctrl-D ends the conversation", before="\n")
        except UserError as error:
            say(str(error))


def say(text: str, before: str = "") -> None:
    print(f"{before}[{text}]", file=sys.stderr)


def take(chat: Chat, text: str) -> None:
    """Run a command, or answer a message."""
    name, _, argument = text.strip().partition(" ")
    if command := COMMANDS.get(name):
        return say(command.run(chat, argument.strip()))
    if re.fullmatch(r"/[a-zA-Z]+", text.strip()) or name.lower() in COMMANDS:
        raise UserError(f"no command {name}; /help lists them, /exit ends the conversation")
    if not text.strip():
        return None
    try:
        for piece in chat.answer(text):
            print(piece, end="", flush=True)
        print()
        if not chat.messages[-1]["content"]:
            say("the model ended its answer at once; one that was trained on instructions may want /instruction TEXT")
    except KeyboardInterrupt:
        print(" [stopped]")


def greeting(model: str, method: str | None, chat: Chat) -> str:
    """Return who answers, in which prompt style, and how to leave."""
    style = chat.style
    finetuned = f", finetuned by {method}" if method else ""
    lines = f"{model}{finetuned}; prompt style {style.name}; {chat.context} tokens of context; /help lists commands, "
    lines += "/exit leaves"
    with suppress(UserError):  # a template may refuse these messages
        apart, joined = instruction_messages("a", "b"), [{"role": "user", "content": "a\n\nb"}]
        if style.render(apart, chat.tokenizer, True) != style.render(joined, chat.tokenizer, True):
            lines += (
                ". This style has a place for an instruction and its input: /instruction TEXT sets the one, and "
                "messages are the other"
            )
    return lines


def _help(chat: Chat, _: str) -> str:
    rows = ((f"{name} {command.argument}".strip(), command.help) for name, command in COMMANDS.items())
    return "".join(f"\n  {usage:<20}{text}" for usage, text in [*rows, ("/exit", "end the conversation")]) + "\n"


def _clear(chat: Chat, _: str) -> str:
    chat.messages = chat.messages[: has_system(chat)]
    return "the conversation begins anew" + (", with its system message" if chat.messages else "")


def has_system(chat: Chat) -> bool:
    return bool(chat.messages) and chat.messages[0]["role"] == "system"


def _system(chat: Chat, text: str) -> str:
    chat.messages = [{"role": "system", "content": text}][: bool(text)] + chat.messages[has_system(chat) :]
    return "the system message is set; the conversation goes on" if text else "no system message from now on"


def _instruction(chat: Chat, text: str) -> str:
    chat.instruction = text
    return "messages are the input of this instruction from now on" if text else "messages stand alone from now on"


def _lora(chat: Chat, path: str) -> str:
    chat.use(Path(path).expanduser() if path else None)
    kept = "; the conversation goes on, /clear forgets it" if chat.messages[has_system(chat) :] else ""
    return f"from now on: {path or 'the base alone'}{kept}"


def _save(chat: Chat, name: str) -> str:
    if not name:
        raise UserError("/save: expected a file, such as /save chat.jsonl")
    if not chat.messages:
        raise UserError("/save: nothing was said yet")
    path = Path(name).expanduser()
    if path.exists():
        raise UserError(f"/save {path}: exists already; choose another")
    row = json.dumps({"messages": chat.messages}, ensure_ascii=False)
    with atomic(path) as temporary:  # as prepare_json.py reads files of these names
        temporary.write_text(f"[{row}]\n" if path.suffix == ".json" else f"{row}\n", encoding="utf-8")
    return f"wrote {path}; /load reads it"


def _load(chat: Chat, name: str) -> str:
    path = Path(name or ".").expanduser()
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        messages = read_messages((contents[0] if isinstance(contents, list) else contents)["messages"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"/load {name}: expected a file that /save wrote ({reason(error)})") from None
    if messages[-1]["role"] == "user":
        raise UserError(f"/load {name}: its last message has no answer; expected a file that /save wrote")
    chat.messages = messages
    return f"{len(messages)} messages from {path}; the conversation goes on from there"


COMMANDS = {
    "/help": Command("", "list the commands", _help),
    "/clear": Command("", "forget the conversation, but for its system message", _clear),
    "/system": Command("[TEXT]", "set the system message, or leave it out", _system),
    "/instruction": Command("[TEXT]", "take messages as the input of this instruction, or alone", _instruction),
    "/lora": Command("[FILE]", "answer through this LoRA, or by the base alone", _lora),
    "/save": Command("FILE", "write the conversation to a new file", _save),
    "/load": Command("FILE", "go on with the conversation in a file", _load),
}
