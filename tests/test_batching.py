"""Batches: each row is what it would be alone, whatever the others are."""

import pytest
import torch
from conftest import Tiny, tiny_hf_model
from test_families import off

from lit_gpt import GPT, generation, hf_files
from lit_gpt.generation import Row, decode, generate


def prompts_of(lengths: list[int], vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def together(model: GPT, prompts: list[list[int]], new: list[int], places: int) -> list[list[int]]:
    """The greedy answers of rows in a batch with so many places."""
    rows = [Row(list(prompt), n) for prompt, n in zip(prompts, new, strict=True)]
    cache = model.kv_cache(places, max(map(len, prompts)) + max(new))
    for _ in decode(model, rows, cache, 0, None, 1.0):
        pass
    return [row.ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def alone(model: GPT, prompts: list[list[int]], new: list[int]) -> list[list[int]]:
    return [list(generate(model, prompt, n, temperature=0)) for prompt, n in zip(prompts, new, strict=True)]


def test_each_row_is_what_it_would_be_alone(tiny: Tiny):
    """Prompts of 1 to 60 tokens, past windows and original contexts; some end early and others take their places."""
    model = GPT.from_checkpoint(tiny.folder)
    most = min(60, model.config.block_size - 12)
    lengths = [1, 14, most, 3, 30, most // 2]
    prompts, new = prompts_of(lengths, model.config.vocab_size), [12, 3, 7, 12, 1, 9]
    assert together(model, prompts, new, places=4) == alone(model, prompts, new)


@pytest.mark.parametrize(("family", "layout"), [("llama", "mistral"), ("gemma", "gemma2"), ("phi3", "longrope")])
def test_long_prompts(family, layout, tmp_path, monkeypatch):
    """Of 1 to 500 tokens, in a batch and alone, read in pieces and at once, with a cache and without: the same."""
    tiny_hf_model(family, layout, max_position_embeddings=640).save_pretrained(tmp_path)
    hf_files.convert(tmp_path, hf_files.StoredWeights(tmp_path))
    model, lengths = GPT.from_checkpoint(tmp_path), [500, 1, 211, 25, 64, 129, 430, 7]
    prompts, new = prompts_of(lengths, model.config.vocab_size), [12] * len(lengths)
    expected = [uncached(model, prompt, 12) for prompt in prompts]
    assert alone(model, prompts, new) == together(model, prompts, new, places=3) == expected
    monkeypatch.setattr(generation, "PIECE", 64)
    assert alone(model, prompts, new) == together(model, prompts, new, places=8) == expected


@torch.no_grad()
def uncached(model: GPT, ids: list[int], new: int) -> list[int]:
    for _ in range(new):
        ids = [*ids, int(model(torch.tensor([ids]), last=True)[0, -1].argmax())]
    return ids[-new:]


@torch.no_grad()
def test_logits_of_a_prompt_in_pieces(tiny: Tiny):
    """Those of the whole, beyond windows and original contexts, with no piece longer than asked."""
    model = GPT.from_checkpoint(tiny.folder)
    (ids,) = prompts_of([61], model.config.vocab_size)
    whole, cache = model(torch.tensor([ids]), last=True), model.kv_cache(1, 61)
    for start in range(0, 48, 16):
        model.hidden(torch.tensor([ids[start : start + 16]]), cache=cache, length=61)
    assert off(model(torch.tensor([ids[48:]]), cache=cache, last=True), whole) < 1e-5
