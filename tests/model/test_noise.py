"""What is random in training goes by sample and position; NEFTune's noise is sized by each sample."""

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from helpers.compare import off
from helpers.steps import random_row, random_samples, step
from helpers.tiny_models import model_of
from lit_gpt.data.packing import pack
from lit_gpt.kernels.dropout import draw
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods import adapter, lora
from lit_gpt.methods.hyperparameters import AdapterConfig
from lit_gpt.model import loss
from lit_gpt.model.noise import with_noise
from lit_gpt.training.memory.activation_checkpointing import apply_activation_checkpointing


def keys(n: int) -> torch.Tensor:
    return draw(torch.tensor(0), torch.arange(n))


def test_a_single_sample_gets_noise_like_transformers():
    """The same at the edges of its range and in its spread."""
    x = torch.randn(1, 300, 160)
    module = torch.nn.Identity().train()
    module.neftune_noise_alpha = 5.0
    theirs = neftune_post_forward_hook(module, None, x) - x
    ours = with_noise(x, (300,), 5.0, keys(300)) - x
    for of in (torch.amin, torch.amax, torch.std):
        assert off(of(ours, ()), of(theirs, ())) < 0.02
    assert abs(ours.mean()) < 5 * ours.std() / ours.numel() ** 0.5


def test_in_a_packed_row_it_goes_by_the_sample():
    """The paper's L is the sample's; transformers takes the row's, which would make all noise as small as the last."""
    noise = with_noise(torch.zeros(1, 425, 64), (5, 20, 400), 8.0, keys(425))[0]
    for sample, length in zip(noise.split((5, 20, 400)), (5, 20, 400), strict=True):
        bound = 8.0 / (length * 64) ** 0.5
        assert 0.95 * bound < sample.abs().max() <= bound and abs(sample.mean()) < 0.2 * bound


def test_a_model_has_it_in_training_alone(tmp_path):
    model, row = model_of("gpt2", "gpt2", tmp_path), random_row()
    plain = model.train()(row.idx, segments=row.segments, targets=row.targets)
    model.noise_alpha = 5.0
    torch.manual_seed(0)
    noisy = model(row.idx, segments=row.segments, targets=row.targets)
    torch.manual_seed(0)
    assert torch.equal(model(row.idx, segments=row.segments, targets=row.targets), noisy)
    assert not torch.equal(noisy, plain)
    assert torch.equal(model.eval()(row.idx, segments=row.segments, targets=row.targets), plain)


ALL = lora.LoRAConfig(r=8, dropout=0.4, key=True, projection=True, mlp=True, head=True)


@pytest.mark.parametrize("cpp", [True, False])
@pytest.mark.parametrize("layout", [("llama", "llama"), ("mixtral", "mixtral"), ("falcon", "7b")])
def test_any_cut_into_rows_drops_the_same(tmp_path, monkeypatch, layout, cpp):
    """In attention, MLP, experts and head, and with noise on the embeddings; whatever the neighbors and their order."""
    model, samples = lora.attach(model_of(*layout, tmp_path), ALL), random_samples()
    for name, weight in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(weight, std=0.1)
    model.noise_alpha = 2.0
    monkeypatch.setattr(loss, "MAX_LOGITS", 1000)  # the head sees a few tokens at a time
    with use_policy(cpp=cpp, fused=True):
        whole = step(model, pack(samples))
        for cut in ([[0], [1], [2]], [[2, 0], [1]]):
            parts = [step(model, pack(samples[i] for i in row)) for row in cut]
            for one, *pieces in zip(whole, *parts, strict=True):
                assert off(sum(pieces), one) < 1e-5
        other_seed = step(model, pack(samples), seed=1)
        assert all(off(a, b) > 1e-3 for a, b in zip(whole, other_seed, strict=True) if a.any())


@pytest.mark.parametrize("kind", ["none", "full"])
def test_blocks_that_run_again_drop_the_same(tmp_path, kind):
    """Beside an adapter's prompt, too, whose rows are no tokens."""
    model = lora.attach(adapter.attach(model_of("llama", "llama", tmp_path), AdapterConfig(start_layer=0)), ALL)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    plain = step(model, random_row())
    apply_activation_checkpointing(model, kind)
    assert all(off(a, b) < 1e-6 for a, b in zip(step(model, random_row()), plain, strict=True))
