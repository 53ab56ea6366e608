"""The conversation: remembered, cached without a difference, cut to the context, and driven through a terminal."""

import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from helpers.methods import LORAS, lora_files
from helpers.paths import ROOT
from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError
from lit_gpt.generation.args import SamplingArgs
from lit_gpt.generation.chat import Chat
from lit_gpt.generation.commands import converse, greeting
from lit_gpt.generation.engine import generate, prompt_ids
from lit_gpt.methods import finetuned_model
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.text.prompt_style import PromptStyle


@pytest.fixture
def parts(llama):
    tokenizer = Tokenizer(llama)
    return load_model(llama), tokenizer, PromptStyle.from_name("chatml", tokenizer)


def test_each_turn_sees_all_before_and_the_cache_changes_nothing(parts):
    """Three turns, greedy: each answer is what the whole conversation gives, computed from nothing."""
    model, tokenizer, style = parts
    chat = Chat(*parts, 256, SamplingArgs(max_new_tokens=12, temperature=0))
    for text in ("the cat", "and the dog?", "a task"):
        reused = len(chat.cached)
        found = "".join(chat.answer(text))
        prompt = style.encode_prompt(chat.messages[:-1], tokenizer)
        assert tokenizer.decode(prompt).count("the cat") == 1  # the first turn is still there
        alone = generate(model, prompt, 12, temperature=0, stop_ids=style.stop_ids)
        assert found == "".join(tokenizer.decode_stream(alone)) == chat.messages[-1]["content"]
        assert reused == 0 or chat.cached[:20] == prompt[:20]


def test_the_oldest_turns_leave_first_and_it_says_so(parts, capsys):
    chat = Chat(*parts, 120, SamplingArgs(max_new_tokens=10, temperature=0))
    chat.messages.append({"role": "system", "content": "Be"})
    for i in range(6):
        list(chat.answer(f"the cat {i}"))
    assert "oldest" in capsys.readouterr().err
    assert chat.messages[0]["role"] == "system" and chat.messages[-2]["content"] == "the cat 5"
    assert "the cat 0" not in {m["content"] for m in chat.messages}
    before = list(chat.messages)
    with pytest.raises(UserError, match="not sent"):
        list(chat.answer("z" * 200))
    assert "".join(chat.answer("still there")) == chat.messages[-1]["content"] and before


def test_switching_between_loras(parts, llama, tmp_path, monkeypatch, capsys):
    """Each answer is that of the whole conversation under the LoRA that holds now, in its style."""
    folder, (model, tokenizer, _) = shutil.copytree(llama, tmp_path / "base"), parts
    style, *styles = (PromptStyle.from_name(name, tokenizer) for name in ("plain", "falcon-instruct", "plain"))
    paths = [lora_files(folder, [LORAS[i]], style=styles[i].to_dict())[0].rename(tmp_path / f"{i}") for i in (0, 1)]
    chat = Chat(
        model,
        tokenizer,
        style,
        256,
        SamplingArgs(max_new_tokens=6, temperature=0),
        lambda: LoRAPool(model, BaseCheckpoint.open(folder), style),
    )
    singles = [(load_model(folder), style)]
    singles += [
        (finetuned_model.load_finetuned(folder, path, "lora")[0], of) for path, of in zip(paths, styles, strict=True)
    ]
    typed = ["the cat", f"/lora {paths[0]}", "the dog", f"/lora {tmp_path / 'none'}", "a", f"/lora {paths[1]}", "b"]
    typed += [f"/lora  {paths[0]} ", "c", "/lora", "the end"]
    monkeypatch.setattr("builtins.input", lambda _: typed.pop(0) if typed else (_ for _ in ()).throw(EOFError))
    converse(chat)
    printed = capsys.readouterr()
    assert "none: no such file" in printed.err and "the base alone" in printed.err
    assert [m["content"] for m in chat.messages[::2]] == ["the cat", "the dog", "a", "b", "c", "the end"]
    for turn, number in enumerate((0, 1, 1, 2, 1, 0)):
        alone, of = singles[number]
        ids = of.encode_prompt(chat.messages[: 2 * turn + 1], tokenizer)
        found = list(generate(alone, ids, 6, temperature=0, stop_ids=of.stop_ids))
        assert chat.messages[2 * turn + 1]["content"] == tokenizer.decode(found), turn


def test_what_is_no_message_does_not_end_the_conversation(parts, monkeypatch, capsys):
    chat = Chat(*parts, 256, SamplingArgs(max_new_tokens=3, temperature=0))
    typed = ["the cat", "/bye", "/Lora x", "caf\udce9", UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "why"), "/ the dog"]

    def read(_: str) -> str:
        if not typed:
            raise EOFError
        if isinstance(found := typed.pop(0), Exception):
            raise found
        return found

    monkeypatch.setattr("builtins.input", read)
    converse(chat)
    told = capsys.readouterr().err
    assert "no command /bye" in told and "no command /Lora" in told and told.count("not UTF-8 text") == 2
    assert [m["content"] for m in chat.messages[::2]] == ["the cat", "/ the dog"]


