"""LoRAs that come, go and are replaced while they are served, with less room than they take together."""

import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.methods import LORAS, lora_files
from helpers.servers import running
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.errors import UserError
from lit_gpt.generation.engine import generate
from lit_gpt.methods.finetuned_model import load_finetuned
from lit_gpt.serving.adapters import Adapters
from lit_gpt.serving.catalog import Catalog
from lit_gpt.serving.checks import files_in

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
CHAT, LOAD, UNLOAD = "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
NAMES = [f"n{i}" for i in range(8)]


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    """A folder of eight LoRAs of four ranks, the base beside it, and how many bytes the largest takes."""
    root = tmp_path_factory.mktemp("adapters")
    base, folder = shutil.copytree(llama, root / "base"), root / "loras"
    folder.mkdir()
    for i, path in enumerate(lora_files(base, [*LORAS, *LORAS])):
        if i % 2:
            (folder / NAMES[i]).mkdir()
        path.rename(folder / NAMES[i] / "lit_model_lora_finetuned.pth" if i % 2 else folder / f"{NAMES[i]}.pth")
    pool = Catalog.with_loras(BaseCheckpoint.open(base), files_in(folder), None).adapters.pool
    return base, folder, max(one.nbytes for one in pool.loaded.values())


@pytest.fixture
def server(made, tmp_path):
    """Two answers at a time, and room for three of the eight LoRAs if they are large."""
    base, folder, largest = made
    own = shutil.copytree(folder, tmp_path / "loras")
    with running(base, {}, loras_dir=own, lora_bytes=3 * largest, batch_size=2, context=200, max_queue=60) as server:
        yield server


def ask(server, model: str, text: str = "the cat", new: int = 12, path: str = CHAT):
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": new, "temperature": 0}
    return httpx.post(server.url + path, json=body, timeout=60)


def said(reply) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def alone(server, model: str, text: str = "the cat", new: int = 12) -> str:
    """What the file that stands there now gives alone."""
    catalog = server.completions.catalog
    base, path = catalog.adapters.pool.base, catalog.served[model].path
    single = load_finetuned(base.checkpoint_dir, path, "lora")[0] if path else base.build()
    style = catalog.served["base"].style
    ids = style.encode_prompt([{"role": "user", "content": text}], catalog.tokenizer)
    found = list(generate(single, ids, new, temperature=0, stop_ids=style.stop_ids))
    return catalog.tokenizer.decode(found)


def test_more_loras_than_there_is_room_for_are_each_exact(server):
    draw = random.Random(0)
    adapters = server.completions.catalog.adapters
    asked = [(draw.choice(["base", *NAMES]), draw.choice(("the cat", "a dog")), draw.randint(1, 12)) for _ in range(40)]
    with ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda one: ask(server, *one), asked))
    for one, reply in zip(asked, replies, strict=True):
        assert said(reply) == alone(server, *one), one
    assert adapters.pool.nbytes <= adapters.limit and adapters.reads > len(NAMES)
    models = {m["id"]: m for m in httpx.get(server.url + "/v1/models").json()["data"]}
    assert list(models) == ["base", *NAMES] and all(models[name]["distance"] > 0 for name in NAMES)


