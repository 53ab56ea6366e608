"""scripts/download.py as users run it, against a hub on the loopback."""

import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.hub import Hub
from helpers.paths import ROOT

pytestmark = pytest.mark.subprocess

SCRIPT = ROOT / "scripts" / "download.py"
TOKEN = "hf_loopbackSecretOfNobody"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
BIG = SHARDS[0]
NEEDED = {
    "config.json": b'{"model_type": "falcon"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": random.Random(0).randbytes(5000),
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE.txt": b"Do as you like.",
    "README.md": b"",  # empty files exist
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    SHARDS[0]: random.Random(1).randbytes(1_500_000),
    SHARDS[1]: random.Random(2).randbytes(70_001),
}
OTHERS = {
    ".gitattributes": b"*.bin filter=lfs",
    "consolidated.safetensors": bytes(1000),
    "pytorch_model-00001-of-00001.bin": bytes(1000),
    "pytorch_model.bin.index.json": b"{}",
    "tf_model.h5": bytes(100),
    "flax_model.msgpack": bytes(100),
    "model-q4.gguf": bytes(100),
    "modeling_falcon.py": b"import os",
    "onnx/model.onnx": bytes(100),
    "original/consolidated.00.safetensors": bytes(100),
    "original/config.json": b"{}",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(NEEDED | OTHERS) as hub:
        yield hub


def command(hub: Hub, tmp_path: Path, *flags: str, **environment: str) -> dict:
    """What subprocess needs to run the script in tmp_path, with no variable that could reach the real hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)} | environment
    repo = [] if "--repo_id" in flags else ["--repo_id", hub.repo_id]
    return {"args": [sys.executable, str(SCRIPT), *repo, *flags], "env": kept | environment, "cwd": tmp_path}


def download(hub: Hub, tmp_path: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    result = subprocess.run(**command(hub, tmp_path, *flags, **environment), capture_output=True, text=True, timeout=60)
    assert TOKEN not in result.stdout + result.stderr
    return result


def complete(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def failed(result: subprocess.CompletedProcess, exit_code: int = 1) -> str:
    """The one line on stderr of a run that failed as it should."""
    assert result.returncode == exit_code, result.stdout + result.stderr
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert "Traceback" not in result.stdout
    return result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """The files under their final names."""
    files = folder.iterdir() if folder.is_dir() else []
    return {path.name: path.read_bytes() for path in files if path.suffix != ".part" and path.name != ".download.lock"}


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


def begun(tmp_path: Path) -> bool:
    """Whether the big file is the last, and more than half a megabyte of it has arrived."""
    left = parts(landed(tmp_path))
    return len(left) == 1 and left[0].name.startswith(BIG) and left[0].stat().st_size > 500_000


def wait_for(condition: Callable[[], bool], pause: float = 0.01) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(pause)


def landed(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "owner" / "tiny"


def test_needed_files_only_and_only_once(hub: Hub, tmp_path: Path) -> None:
    said = complete(download(hub, tmp_path))
    assert contents(landed(tmp_path)) == NEEDED and not parts(landed(tmp_path))
    assert "To download: 12 files, 1.58 MB" in said
    assert said.splitlines()[-1] == "python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/owner/tiny"
    before = hub.file_requests, sum(hub.served.values())
    said = complete(download(hub, tmp_path))
    assert (hub.file_requests, sum(hub.served.values())) == before
    assert "Complete: 12 files" in said and "To download: 0 files" in said


def test_changed_file_is_replaced_and_named(hub: Hub, tmp_path: Path) -> None:
    complete(download(hub, tmp_path))
    (landed(tmp_path) / "tokenizer_config.json").write_bytes(b"[]")  # as long as the hub's
    (landed(tmp_path) / "lit_config.json").write_bytes(b"ours")
    said = complete(download(hub, tmp_path))
    assert "tokenizer_config.json differs from the hub's and will be replaced" in said
    assert contents(landed(tmp_path)) == NEEDED | {"lit_config.json": b"ours"}


def test_cut_is_resumed_within_the_run(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {BIG: ("cut", 600_000), SHARDS[1]: ("reset", 40_000)}
    complete(download(hub, tmp_path))
    assert contents(landed(tmp_path)) == NEEDED and not hub.faults
    assert hub.served[BIG] == len(NEEDED[BIG])  # a reset may lose what was under way


def test_passing_answers_are_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.revisions["main"] = {"config.json": b"{}", "model.safetensors": b"x"}
    hub.busy = 1
    complete(download(hub, tmp_path))
    assert contents(landed(tmp_path)) == hub.revisions["main"] and not hub.busy


def test_cut_is_resumed_by_the_next_run(hub: Hub, tmp_path: Path) -> None:
    """The connection ends and the hub stays away until the script gives up."""
    hub.faults = {BIG: ("cut", 600_000)}
    call = command(hub, tmp_path)
    away = "import sys, time, runpy; time.sleep = lambda s: print('waits', s); sys.argv = sys.argv[1:]; "
    call["args"][1:2] = ["-c", away + "runpy.run_path(sys.argv[0], run_name='__main__')", str(SCRIPT)]
    running = subprocess.Popen(**call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: hub.served[BIG] == 600_000, pause=0.001)
    hub.busy = 1000
    stdout, stderr = running.communicate(timeout=60)
    failed(subprocess.CompletedProcess([], running.returncode, stdout, stderr))
    assert re.findall(r"waits (\d+)", stdout) == ["1", "2", "4", "8", "15"]
    assert BIG not in contents(landed(tmp_path))
    hub.busy, hub.served[BIG] = 0, 0
    said = complete(download(hub, tmp_path))
    assert contents(landed(tmp_path)) == NEEDED and not parts(landed(tmp_path))
    assert hub.served[BIG] == len(NEEDED[BIG]) - 600_000
    assert "(0.60 MB of it came in an earlier run)" in said


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again(hub: Hub, tmp_path: Path, sign: int) -> None:
    hub.faults = {BIG: ("hold", 600_000)}
    running = subprocess.Popen(**command(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: begun(tmp_path))
    running.send_signal(sign)
    _, stderr = running.communicate(timeout=20)
    assert (running.returncode, stderr) in [(-signal.SIGKILL, ""), (130, "error: interrupted\n")]
    (part,) = parts(landed(tmp_path))
    have = part.stat().st_size
    assert have > 500_000 and BIG not in contents(landed(tmp_path))
    hub.served.clear()
    complete(download(hub, tmp_path))
    assert contents(landed(tmp_path)) == NEEDED and not parts(landed(tmp_path))
    assert hub.served[BIG] == len(NEEDED[BIG]) - have and hub.served["config.json"] == 0


def test_part_of_another_revision_is_not_continued(hub: Hub, tmp_path: Path) -> None:
    hub.revisions["old"] = NEEDED | {BIG: random.Random(3).randbytes(1_000_000)}
    hub.faults = {BIG: ("hold", 600_000)}
    running = subprocess.Popen(**command(hub, tmp_path, "--revision", "old"), stdout=subprocess.DEVNULL)
    wait_for(lambda: begun(tmp_path))
    running.kill()
    running.wait()
    complete(download(hub, tmp_path))
    assert contents(landed(tmp_path)) == NEEDED and not parts(landed(tmp_path))


def test_part_survives_a_hub_without_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.faults, hub.ranges = {BIG: ("cut", 600_000)}, False
    complete(download(hub, tmp_path))
    assert contents(landed(tmp_path)) == NEEDED and hub.served[BIG] == 600_000 + len(NEEDED[BIG])


def test_two_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {BIG: ("hold", 600_000)}
    running = subprocess.Popen(**command(hub, tmp_path), stdout=subprocess.DEVNULL)
    wait_for(lambda: begun(tmp_path))
    assert "another download into this folder is running" in failed(download(hub, tmp_path))
    running.kill()
    running.wait()


def test_not_there(hub: Hub, tmp_path: Path) -> None:
    assert "owner/tinny is not at http://127.0.0.1" in failed(download(hub, tmp_path, "--repo_id", "owner/tinny"))
    hub.refuse = 404, "RepoNotFound", "Repository not found"
    assert "check the spelling" in failed(download(hub, tmp_path, "--access_token", TOKEN))
    assert not (tmp_path / "checkpoints").exists()


def test_private_and_wrong_token(hub: Hub, tmp_path: Path) -> None:
    hub.token = TOKEN
    assert "if it is private, give a token" in failed(download(hub, tmp_path))
    hub.refuse = 401, "", "Invalid credentials in Authorization header"
    assert "the access token is not valid" in failed(download(hub, tmp_path, HF_TOKEN=TOKEN))
    hub.refuse = 403, "", "This token may not read gated repositories."
    assert "This token may not read gated repositories." in failed(download(hub, tmp_path, HF_TOKEN=TOKEN))
    assert not (tmp_path / "checkpoints").exists()


def test_gated(hub: Hub, tmp_path: Path) -> None:
    """Such a repository lists its files and refuses them: 401 without a token, 403 before the licence is accepted."""
    hub.refuse_files = 401, "GatedRepo", "Access to model owner/tiny is restricted."
    line = failed(download(hub, tmp_path))
    assert f"accept its licence at {hub.url}/owner/tiny" in line and "--access_token or HF_TOKEN" in line
    hub.revisions["main"] = {"config.json": b"{}", "model.safetensors": b"x"}  # no index to be refused first
    hub.refuse_files = 403, "GatedRepo", "Access to model owner/tiny is restricted."
    assert f"accept its licence at {hub.url}/owner/tiny" in failed(download(hub, tmp_path, "--access_token", TOKEN))
    assert not (tmp_path / "checkpoints").exists()


def test_revision_and_checkpoint_dir(hub: Hub, tmp_path: Path) -> None:
    hub.revisions["2.0"] = NEEDED | {"config.json": b"{ }"}
    assert "owner/tiny has no revision 'v9'" in failed(download(hub, tmp_path, "--revision", "v9"))
    said = complete(download(hub, tmp_path, "--revision", "2.0", "--checkpoint_dir", "my models/tiny"))
    assert contents(tmp_path / "my models" / "tiny") == hub.revisions["2.0"]
    assert said.splitlines()[-1].endswith("--checkpoint_dir 'my models/tiny'")


@pytest.mark.parametrize("flags", [[], ["--access_token", TOKEN]], ids=["HF_TOKEN", "flag"])
def test_token_reaches_the_hub_alone(hub: Hub, tmp_path: Path, flags: list[str]) -> None:
    hub.token = TOKEN
    complete(download(hub, tmp_path, *flags, HF_TOKEN="hf_other" if flags else TOKEN))
    assert contents(landed(tmp_path)) == NEEDED
    seen = {path.startswith("/cdn/"): authorization for _, path, authorization in hub.requests}
    assert seen == {False: f"Bearer {TOKEN}", True: None}  # the host that holds large files is another
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_unusable_token_is_not_quoted(hub: Hub, tmp_path: Path) -> None:
    for token in (TOKEN + " x", TOKEN + "é"):
        failed(download(hub, tmp_path, HF_TOKEN=token), exit_code=2)
        failed(download(hub, tmp_path, "--access_token", token), exit_code=2)


def test_wrong_content(hub: Hub, tmp_path: Path) -> None:
    for name in ("tokenizer.json", SHARDS[1]):  # in the order of their coming
        hub.corrupt = {name}
        assert f"{name}: its hash is not the hub's" in failed(download(hub, tmp_path))
        assert name not in contents(landed(tmp_path)) and not parts(landed(tmp_path))
        hub.corrupt = set()
    hub.short = {SHARDS[1]: 10}
    assert f"{SHARDS[1]}: 10 bytes came instead of {len(NEEDED[SHARDS[1]])}" in failed(download(hub, tmp_path))
    assert SHARDS[1] not in contents(landed(tmp_path)) and not parts(landed(tmp_path))
    hub.short = {}
    complete(download(hub, tmp_path))
    assert contents(landed(tmp_path)) == NEEDED


def test_unreachable(hub: Hub, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9", "http://no.such.host.invalid", "127.0.0.1"
    for endpoint in nowhere:
        line = failed(download(hub, tmp_path, HF_ENDPOINT=endpoint))
        assert f"cannot reach {endpoint}" in line and "check network, proxy" in line
    assert "HF_HUB_OFFLINE" in failed(download(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert not (tmp_path / "checkpoints").exists()


def test_endpoint_that_is_no_hub(hub: Hub, tmp_path: Path) -> None:
    hub.info = lambda commit: ["log in to the hotel's network"]
    assert "does not answer as the hub does" in failed(download(hub, tmp_path))


def test_disk_too_small(hub: Hub, tmp_path: Path) -> None:
    hub.listed_size[BIG] = 10**17
    line = failed(download(hub, tmp_path))
    assert "checkpoints/owner/tiny: 100000000.00 GB are to come and the disk has" in line
    assert contents(landed(tmp_path)) == {} and not parts(landed(tmp_path))


def test_weights_that_are_taken(hub: Hub, tmp_path: Path) -> None:
    """One complete set, whatever lies beside it."""
    base = {"config.json": b"{}"}
    bins = {f"pytorch_model-0000{i}-of-00002.bin": bytes(i) for i in (1, 2)}
    weight_map = dict(zip("ab", bins, strict=True))
    bin_index = {"pytorch_model.bin.index.json": json.dumps({"weight_map": weight_map}).encode()}
    one = {"model.safetensors": bytes(4)}
    stale = {"model.safetensors.index.json": NEEDED["model.safetensors.index.json"]}
    beside = {"consolidated.safetensors": bytes(5), "adapter_model.safetensors": bytes(6)}
    cases = {
        "bins": (bins | bin_index, {"training_args.bin": b"x"}),
        "one_bin": ({"pytorch_model.bin": b"x"}, {"pytorch_model.fp16.bin": b"y"} | beside),
        "one": (one, beside | bins | bin_index | {"model.fp16.safetensors": b"z"}),
        "stale_index": (one, stale),
        "own_name": ({"weights-a.safetensors": b"a", "weights-b.safetensors": b"b"}, beside),
    }
    for name, (taken, left) in cases.items():
        hub.revisions["main"] = base | taken | left
        complete(download(hub, tmp_path, "--checkpoint_dir", name))
        assert contents(tmp_path / name) == base | taken


def test_no_model_in_it(hub: Hub, tmp_path: Path) -> None:
    config, index = {"config.json": b"{}"}, {"model.safetensors.index.json": NEEDED["model.safetensors.index.json"]}
    for files, said in (
        (config | {"model.gguf": b"x", "consolidated.safetensors": b"x"}, "has no weights as *.safetensors or"),
        ({"model.safetensors": b"x"}, "has no config.json at its root (model.safetensors)"),
        (config | index | {SHARDS[0]: b"x"}, f"names {SHARDS[1]}, which the repository lacks"),
    ):
        hub.revisions["main"] = files
        assert said in failed(download(hub, tmp_path))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("repo_id", [None, "../up", "https://huggingface.co/a/b"])
def test_usage(repo_id: str | None, tmp_path: Path) -> None:
    flags = [] if repo_id is None else [f"--repo_id={repo_id}"]
    call = [sys.executable, str(SCRIPT), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "--repo_id: expected a repository as owner/name" in failed(result, exit_code=2)


def test_progress_bars_where_somebody_watches(hub: Hub, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    running = subprocess.Popen(**command(hub, tmp_path), stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while block := os.read(ours, 1 << 16):
            seen += block
    except OSError:  # how a terminal says that the other side has closed
        pass
    os.close(ours)
    said, _ = running.communicate()
    assert running.returncode == 0
    assert BIG.encode() + b": 100%" in seen and b"1.50M/1.50M" in seen
    assert BIG.encode() not in said


def test_help_needs_no_hub(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.modules['huggingface_hub'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", code, str(SCRIPT), "--help"]
    result = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "--access_token" in result.stdout