def test_a_message_that_renders_to_nothing_is_refused(parts, tmp_path):
    """By the conversation, by the generate scripts' prompt and by the engine, each in one line, and nothing is kept."""
    model, tokenizer, _ = parts
    (tmp_path / "nothing.jinja").write_text("{{ '' }}")
    named = PromptStyle.from_name(str(tmp_path / "nothing.jinja"), tokenizer)
    style = replace(named, template_writes_bos=True)  # so that no BOS is added
    chat = Chat(model, tokenizer, style, 256, SamplingArgs(max_new_tokens=3))
    with pytest.raises(UserError, match="the message holds no tokens .*; write another"):
        list(chat.answer("the cat"))
    assert chat.messages == []
    with pytest.raises(UserError, match="the prompt holds no tokens .*; give it some text"):
        prompt_ids([{"role": "user", "content": "the cat"}], model, tokenizer, style)
    with pytest.raises(UserError, match="the prompt holds no tokens; give at least one"):
        next(generate(model, [], 3))


def test_a_context_without_room_for_a_message(cli, llama):
    cli("chat/base.py", checkpoint_dir=llama, context=100).refused("--max_new_tokens 512", "context of 100", code=2)


def test_a_conversation_that_begins_with_a_merged_lora(cli, llama, tmp_path, monkeypatch):
    folder = shutil.copytree(llama, tmp_path / "base")
    style = PromptStyle.from_name("alpaca", Tokenizer(folder)).to_dict()
    first, second = lora_files(folder, LORAS[:2], style=style)
    flags = {"checkpoint_dir": folder, "temperature": 0, "precision": "fp32", "max_new_tokens": 12, "context": 200}

    def told(*typed: str, **more) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
        result = cli("chat/base.py", **flags, **more)
        assert result.code == 0
        return result.out.replace("> ", "")

    assert told("the cat", finetuned_path=first) == told(f"/lora {first}", "the cat")
    assert told(f"/lora {second}", "the cat", finetuned_path=first) == told("the cat", finetuned_path=second)
    assert told("/lora", "the cat", finetuned_path=first) == told("the cat")
    assert len({told("the cat", finetuned_path=first), told("the cat", finetuned_path=second), told("the cat")}) > 1


@pytest.mark.subprocess
def test_through_a_terminal(llama):
    """An empty line, a turn, Ctrl-C within an answer, another turn, and the end of input."""
    control, terminal = pty.openpty()
    argv = ["chat/base.py", f"--checkpoint_dir={llama}", "--max_new_tokens=150", "--temperature=0"]
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    seen = ""

    def read_until(mark: str, count: int) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while seen.count(mark) < count:
            assert time.monotonic() < deadline, seen
            seen += os.read(control, 4096).decode(errors="replace")

    read_until("> ", 1)
    os.write(control, b"\n")
    read_until("> ", 2)
    os.write(control, b"the cat\n")
    while len(seen.partition("the cat")[2]) < 12:
        seen += os.read(control, 64).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    read_until("> ", 3)
    os.write(control, b"\x04")
    assert process.wait(timeout=30) == 0
    assert "Traceback" not in seen and ("[stopped]" in seen or len(seen) > 100)


def test_commands_act_on_the_conversation(parts, tmp_path, monkeypatch, capsys):
    chat, path = Chat(*parts, 256, SamplingArgs(max_new_tokens=3, temperature=0)), tmp_path / "chat.json"

    def told(*typed: str) -> str:
        lines = iter(typed)
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        converse(chat)
        return capsys.readouterr().err

    save = f"/save {path}"
    seen = told("/save x.json", "/help", "/system Be brief.", "the cat", save, f"{save}l", save, "/clear", "exit")
    assert "nothing was said yet" in seen
    rows = [row.fields["messages"] for end in ("", "l") for row in Source(f"{path}{end}").rows()]
    assert [[message["role"] for message in messages] for messages in rows] == [["system", "user", "assistant"]] * 2
    assert all(name in seen for name in ("/load FILE", "/lora [FILE]", "/exit")) and "exists already" in seen
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert "/load nowhere: expected a file" in told("/load nowhere", "/system", "/instruction Say it.", "cat", "quit")
    assert chat.messages[0]["content"] == "Say it.\n\ncat" and chat.messages[0]["input"] == "cat"
    assert "3 messages" in told(f"/load {path}", "/exit")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert greeting("m", "lora", chat).startswith("m, finetuned by lora; prompt style chatml; 256 tokens")
    assert "/instruction" not in greeting("m", None, chat)
    chat.style = PromptStyle.from_name("alpaca", parts[1])
    assert "/instruction TEXT" in greeting("m", None, chat)
