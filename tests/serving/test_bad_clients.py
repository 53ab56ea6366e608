"""Clients that send garbage, go away, ask for too much or have no key: each is told, and the others are served."""

import json
import shutil
import socket
import time
from contextlib import ExitStack, suppress

import pytest

from helpers.cli import spawn
from helpers.methods import LORAS, lora_files
from helpers.servers import running

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
ENDS = ("stop", "length")
JSON = {"Content-Type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": "base", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 5, "temperature": 0}


def post(server, body: bytes, path: str = CHAT, **headers) -> httpx.Response:
    return CLIENT.post(server.url + path, content=body, headers=JSON | headers)


def answer(server) -> str:
    reply = post(server, json.dumps(ASKED).encode())
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


# each request by a connection of its own, and no certificates to be read for each
CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
GARBAGE = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"model": "base", "messages": "\xe9"}', b"[" * 100_000,
    b'{"model": "base", "messages": [{"role": "user", "content": "\\ud83d"}]}', b'{"temperature": NaN}',
    b'{"seed": ' + b"9" * 5000 + b"}",
]  # fmt: skip
FIELDS = [
    {"model": 3}, {"model": ["base"]}, {"messages": 3}, {"messages": [3]}, {"messages": [[]]}, {"messages": [{}]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": 1, "content": "x"}]}, {"n": -1}, {"n": 1.5}, {"n": True},
    {"n": "1"}, {"n": 10**400}, {"max_tokens": 0}, {"max_tokens": -5}, {"max_tokens": 10**400}, {"temperature": -1},
    {"temperature": "hot"}, {"top_p": 2}, {"top_k": -7}, {"seed": 0.5}, {"seed": []}, {"stop": 3}, {"stop": [3]},
    {"stop": ["a"] * 99}, {"stream": "yes"}, {"stream_options": 3}, {"stream_options": {"include_usage": 1}},
    {"logprobs": 3}, {"logprobs": True, "top_logprobs": 99}, {"response_format": {"type": "yaml"}},
    {"response_format": 3},
    {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "json_schema", "json_schema": 3}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
    {"tools": [{"type": "function"}]}, {"tools": {}}, {"tools": [3]}, {"tools": [{"type": "function", "function": {}}]},
    {"tool_choice": "required"}, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"prompt": "x"}, {"temperature": 1e999}, {"../../etc": 1},
]  # fmt: skip
PROMPTS = [None, 3, {}, [], [[]], [[-1]], [["x"]], [3.5], [10**9], [True], "", ["a"] * 200, "\x00" * 500]


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_a_body_that_is_no_request(served, body):
    for path in (CHAT, TEXT):
        reply = post(served, body, path)
        assert reply.status_code == 400, reply.text
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_fields_that_are_not_what_is_expected(served):
    for change in FIELDS:
        change = {"messages": ASKED["messages"]} | change
        body = json.dumps(ASKED | change) if "prompt" not in change else json.dumps({"model": "base"} | change)
        reply = post(served, body.encode())
        assert 400 <= reply.status_code < 500, (change, reply.text)
        assert "Traceback" not in reply.text and reply.json()["error"]["message"]
    for prompt in PROMPTS:
        reply = post(served, json.dumps({"model": "base", "prompt": prompt}).encode(), TEXT)
        assert reply.status_code == 400, (prompt, reply.text)
    assert answer(served) == answer(served)


