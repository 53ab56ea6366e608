"""Memory that converting a sharded checkpoint needs beyond the interpreter and torch.

    python benchmarks/convert_memory.py --gigabytes 2

Makes a random Llama in bf16 shards, converts it in a process of its own, and samples RssAnon every 2 ms: anonymous
memory, which the kernel cannot drop as it can the pages that are mapped from files.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lit_gpt.cli import PositiveFloat, run

gigabytes: PositiveFloat = 2.0  # size of the checkpoint

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_hf_checkpoint.py"
WATCH = """
import runpy, sys, threading, time
import torch, safetensors.torch, lit_gpt.conversion.hf

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak = before = anonymous()

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("PEAK", peak - before)
"""


def make_checkpoint(folder: Path, size: float) -> int:
    """A random Llama of about `size` bytes in four shards; returns its exact size."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=1)
    config.num_hidden_layers = max(1, round((size / 2 - 2 * 4000 * 1024) / (4 * 1024**2 + 3 * 1024 * 2816)))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    weight_map, total = {}, 0
    for i in range(4):
        shard, names = f"model-{i}.safetensors", list(shapes)[i::4]
        tensors = {name: torch.randn(shapes[name]).bfloat16() for name in names}
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = make_checkpoint(Path(folder), gigabytes * 1e9)
        argv = [sys.executable, "-c", WATCH, SCRIPT, "--checkpoint_dir", folder]
        process = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=True)
    print(json.dumps({"checkpoint_bytes": size, "peak_anonymous_bytes": int(process.stdout.split("PEAK")[1])}))


if __name__ == "__main__":
    run(main)
