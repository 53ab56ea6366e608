"""Ask llama.cpp itself, by the package xllamacpp, what it makes of a GGUF file."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch


class LlamaCpp:
    """A model in llama.cpp, read with one thread; skips the test where the package is not installed."""

    def __init__(self, path: Path, n_ctx: int = 256) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.cpuparams.n_threads = str(path), n_ctx, 1
        params.n_gpu_layers, params.n_parallel, params.warmup = 0, 1, False
        params.cache_type_k = params.cache_type_v = 0  # float32
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: str | list[int], n_tokens: int, logprobs: int | None = None) -> dict[str, Any]:
        """Return the first choice of a greedy completion."""
        asked = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "cache_prompt": False}
        answer = self.server.handle_completions(asked | {"logprobs": logprobs, "n_probs": logprobs or 0})
        return answer["choices"][0]

    def logprobs(self, ids: list[int], vocab: int) -> torch.Tensor | None:
        """Return the logarithms of the next token's probabilities (vocab,); None if the likeliest ends the text."""
        if not (content := (self.complete(ids, 1, vocab)["logprobs"] or {}).get("content")):
            return None
        result = torch.full((vocab,), float("nan"))
        for each in content[0]["top_logprobs"]:
            result[each["id"]] = each["logprob"]
        return result

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS."""
        asked = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        url, kind = f"{self.server.listening_address}/tokenize", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, data=asked, headers=kind)) as answer:
            return json.loads(answer.read())["tokens"]

    def chat(self, messages: list[dict[str, str]], n_tokens: int) -> str:
        """Return the greedy answer to a conversation, rendered by the file's own template."""
        answer = self.server.handle_chat_completions({"messages": messages, "max_tokens": n_tokens, "temperature": 0})
        return answer["choices"][0]["message"]["content"]
