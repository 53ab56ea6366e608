"""A contestant of benchmarks/generate_speed.py: llama.cpp, as xllamacpp or llama-cpp-python brings it; needs nothing
but one of these. xllamacpp is compiled for many processors, llama-cpp-python for this one, if it is built from source.

It is talked to as the others are, see protocol.py; the times are those that llama.cpp tells of itself.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
Answer = Callable[[], tuple[float, float]]  # seconds of reading the prompt, new tokens per second

path, prompt, new = job["gguf"][job["contestant"]], job["prompts"][0], job["new_tokens"]


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def by_xllamacpp() -> Answer:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = path, 1, len(prompt) + new + 16
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    server = xllamacpp.Server(params)

    def answer() -> tuple[float, float]:
        asked = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        times = server.handle_completions(asked)["timings"]
        return times["prompt_ms"] / 1000, times["predicted_per_second"]

    return answer


def by_llama_cpp() -> Answer:
    threads, places = job["threads"], len(prompt) + new + 16
    model = llama_cpp.Llama(path, n_ctx=places, n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer() -> tuple[float, float]:
        model.reset()
        llama_cpp.llama_perf_context_reset(model.ctx)
        tokens = model.generate(prompt, temp=0, reset=False)
        for _ in range(new):
            next(tokens)
        times = llama_cpp.llama_perf_context(model.ctx)
        return times.t_p_eval_ms / 1000, times.n_eval / times.t_eval_ms * 1000

    return answer


try:
    import xllamacpp

    answer = by_xllamacpp()
except ImportError:
    import llama_cpp

    answer = by_llama_cpp()
about = {"model_bytes": status_bytes("VmRSS"), "weight_bytes": Path(path).stat().st_size, "threads": job["threads"]}
print(json.dumps({"ready": True, **about}), file=answers)
for _ in sys.stdin:
    first, rate = answer()
    figures = {"first_seconds": first, "tokens_per_second": rate, "ids": [], "peak_bytes": status_bytes("VmHWM")}
    print(json.dumps(figures), file=answers)
