"""NEFTune: noise on the embeddings, sized by each sample and in training alone."""

import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from helpers.compare import off
from helpers.steps import random_row
from helpers.tiny_models import model_of
from lit_gpt.model.noise import with_noise


def test_a_single_sample_gets_transformers_noise():
    x = torch.randn(1, 30, 16)
    module = torch.nn.Identity().train()
    module.neftune_noise_alpha = 5.0
    torch.manual_seed(0)
    expected = neftune_post_forward_hook(module, None, x)
    torch.manual_seed(0)
    assert off(with_noise(x, (30,), 5.0), expected) < 1e-6


def test_in_a_packed_row_it_goes_by_the_sample():
    """The paper's L is the sample's; transformers takes the row's, which would make all noise as small as the last."""
    noise = with_noise(torch.zeros(1, 425, 64), (5, 20, 400), 8.0)[0]
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
