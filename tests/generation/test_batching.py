"""Batches: each row is what it would be alone, whatever the others are."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.compare import off
from helpers.methods import LORAS, STYLE, lora_files
from helpers.tiny_models import Tiny, tiny_hf_model
from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.errors import UserError
from lit_gpt.generation import engine
from lit_gpt.generation.engine import decode, generate
from lit_gpt.generation.sampling import GREEDY
from lit_gpt.generation.sequence import DecodingRow, Step
from lit_gpt.generation.steps import FastStep
from lit_gpt.methods import finetuned_model, lora
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.text.prompt_style import PromptStyle


def prompts_of(lengths: list[int], vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def together(
    model: GPT, prompts: list[list[int]], new: list[int], places: int, step: Step | None = None
) -> list[list[int]]:
    """The greedy answers of rows in a batch with so many places."""
    rows = [DecodingRow(list(prompt), n, sampling=GREEDY) for prompt, n in zip(prompts, new, strict=True)]
    cache = model.kv_cache(places, max(map(len, prompts)) + max(new))
    for _ in decode(model, rows, cache, step=step):
        pass
    return [row.ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def alone(model: GPT, prompts: list[list[int]], new: list[int]) -> list[list[int]]:
    return [list(generate(model, prompt, n, temperature=0)) for prompt, n in zip(prompts, new, strict=True)]


def test_each_row_is_what_it_would_be_alone(tiny: Tiny):
    """Prompts of 1 to 60 tokens, past windows and original contexts; some end early and others take their places."""
    model = load_model(tiny.folder)
    most = min(60, model.config.block_size - 12)
    lengths = [1, 14, most, 3, 30, most // 2]
    prompts, new = prompts_of(lengths, model.config.vocab_size), [12, 3, 7, 12, 1, 9]
    expected = alone(model, prompts, new)
    assert together(model, prompts, new, places=4) == expected
    assert together(model, prompts, new, places=4, step=FastStep(model)) == expected


@pytest.mark.parametrize(("family", "layout"), [("llama", "mistral"), ("gemma", "gemma2"), ("phi3", "longrope")])
def test_long_prompts(family, layout, tmp_path, monkeypatch):
    """Of 1 to 500 tokens, in a batch and alone, read in pieces and at once, with a cache and without: the same."""
    tiny_hf_model(family, layout, max_position_embeddings=640).save_pretrained(tmp_path)
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    model, lengths = load_model(tmp_path), [500, 1, 211, 25, 64, 129, 430, 7]
    prompts, new = prompts_of(lengths, model.config.vocab_size), [12] * len(lengths)
    expected, step = [uncached(model, prompt, 12) for prompt in prompts], FastStep(model)
    assert together(model, prompts, new, places=5, step=step) == together(model, prompts, new, 1, step) == expected
    assert alone(model, prompts, new) == together(model, prompts, new, places=3) == expected
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 64)
    assert alone(model, prompts, new) == together(model, prompts, new, places=8) == expected


@torch.no_grad()
def uncached(model: GPT, ids: list[int], new: int) -> list[int]:
    for _ in range(new):
        ids = [*ids, int(model(torch.tensor([ids]), last=True)[0, -1].argmax())]
    return ids[-new:]


@torch.no_grad()
def test_logits_of_a_prompt_in_pieces(tiny: Tiny):
    """Those of the whole, beyond windows and original contexts, with no piece longer than asked."""
    model = load_model(tiny.folder)
    (ids,) = prompts_of([61], model.config.vocab_size)
    whole, cache = model(torch.tensor([ids]), last=True), model.kv_cache(1, 61)
    for start in range(0, 48, 16):
        model.hidden(torch.tensor([ids[start : start + 16]]), cache=cache, length=61)
    assert off(model(torch.tensor([ids[48:]]), cache=cache, last=True), whole) < 1e-5


def mixed_equals_single(folder: Path, paths: list[Path]) -> None:
    """8 prompts under 4 LoRAs and without one in a batch, against each file's own model."""
    loras = LoRAPool.beside(BaseCheckpoint.open(folder), paths, PromptStyle.from_dict(STYLE))
    prompts = prompts_of([3, 9, 1, 14, 20, 5, 12, 2], loras.model.config.vocab_size)
    numbers = [1, 2, 3, 4, 4, 0, 2, 1]
    singles = [loras.base.build(), *(finetuned_model.load_finetuned(folder, path, lora.NAME)[0] for path in paths)]
    expected = [list(generate(singles[n], p, 10, temperature=0)) for n, p in zip(numbers, prompts, strict=True)]
    options = {"choose": lambda rows: loras.choose([row.lora for row in rows])}
    for step in (None, FastStep(loras.model)):
        rows = [
            DecodingRow(list(prompt), 10, lora=number, sampling=GREEDY)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
        for _ in decode(loras.model, rows, loras.model.kv_cache(5, 30), step=step, **options):
            pass
        assert [row.ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)] == expected
        for number in (0, 3, 1):  # switched
            loras.choose([number])
            theirs = list(generate(singles[number], prompts[0], 10, temperature=0))
            assert list(generate(loras.model, prompts[0], 10, temperature=0, step=step)) == theirs
    assert len({tuple(generate(model, prompts[0], 10, temperature=0)) for model in singles}) > 2  # they do something


def test_a_lora_for_each_row(tiny: Tiny):
    mixed_equals_single(tiny.folder, lora_files(tiny.folder, LORAS))


def test_a_lora_for_each_row_of_a_quantized_base(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "base")
    mixed_equals_single(folder, lora_files(folder, LORAS, "nf4"))


def test_a_lora_that_does_not_fit(llama, tmp_path):
    folder, style = shutil.copytree(llama, tmp_path / "base"), PromptStyle.from_dict(STYLE)
    nf4, plain = lora_files(folder, LORAS[:1], "nf4")[0].rename(tmp_path / "nf4.pth"), lora_files(folder, LORAS[:1])[0]
    loras = LoRAPool.beside(BaseCheckpoint.open(folder), [plain], style)
    assert loras.load(plain) == loras.load(folder / ".." / folder.name / plain.name) == 1
    with pytest.raises(UserError, match="nf4.pth: trained on a base in nf4; start with --quantize nf4"):
        loras.load(nf4)
    record = torch.load(plain)
    for name, change, message in (
        ("other.pth", {"base": "0123"}, "other.pth: trained on another base .fingerprint 0123."),
        ("adapter.pth", {"method": "adapter"}, "adapter.pth: trained by the method adapter, expected lora"),
        ("rank.pth", {"hyperparameters": record["hyperparameters"] | {"r": 3}}, "rank.pth: does not fit the model"),
    ):
        torch.save(record | change, tmp_path / name)
        with pytest.raises(UserError, match=message):
            loras.load(tmp_path / name)
    assert len(loras.loaded) == 1  # nothing of them has stayed
    with pytest.raises(UserError, match="another base"):
        LoRAPool.beside(BaseCheckpoint.open(folder), [plain, tmp_path / "other.pth"], style)
