"""Memory that a model's weights take, in bf16 and quantized, and what loading takes beside them.

    python benchmarks/quantize_memory.py --quantize nf4

Makes a random Llama of a billion parameters in bf16 and loads it in processes of their own: as it is, then quantized on
the fly. `resident` is what the process holds of it then, `peak` the most while it loaded, both with the pages of the
mapped file that are in memory; `weights` is the size of the tensors.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lit_gpt.cli import PositiveInt, Quantizer, run

n_layer: PositiveInt = 22  # blocks, at these defaults a TinyLlama's
n_embd: PositiveInt = 2048  # width, a multiple of 64
vocabulary: PositiveInt = 32000  # tokens
quantize: Quantizer = "nf4"  # format

WATCH = """
import json, sys
import torch
from lit_gpt import GPT, Config
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.hardware import reset_peak, status_field
from lit_gpt.quantization.formats import encode

folder, quantize = sys.argv[1:]
with torch.device("meta"):  # the libraries' own room
    GPT(Config.from_checkpoint(folder))
encode(torch.randn(64, 64), "nf4", torch.bfloat16)
before = reset_peak(torch.nn.Module())
base = BaseCheckpoint.open(folder, None if quantize == "bf16" else quantize)
model = base.build(torch.bfloat16)
peak = status_field("VmHWM")
del base
resident = reset_peak(model)
print(json.dumps({"weights": sum(p.nbytes for p in model.parameters()), "resident": resident - before,
                  "peak": max(peak, resident) - before}))
"""


def make_checkpoint(folder: Path) -> int:
    """A random converted checkpoint; returns the bytes of a block."""
    import torch

    from lit_gpt import GPT, Config
    from lit_gpt.checkpoints import io

    config = Config(
        name="random", family="llama", n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64, n_query_groups=4,
        head_size=64, vocab_size=vocabulary, block_size=2048, intermediate_size=n_embd * 11 // 4 // 64 * 64,
        norm_class="RMSNorm", mlp_class="SwiGLU", activation="silu",
    )  # fmt: skip
    with torch.device("meta"):
        layout = GPT(config).bfloat16().state_dict()
    random = ((name, torch.randn(tensor.shape, dtype=torch.bfloat16)) for name, tensor in layout.items())
    io.write_streamed(folder / "lit_model.pth", layout, random)
    (folder / "lit_config.json").write_text(config.to_json())
    (folder / "config.json").write_text("{}")
    return sum(tensor.nbytes for name, tensor in layout.items() if name.startswith("h.0."))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {"block": make_checkpoint(Path(folder))}
        for kind in ("bf16", quantize):
            argv = [sys.executable, "-c", WATCH, folder, kind]
            process = subprocess.run(argv, capture_output=True, text=True, check=True)
            found[kind] = json.loads(process.stdout)
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)
