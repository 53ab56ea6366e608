"""Where results go: folders that cannot be replaced, links, names with blanks; and equal runs leave equal bytes."""

import os
import shlex
from pathlib import Path

import pytest

from helpers.rows import write_rows
from lit_gpt import files
from lit_gpt.errors import UserError

SCRIPT = "scripts/prepare_json.py"
MADE = ["data.json", "train.safetensors", "validation.safetensors"]


@pytest.fixture
def flags(llama, tmp_path) -> dict:
    return {"checkpoint_dir": llama, "data_path": write_rows(tmp_path / "r.jsonl")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_that_we_are_in(cli, flags, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cli(SCRIPT, **flags, out_dir=".").code == 0
    assert sorted(os.listdir()) == MADE == names(tmp_path / "empty")  # the shell's folder is still that one
    cli(SCRIPT, **flags, out_dir=".").refused("already exists and is not an empty folder")


def test_a_link_to_an_empty_folder(cli, flags, tmp_path):
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    assert cli(SCRIPT, **flags, out_dir=tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "disk" / "data") == MADE
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    cli(SCRIPT, **flags, out_dir=tmp_path / "lost").refused("lost: is a link to", "nowhere", "does not exist")


@pytest.mark.parametrize("known", [True, False], ids=["seen", "unseen"])
def test_a_mount_point(tmp_path, monkeypatch, known):
    """Nothing can be renamed onto it; one within the same file system does not even look like one."""
    (tmp_path / "disk").mkdir()
    rename = os.replace

    def replace(source, target):
        if Path(target) == tmp_path / "disk":
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os.path, "ismount", lambda path: known and Path(path) == tmp_path / "disk")
    with files.new_folder(tmp_path / "disk") as folder:
        assert (folder.parent == tmp_path / "disk") == known
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("b")
    assert (tmp_path / "disk" / "a" / "b").read_text() == "b" and names(tmp_path) == ["disk"]
    assert names(tmp_path / "disk") == ["a"]


def test_what_a_killed_process_left_within_a_folder_is_no_content(tmp_path, monkeypatch):
    (tmp_path / "disk" / ".disk.tmp").mkdir(parents=True)
    (tmp_path / "disk" / ".disk.tmp" / "half").touch()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with files.new_folder(tmp_path / "disk") as folder:
        (folder / "whole").touch()
    assert names(tmp_path / "disk") == ["whole"]


def test_what_cannot_be_put_in_place_is_never_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    monkeypatch.setattr("shutil.move", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(UserError, match=r"out: could not be put in place .* complete in .*\.out\.tmp"):
        with files.new_folder(tmp_path / "out") as folder:
            (folder / "result").touch()
    assert names(tmp_path / ".out.tmp") == ["result"]


def test_home_and_blanks_in_paths(cli, flags, tmp_path, monkeypatch):
    """`~` behind an equals sign and in a file of flags, which no shell expands; what is printed can be pasted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags.json").write_text('{"data_path": "~/r.jsonl", "out_dir": "~/my data"}')
    result = cli(SCRIPT, checkpoint_dir=flags["checkpoint_dir"], config="~/flags.json")
    assert result.code == 0 and names(tmp_path / "my data") == MADE
    command = shlex.split(result.out.rpartition("next: ")[2])
    assert command[command.index("--data_dir") + 1] == str(tmp_path / "my data")
    style = tmp_path / "t.jinja"
    style.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert cli(SCRIPT, **flags, prompt_style="~/t.jinja", out_dir="~/other").code == 0
    assert names(tmp_path / "other") == MADE


def test_equal_contents_are_equal_bytes(tmp_path, monkeypatch):
    """Whichever process wrote them."""
    import torch

    from lit_gpt.checkpoints import io

    state = {"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    for pid in (7, 12345):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        folder = tmp_path / str(pid)
        folder.mkdir()
        io.save(folder / "saved.pth", {"state": state})
        io.write_streamed(folder / "streamed.pth", state, state.items())
    for name in ("saved.pth", "streamed.pth"):
        assert (tmp_path / "7" / name).read_bytes() == (tmp_path / "12345" / name).read_bytes()


@pytest.mark.parametrize("form", ["file", "stdin"])
def test_the_last_newline_of_a_prompt_is_left_out_and_said(tmp_path, monkeypatch, capsys, form):
    import io as streams

    from lit_gpt.generation.answer import read_text

    for contents, expected, told in (
        ("The capital\n", "The capital", True), ("The capital\r\n", "The capital", True),
        ("\ufeffThe capital", "The capital", False), ("a\n\n", "a\n", True), ("a ", "a ", False),
    ):  # fmt: skip
        (tmp_path / "p.txt").write_bytes(contents.encode())
        monkeypatch.setattr("sys.stdin", streams.StringIO(contents, newline=""))
        assert read_text(tmp_path / "p.txt" if form == "file" else Path("-")).replace("\r\n", "\n") == expected
        assert ("left out" in capsys.readouterr().err) == told
