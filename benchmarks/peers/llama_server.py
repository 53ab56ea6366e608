"""llama.cpp's server, as xllamacpp brings it: run by an interpreter that has xllamacpp.

python llama_server.py MODEL.gguf ROWS CONTEXT THREADS
"""

import signal
import sys
import threading

import xllamacpp

path, rows, context, threads = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_parallel, params.n_ctx = rows, rows * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.endpoint_metrics = False
server = xllamacpp.Server(params)
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
print(f"serving {path} at {server.listening_address};", flush=True)
ended.wait()
