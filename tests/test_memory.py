"""Converting and merging hold a tensor at a time, not the model."""

import json
import subprocess
import sys

import torch
from safetensors.torch import save_file

# Anonymous memory is what the kernel cannot drop; pages mapped from files it can.
MEASURE = """
import runpy, sys, threading, time
import torch, safetensors.torch, lit_gpt.hf_files
def anonymous():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) * 1024
before = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
print('PEAK', peak - before)
"""


def test_converting_holds_a_tensor_at_a_time(tmp_path):
    from conftest import ROOT
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(tmp_path)
    size = 0
    weight_map = {}
    for i, names in enumerate([list(shapes)[0::2], list(shapes)[1::2]]):
        tensors = {name: torch.randn(shapes[name]).bfloat16() for name in names}
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, tmp_path / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(names, f"model-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    argv = [ROOT / "scripts" / "convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path]
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, argv)], capture_output=True, text=True, check=True
    )
    peak = int(process.stdout.split("PEAK")[1])
    assert size > 300e6 and peak < 150e6, (size, peak)  # of which imports take some 60 MB