def test_routes_methods_and_content_types(served):
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("POST", "/health", 405), ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ):  # fmt: skip
        reply = httpx.request(method, served.url + path)
        assert reply.status_code == status and reply.json()["error"]["message"], path
    reply = httpx.post(served.url + CHAT, content=json.dumps(ASKED), headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415
    assert (
        "access-control-allow-origin"
        not in httpx.get(served.url + "/v1/models", headers={"Origin": "http://x"}).headers
    )


def test_a_body_of_ten_megabytes(served):
    large = ASKED | {"messages": [{"role": "user", "content": "x" * 10_000_000}]}
    reply = post(served, json.dumps(large).encode())
    assert reply.status_code == 413 and "at most 1000000 bytes" in reply.text
    assert answer(served)


def test_health_metrics_and_the_page(served):
    answer(served)
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}
    metrics = httpx.get(served.url + "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert int(values['lit_gpt_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert int(values["lit_gpt_generated_tokens_total"]) >= 5 and values["lit_gpt_answers_most"] == "3"
    cache = served.completions.scheduler.batch.cache
    per_answer = sum(layer.k.nbytes + layer.v.nbytes for layer in cache) // 3
    assert int(values["lit_gpt_cache_bytes"]) == per_answer * (3 + 4)  # with those that are kept
    page = httpx.get(served.url + "/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere


def raw(server, body: dict) -> socket.socket:
    """Send a request, and leave its answer unread."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_free_their_places(served, stream):
    """More of them than there are places, some while they wait: who stays is answered, and at the end all are free."""
    long = ASKED | {"max_tokens": 170, "stream": stream, "n": 2, "stop": ["nowhere"]}
    connections = [raw(served, long) for _ in range(5)]
    scheduler = served.completions.scheduler
    served.wait_for(lambda unfinished: unfinished >= 6)
    for connection in connections:
        connection.close()
    started = time.monotonic()
    assert answer(served)
    served.wait_for(lambda unfinished: not unfinished)
    assert time.monotonic() - started < 30
    assert not scheduler.batch.rows and not len(scheduler.queue) and scheduler.batch.free == 3


def test_a_body_that_is_cut_off(served):
    content = b'{"model": "base", "messages": ['
    connection = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    connection.sendall(head.encode() + content)
    connection.close()
    assert answer(served)


def test_a_queue_that_is_full_refuses_and_says_when_to_ask_again(served):
    long = ASKED | {"max_tokens": 170, "n": 10}
    connections = [raw(served, long) for _ in range(2)]
    served.wait_for(lambda unfinished: unfinished >= 15)
    reply = post(served, json.dumps(ASKED | {"n": 20}).encode())
    assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["type"] == "rate_limit_error"
    for connection in connections:
        connection.close()
    served.wait_for(lambda unfinished: not unfinished)
    assert answer(served)


def test_a_failure_of_the_model_ends_the_answers_on_their_way_and_no_others(served, monkeypatch, capsys):
    scheduler = served.completions.scheduler
    expected, step = answer(served), scheduler.batch.step

    def fail(*_):
        scheduler.batch.step = step
        raise RuntimeError("out of luck")

    scheduler.batch.step = fail
    reply = post(served, json.dumps(ASKED).encode())
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
    assert "luck" not in reply.text and "out of luck" in capsys.readouterr().err
    assert answer(served) == expected


def test_a_key(llama, tmp_path, capsys):
    with running(llama, {}, key="sécret", batch_size=1, context=64) as server:
        name = llama.name
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sécret".encode()}):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", CHAT)):
                reply = httpx.request(method, server.url + path, headers=headers)
                assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/health").status_code == httpx.get(server.url + "/").status_code == 200
        capsys.readouterr()
        body = json.dumps(ASKED | {"model": name}).encode()
        headers = {"Authorization": "Bearer sécret".encode()} | JSON
        assert httpx.post(server.url + CHAT, content=body, headers=headers).status_code == 200
        log = capsys.readouterr().err
        assert name in log and "answered" in log and "the cat" not in log and "sécret" not in log


@pytest.mark.subprocess
def test_sigterm_under_load(llama, tmp_path):
    """What was accepted is answered whole, nothing new is taken, and the exit code is 0."""
    folder = shutil.copytree(llama, tmp_path / "base")
    (path,) = lora_files(folder, LORAS[:1])
    process = spawn(
        "generate/serve.py", checkpoint_dir=folder, loras=f"mine={path}", port=0, precision="fp32", context=256,
        batch_size=2, drain_seconds=60, prompt_style="chatml",
    )  # fmt: skip
    try:
        line = next(line for line in process.stderr if line.startswith("serving base, mine at http://127.0.0.1:"))
        url = line.split()[4].rstrip(";")
        body = ASKED | {"max_tokens": 190, "n": 4, "stream": True}
        with ExitStack() as stack:
            client = stack.enter_context(httpx.Client(timeout=100))
            replies = [
                stack.enter_context(client.stream("POST", url + CHAT, json=body | {"model": model}))
                for model in ("base", "mine") * 3
            ]
            process.terminate()
            with pytest.raises(httpx.ConnectError):
                while True:
                    with suppress(httpx.ReadError, httpx.RemoteProtocolError):  # it waited to be accepted: reset
                        httpx.get(url + "/health")
            assert process.poll() is None
            for reply in replies:
                events = reply.read().decode()
                assert reply.status_code == 200 and events.endswith("data: [DONE]\n\n")
                assert sum(f'"finish_reason": "{why}"' in event for event in events.split("\n\n") for why in ENDS) == 4
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
