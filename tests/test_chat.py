"""The conversation: remembered, cached without a difference, cut to the context, and driven through a terminal."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from lit_gpt import GPT, Tokenizer
from lit_gpt.chat import Chat
from lit_gpt.errors import UserError
from lit_gpt.generation import generate
from lit_gpt.prompts import PromptStyle


@pytest.fixture
def parts(llama):
    tokenizer = Tokenizer(llama)
    return GPT.from_checkpoint(llama), tokenizer, PromptStyle.from_name("chatml", tokenizer)


def test_each_turn_sees_all_before_and_the_cache_changes_nothing(parts):
    """Three turns, greedy: each answer is what the whole conversation gives, computed from nothing."""
    model, tokenizer, style = parts
    chat = Chat(*parts, context=256, max_new_tokens=12, temperature=0)
    for text in ("the cat", "and the dog?", "a task"):
        reused = len(chat.cached)
        found = "".join(chat.answer(text))
        prompt = style.encode_prompt(chat.messages[:-1], tokenizer)
        assert tokenizer.decode(prompt).count("the cat") == 1  # the first turn is still there
        alone = generate(model, prompt, 12, temperature=0, stop_ids=style.stop_ids)
        assert found == "".join(tokenizer.decode_stream(alone)) == chat.messages[-1]["content"]
        assert reused == 0 or chat.cached[:20] == prompt[:20]


def test_the_oldest_turns_leave_first_and_it_says_so(parts, capsys):
    chat = Chat(*parts, context=120, max_new_tokens=10, temperature=0)
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


def test_through_a_terminal(llama):
    """An empty line, a turn, Ctrl-C within an answer, another turn, and the end of input."""
    control, terminal = pty.openpty()
    argv = ["chat/base.py", f"--checkpoint_dir={llama}", "--max_new_tokens=150", "--temperature=0", "--context=4000"]
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
