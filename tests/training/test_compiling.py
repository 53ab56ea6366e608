"""Compiled blocks: results and gradients of the plain ones, for rows of any length without compiling again."""

import pytest
import torch
from torch._dynamo.utils import counters

from helpers.compare import off
from helpers.steps import random_row, step
from helpers.tiny_models import tiny_hf_model
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods import adapter_v2, lora
from lit_gpt.methods.adapter import AdapterConfig
from lit_gpt.training.memory import compiling

ALL = lora.LoRAConfig(r=4, dropout=0.1, key=True, projection=True, mlp=True)
METHODS = {
    "lora": lambda gpt: lora.attach(gpt, ALL),
    "adapter_v2": lambda gpt: adapter_v2.attach(gpt, AdapterConfig(start_layer=1)),
    "full": lambda gpt: gpt.requires_grad_(),
}
LAYOUTS = {
    "llama-llama3": pytest.param(("llama", "llama3"), marks=pytest.mark.slow),
    "falcon-7b": ("falcon", "7b"),
    "gemma-gemma2": pytest.param(("gemma", "gemma2"), marks=pytest.mark.slow),
}
ROWS = [(9, 31, 5), (40,), (7, 8, 9, 10, 11), (64, 3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_compiled_blocks_are_the_plain_ones(layout, method, tmp_path):
    tiny_hf_model(*layout).save_pretrained(tmp_path)
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    torch.manual_seed(0)
    gpt = METHODS[method](load_model(tmp_path))
    for name, parameter in gpt.named_parameters():
        if name.endswith(("lora_B", "gate", "shift")):
            torch.nn.init.normal_(parameter, std=0.1)
    torch.compiler.reset()
    counters.clear()
    with use_policy(cpp=False, simulate_cuda=True):
        expected = [step(gpt, random_row(lengths)) for lengths in ROWS]
        compiling.compile_blocks(gpt, backend="aot_eager")
        step(gpt, random_row(ROWS[0]))
        graphs = counters["stats"]["unique_graphs"]
        for lengths, gradients in zip(ROWS, expected, strict=True):
            for found, plain in zip(step(gpt, random_row(lengths)), gradients, strict=True):
                assert off(found, plain) < 1e-5
    assert counters["stats"]["unique_graphs"] == graphs <= 6 and not counters["graph_break"]
    torch.compiler.reset()
