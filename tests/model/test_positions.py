"""Learned positions and ALiBi."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from helpers.compare import off
from helpers.tiny_models import tiny_hf_model
from lit_gpt import GPT, Config
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.model.alibi import alibi_slopes, with_alibi
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.model.sdpa import attend


def test_files_saved_from_a_model_without_its_head(tmp_path):
    """GPT-2's on the hub are such: names without "transformer.", and the causal masks beside the weights."""
    model = tiny_hf_model("gpt2", "gpt2")
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    expected = (tmp_path / "lit_model.pth").read_bytes()
    bare = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    save_file(bare | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    assert (tmp_path / "lit_model.pth").read_bytes() == expected
    save_file(bare | {"h.0.attn.rotary.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="transformer.h.0.attn.rotary.weight"):
        hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))


@torch.no_grad()
def test_more_tokens_than_learned_positions_are_refused():
    config = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=9, block_size=6, learned_positions=True)
    model = GPT(Config("tiny", "gpt2", **config))
    idx = torch.zeros(1, 12, dtype=torch.long)
    model(idx, segments=Segments.of([6, 5, 1]))
    cache = model.kv_cache(1, 8)
    model(idx[:, :4], cache=cache)
    for arguments in (
        {"idx": idx[:, :7]},
        {"idx": idx, "segments": Segments.of([5, 7])},
        {"idx": idx[:, :3], "cache": cache},
    ):
        with pytest.raises(UserError, match="7 tokens exceed the model's 6 learned positions"):
            model(**arguments)


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 71])
def test_slopes_of_alibi(heads):
    expected = build_mpt_alibi_tensor(heads, 3)[:, 0]
    assert torch.allclose(alibi_slopes(heads)[:, None] * torch.tensor([-2, -1, 0]), expected, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.003)])
def test_alibi_far_from_the_beginning(dtype, tolerance):
    """The bias keeps its precision in narrow types, at positions that bfloat16 lacks, against a mask in float64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 12, 1500, 16).to(dtype)
    wide = with_alibi(q, k, v, 0.25, torch.arange(1500))
    actual = attend(*wide, ScoreParams(0.25))[..., -200:, :16]
    distance = torch.arange(1300, 1500)[:, None] - torch.arange(1500)
    bias = -alibi_slopes(12).double()[:, None, None] * distance
    bias = bias.masked_fill(distance < 0, -torch.inf)
    expected = F.scaled_dot_product_attention(q[:, :, -200:].double(), k.double(), v.double(), bias, scale=0.25)
    assert off(actual.double(), expected) < tolerance


@pytest.mark.parametrize(
    ("field", "value"),
    [("no_bias", False), ("logit_scale", 0.5), ("alibi", False), ("alibi_bias_max", 16), ("clip_qkv", 6),
     ("qk_ln", True), ("softmax_scale", 0.1), ("attn_type", "multiquery_attention"), ("prefix_lm", True)],
)  # fmt: skip
def test_what_mpt_may_have_and_the_model_lacks(field, value):
    fields = {"model_type": "mpt", "d_model": 8, "n_heads": 2, "n_layers": 1, "vocab_size": 9}
    assert config_from_hf(fields | {"attn_config": {"alibi": True, "clip_qkv": None}}).alibi
    part = {field: value} if field in ("no_bias", "logit_scale") else {"attn_config": {field: value}}
    with pytest.raises(UserError, match=f"'{field}': {json.dumps(value)} is not supported; expected"):
        config_from_hf(fields | part)


@pytest.mark.parametrize("field", ["scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_what_gpt2_may_have_and_the_model_lacks(field):
    fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9, "n_positions": 4}
    with pytest.raises(UserError, match=f"'{field}'"):
        config_from_hf(fields | {field: field != "scale_attn_weights"})
