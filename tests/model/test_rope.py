"""LongRoPE: other angles once a sequence is longer than the original context (32 here), in all uses of the model."""

import pytest
import torch

from helpers.compare import TOLERANCE, off, tokens
from helpers.tiny_models import Tiny, tiny_hf_model
from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.generation.engine import generate
from lit_gpt.model.kv_cache import truncate
from lit_gpt.model.packed_inputs import Segments


@pytest.fixture(scope="module")
def longrope(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("c") / "longrope"
    model = tiny_hf_model("phi3", "longrope")
    model.save_pretrained(folder)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return Tiny(folder, model)


@torch.no_grad()
def test_on_both_sides_of_the_original_context(longrope: Tiny):
    model, idx = load_model(longrope.folder), tokens(longrope.hf)
    for n in (32, 33):
        assert off(model(idx[:, :n]), longrope.hf(idx[:, :n]).logits) < TOLERANCE
    assert off(model(idx[:, :33])[:, :32], model(idx[:, :32])) > 1e-2


@torch.no_grad()
def test_each_packed_sample_goes_by_its_own_length(longrope: Tiny):
    """transformers takes the longest of a batch for all samples, so each is compared alone."""
    model, idx = load_model(longrope.folder), tokens(longrope.hf, rows=1, length=93)
    lengths = [20, 40, 33]
    alone = [longrope.hf(part).logits for part in idx.split(lengths, dim=1)]
    assert off(model(idx, segments=Segments.of(lengths)), torch.cat(alone, dim=1)) < TOLERANCE


def test_an_answer_that_grows_beyond_it(longrope: Tiny):
    """transformers reads the whole sequence again then, and so does the loop."""
    model, prompt = load_model(longrope.folder), tokens(longrope.hf, rows=1, length=25)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    expected = longrope.hf.generate(prompt, max_new_tokens=20, **options)
    cache = model.kv_cache(1, 64)
    assert list(generate(model, prompt[0].tolist(), 20, temperature=0, cache=cache)) == expected[0, 25:].tolist()
    # and back, with what is kept of a longer conversation
    truncate(cache, 20)
    shorter = list(generate(model, prompt[0].tolist(), 5, temperature=0, cache=cache))
    assert shorter == expected[0, 25:30].tolist()


@torch.no_grad()
def test_keys_of_other_angles_are_refused(longrope: Tiny):
    model, idx = load_model(longrope.folder), tokens(longrope.hf)
    cache = model.kv_cache(2, 40)
    model(idx[:, :32], cache=cache)
    with pytest.raises(ValueError, match="forget the cache"):
        model(idx[:, 32:33], cache=cache)
    truncate(cache, 0)
    assert off(model(idx[:, :33], cache=cache), longrope.hf(idx[:, :33]).logits) < TOLERANCE


def test_older_names_and_wrong_counts():
    fields = dict(model_type="phi3", num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=8,
                  vocab_size=9, max_position_embeddings=128, original_max_position_embeddings=32)  # fmt: skip
    scaling = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = config_from_hf(fields | {"rope_scaling": scaling})
    assert config.rope_scaling["rope_type"] == "longrope" and GPT(config).rope.original == 32
    with pytest.raises(UserError, match="hold 4 and 3 numbers, expected 4"):
        GPT(config_from_hf(fields | {"rope_scaling": scaling | {"long_factor": [2.0] * 3}}))