def test_a_file_that_is_replaced_damaged_or_gone(server):
    folder = server.completions.catalog.folder
    first = said(ask(server, "n0"))
    shutil.copy(folder / "n2.pth", folder / "n0.pth")
    assert said(ask(server, "n0")) == said(ask(server, "n2")) == alone(server, "n2") != first
    good = (folder / "n0.pth").read_bytes()
    for damaged in (good[: len(good) // 2], b"", b"garbage" * 99, (folder.parent.parent / "x").name.encode()):
        (folder / "n0.pth").write_bytes(damaged)
        reply = ask(server, "n0")
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "model_unavailable"
        assert "n0.pth" not in reply.text and "'n0' cannot be used now" in reply.text
        assert said(ask(server, "n2"))
    record = torch.load(folder / "n2.pth")
    for change in ({"state": {}}, {"state": 3}, {"hyperparameters": {"r": "x"}}, {"base": "1"}):
        torch.save(record | change, folder / "n0.pth")
        assert ask(server, "n0").status_code == 503, change
    (folder / "n0.pth").write_bytes(good)
    assert said(ask(server, "n0")) == alone(server, "n2")
    (folder / "n0.pth").unlink()
    assert ask(server, "n0").status_code in (404, 503)
    wait(lambda: ask(server, "n0").status_code == 404)


def wait(right) -> None:
    deadline = time.monotonic() + 20
    while not right():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_answer_on_its_way_keeps_the_file_that_it_began_with(server):
    folder = server.completions.catalog.folder
    texts = ("the cat", "a dog", "x", "a task", "one two three", "an instruction", "yes")
    text, expected = max(((text, alone(server, "n4", text, 80)) for text in texts), key=lambda one: len(one[1]))
    assert said(ask(server, "n4")) and len(expected) > 40
    with ThreadPoolExecutor(1) as clients:
        reply = clients.submit(ask, server, "n4", text, 80)
        server.wait_for(lambda unfinished: unfinished > 0)
        shutil.copy(folder / "n2.pth", folder / "n4.pth")
        assert said(ask(server, "n4")) == alone(server, "n2")
        assert said(reply.result()) == expected


def test_loras_are_loaded_and_unloaded_by_name_alone(server):
    folder = server.completions.catalog.folder
    change = lambda path, **body: httpx.post(server.url + path, json=body, timeout=60)  # noqa: E731
    before = said(ask(server, "n6"))
    assert change(UNLOAD, lora_name="n6").json() == {"status": "unloaded"}
    wait(lambda: ask(server, "n6").status_code == 404)
    assert change(UNLOAD, lora_name="n6").status_code == 404
    described = change(LOAD, lora_name="n6").json()
    assert described["id"] == "n6" and described["distance"] > 0 and said(ask(server, "n6")) == before
    shutil.copy(folder / "n2.pth", folder / "new.pth")
    assert change(LOAD, lora_name="new").status_code == 200 and said(ask(server, "new")) == alone(server, "n2")
    (folder / "bad.pth").write_text("x")
    assert change(LOAD, lora_name="bad").status_code == 503
    for body in ({"lora_name": "x", "lora_path": "/etc/passwd"}, {"lora_name": 3}, {"lora_path": "x"}):
        assert change(LOAD, **body).status_code == 400
    for name in ("../base/lit_model", "nowhere", ""):
        assert change(LOAD, lora_name=name).status_code == 404
    assert change(UNLOAD, lora_name="base").status_code == 400


def test_a_lora_that_its_share_of_the_room_does_not_hold(made):
    base, folder, largest = made
    with pytest.raises(UserError, match="leaves .* raise --lora_bytes"):
        Catalog.with_loras(BaseCheckpoint.open(base), files_in(folder), None, limit=3 * largest - 3, rows=2)


def test_the_room_is_enough_for_all_rows_whatever_they_want(made):
    """Also while one more is compared with the base."""
    base, folder, largest = made
    catalog = Catalog.with_loras(BaseCheckpoint.open(base), {}, None, folder, limit=3 * largest, rows=2)
    adapters: Adapters = catalog.adapters
    numbers = [catalog.open(name).lora for name in NAMES]
    for first in numbers:
        for second in numbers:
            rows: list[int] = []
            adapters.in_use = lambda rows=rows: rows
            for wanted in (first, second):
                if reading := adapters.fetch(wanted):
                    adapters.add(reading.result(), wanted)
                rows.append(wanted)
            assert {first, second} <= adapters.pool.loaded.keys()
            catalog.compared(adapters.read(catalog.served["n1"].path)[0], folder)
            assert {first, second} <= adapters.pool.loaded.keys() and adapters.pool.nbytes <= adapters.limit


def test_the_folder_is_named_where_it_cannot_be_read(cli, llama, tmp_path):
    cli("generate/serve.py", checkpoint_dir=llama, loras_dir=tmp_path / "nowhere", port=0).refused(
        "--loras_dir", "nowhere", "cannot be read", code=2
    )
