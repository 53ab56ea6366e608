"""Several LoRA files made into one: sums are exact, the others follow their papers."""

import shutil

import pytest
import torch

from helpers.compare import off
from helpers.methods import LORAS, lora_files
from helpers.tiny_models import make_base
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.methods import finetuned_file, lora
from lit_gpt.methods.finetuned_model import load_finetuned
from lit_gpt.methods.lora.combining import dare, ties

SCRIPT, FILE = "scripts/combine_loras.py", "lit_model_lora_finetuned.pth"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(base):
    return lora_files(base, LORAS[:3])


def updates(base, path) -> dict[str, torch.Tensor]:
    """Return the whole update of each layer that a file adapts."""
    opened = BaseCheckpoint.open(base)
    record = finetuned_file.read_file(path, "lora", opened.fingerprint)
    config = lora.LoRAConfig(**record["hyperparameters"])
    return {name: B @ A for name, A, B in lora.updates(lora.skeleton(opened.config, config), record["state"], path)}


def combined(cli, base, files, out_dir, **flags) -> dict[str, torch.Tensor]:
    given = [part for pair in files for part in [f"{pair[0]}={pair[1]}"]]
    result = cli(SCRIPT, "--loras", *given, checkpoint_dir=base, out_dir=out_dir, **flags)
    assert result.code == 0, result.err
    return updates(base, out_dir / FILE)


@torch.no_grad()
def test_a_sum_is_exact(cli, base, files, tmp_path):
    """Of different ranks, scales and projections, one taken away."""
    weights = [0.7, 0.5, -1.0]
    found = combined(cli, base, list(zip(files, weights, strict=True)), tmp_path / "out")
    parts = [updates(base, path) for path in files]
    assert found.keys() == set().union(*parts)
    for name, update in found.items():
        assert off(update, sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part)) < 1e-5
    assert io.load(tmp_path / "out" / FILE)["hyperparameters"]["r"] == 2 + 4 + 3
    model, _ = load_finetuned(base, tmp_path / "out" / FILE, "lora")
    assert off(model(torch.arange(9).unsqueeze(0)), load_model(base)(torch.arange(9).unsqueeze(0))) > 1e-3


def test_fewer_ranks_are_the_best_approximation(cli, base, files, tmp_path):
    pairs = [(files[0], 1.0), (files[1], 1.0)]
    exact, less = combined(cli, base, pairs, tmp_path / "a"), combined(cli, base, pairs, tmp_path / "b", lora_r=3)
    name, rows = "h.0.attn.proj", slice(None)
    tail = torch.linalg.svdvals(exact[name][rows])[3:].norm()
    assert (exact[name] - less[name]).norm().item() == pytest.approx(tail.item(), rel=1e-3)
    assert torch.linalg.matrix_rank(less[name], rtol=1e-4) == 3


def test_ties_and_dare_follow_their_papers(cli, base, files, tmp_path):
    one, two = torch.tensor([3.0, -1.0, 0.5, 2.0]), torch.tensor([-1.0, -2.0, 0.1, 1.0])
    # the halves kept: [3, 0, 0, 2] and [-1, -2, 0, 1] of ties in size; the signs of the sums: +, -, none, +
    assert torch.equal(ties(torch.stack((one, two)), 0.5), torch.tensor([3.0, -2.0, 0.0, 1.5]))
    many = torch.ones(1, 100, 100)
    kept = dare(many, 0.25, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 4.0} and kept.mean().item() == pytest.approx(1, abs=0.05)
    for how in ("ties", "dare"):
        found = combined(cli, base, [(files[0], 1), (files[1], 1)], tmp_path / how, how=how, density=0.5)
        assert io.load(tmp_path / how / FILE)["hyperparameters"]["r"] == 4
        assert all(update.isfinite().all() and update.any() for update in found.values())


@pytest.mark.parametrize(
    ("loras", "change", "words", "code"),
    [
        (["{0}"], {}, ["--loras", "two files or more"], 2),
        (["{0}", "{0}=2"], {}, ["--loras", "comes twice"], 2),
        (["{0}", "{1}=x"], {}, ["--loras", "FILE=WEIGHT"], 2),
        (["{0}", "{1}"], {"density": 2, "how": "dare"}, ["--density 2"], 2),
        (["{0}", "{1}"], {"density": 0.5}, ["--density 0.5 with --how sum"], 2),
        (["{0}", "{1}"], {"lora_r": 65}, ["--lora_r 65", "no adapted layer has a rank above 64"], 2),
        (["{0}", "/nowhere.pth"], {}, ["/nowhere.pth"], 1),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(cli, base, files, tmp_path, loras, change, words, code):
    given = [text.format(*files) for text in loras]
    result = cli(SCRIPT, "--loras", *given, checkpoint_dir=base, out_dir=tmp_path / "out", **change)
    result.refused(*words, code=code)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_added_is_refused(cli, base, tmp_path):
    """DoRA is no sum, and what was trained on other codes of the base does not go with them."""
    own = shutil.copytree(base, tmp_path / "base")
    flags = {"checkpoint_dir": own, "out_dir": tmp_path / "out"}
    first, second = lora_files(own, [lora.LoRAConfig(update="dora"), lora.LoRAConfig()])
    cli(SCRIPT, "--loras", first, second, **flags).refused(str(first), "lora_update dora")
    lora_files(own, [lora.LoRAConfig()], quantize="nf4")  # in place of the first
    cli(SCRIPT, "--loras", second, first, **flags).refused(str(first), "another quantization")
