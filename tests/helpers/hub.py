"""A Hugging Face hub of one repository on the loopback, which can be told to misbehave.

    with Hub({"config.json": b"{}", "model.safetensors": bytes(10)}) as hub:
        hub.faults["model.safetensors"] = "cut", 4  # the connection ends after 4 bytes, once
        subprocess.run([...], env={"HF_ENDPOINT": hub.url, ...})
        hub.served["model.safetensors"]  # bytes of it that went out

As on the hub, large files are answered with a redirect to another host (`localhost` instead of `127.0.0.1`).
"""

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".gguf", ".model", ".onnx", ".h5", ".msgpack")
BLOCK = 1 << 14


class Hub:
    def __init__(self, files: dict[str, bytes], repo_id: str = "owner/tiny") -> None:
        self.repo_id = repo_id
        self.revisions = {"main": files}
        self.token: str | None = None  # the one token that opens the repository; None: it is public
        self.refuse: tuple[int, str, str] | None = None  # status, X-Error-Code, X-Error-Message to every request
        self.refuse_files: tuple[int, str, str] | None = None  # the same, listing allowed: as gated repositories do
        # once, after so many bytes of the file: "cut" closes, "reset" resets, "hold" waits until the client is gone
        self.faults: dict[str, tuple[str, int]] = {}
        self.short: dict[str, int] = {}  # serve only so many bytes, as if they were all
        self.corrupt: set[str] = set()  # serve it with one bit turned
        self.listed_size: dict[str, int] = {}  # what the listing says instead of the truth
        self.busy = 0  # answer 503 to so many requests for files
        self.ranges = True  # whether a Range is honoured
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.served: Counter[str] = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def file_requests(self) -> int:
        """How many times bytes of a file were asked for."""
        return sum(method == "GET" and not path.startswith("/api/") for method, path, _ in self.requests)

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's own name stands for."""
        for name, files in self.revisions.items():
            commit = hashlib.sha1(json.dumps({k: sha256(v) for k, v in files.items()}).encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def files(self, commit: str) -> dict[str, bytes]:
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)

    def info(self, commit: str) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": entry["path"],
                "size": entry["size"],
                "blobId": entry["oid"],
                **({"lfs": entry["lfs"] | {"sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}),
            }
            for entry in self.tree(commit)
        ]
        return {"id": self.repo_id, "modelId": self.repo_id, "sha": commit, "siblings": siblings}

    def tree(self, commit: str) -> list[dict[str, Any]]:
        entries = []
        for name, content in self.files(commit).items():
            size = self.listed_size.get(name, len(content))
            entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": git_hash(content)}
            if is_lfs(name):
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {size}\n"
                entry["oid"] = git_hash(pointer.encode())
                entry["lfs"] = {"oid": sha256(content), "size": size, "pointerSize": len(pointer)}
            entries.append(entry)
        return entries


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms a request

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, self.path, self.headers["Authorization"]))
        if path.startswith("/cdn/"):  # a signed address: no authorization is looked at
            _, _, commit, name = path.split("/", 3)
            return self.content(name, commit)
        if hub.refuse:
            return self.error(*hub.refuse)
        if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.error(401, "RepoNotFound", "Repository not found")
        repo = re.escape(hub.repo_id)
        if not re.match(rf"(/api/models)?/{repo}(/|$)", path):
            return self.error(401, "RepoNotFound", "Repository not found")
        found = re.fullmatch(rf"/api/models/{repo}(?:/(revision|tree)/(.+))?|/{repo}/(resolve)/([^/]+)/(.+)", path)
        if not found:
            return self.error(404, "EntryNotFound", "Entry not found")
        kind, revision = found[1] or found[3] or "revision", found[2] or found[4] or "main"
        commit = hub.commit(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "resolve":
            return self.resolve(commit, found[5])
        return self.json(hub.info(commit) if kind == "revision" else hub.tree(commit))

    def resolve(self, commit: str, name: str) -> None:
        hub = self.hub
        if hub.refuse_files:
            return self.error(*hub.refuse_files)
        if name not in hub.files(commit):
            return self.error(404, "EntryNotFound", "Entry not found")
        if not is_lfs(name):
            return self.content(name, commit)
        content = hub.files(commit)[name]
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{hub.server.server_port}/cdn/{commit}/{name}?signature=x")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-ETag", f'"{sha256(content)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def content(self, name: str, commit: str) -> None:
        hub = self.hub
        content = hub.files(commit)[name]
        etag = sha256(content) if is_lfs(name) else git_hash(content)
        if name in hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        content = content[: hub.short.get(name)]
        if self.command == "GET" and hub.busy:
            hub.busy -= 1
            return self.error(503, "", "busy")
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "") if hub.ranges else None
        start = int(wanted[1]) if wanted else 0
        if wanted and start >= len(content):
            return self.error(416, "", "Range not satisfiable")
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self.body(name, content[start:])

    def body(self, name: str, content: bytes) -> None:
        hub = self.hub
        fault, stop = hub.faults.pop(name, ("", len(content)))
        self.close_connection = bool(fault)
        try:
            for at in range(0, min(stop, len(content)), BLOCK):
                block = content[at : min(at + BLOCK, stop)]
                self.wfile.write(block)
                hub.served[name] += len(block)
            if fault == "hold":
                self.connection.recv(1)
        except ConnectionError:
            self.close_connection = True
        if fault == "reset":  # closed with lingering off, nothing is said but RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def json(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def is_lfs(name: str) -> bool:
    return name.endswith(LFS)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
