"""A contestant of benchmarks/generate_speed.py: llama.cpp, as xllamacpp brings it; needs nothing but that.

It is talked to as the others are, see protocol.py; the times are those that llama.cpp tells of itself.
"""

import json
import os
import sys
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import xllamacpp  # noqa: E402

path, prompts, new = job["gguf"][job["contestant"]], job["prompts"], job["new_tokens"]


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = path, 1, len(prompts[0]) + new + 16
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
server = xllamacpp.Server(params)
about = {"model_bytes": status_bytes("VmRSS"), "weight_bytes": Path(path).stat().st_size, "threads": job["threads"]}
print(json.dumps({"ready": True, **about}), file=answers)
for _ in sys.stdin:
    asked = {"prompt": prompts[0], "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    times = server.handle_completions(asked)["timings"]
    figures = {
        "first_seconds": times["prompt_ms"] / 1000,
        "tokens_per_second": times["predicted_per_second"], "ids": [], "peak_bytes": status_bytes("VmHWM"),
    }  # fmt: skip
    print(json.dumps(figures), file=answers)
