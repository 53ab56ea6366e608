"""Rows join and leave a batch between turns: each is what it would be alone, whatever the schedule."""

import random
import shutil

import pytest
import torch

from helpers.methods import LORAS, STYLE, lora_files
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.generation.engine import Batch, generate
from lit_gpt.generation.sampling import GREEDY, Sampling
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps import FastStep
from lit_gpt.methods import lora
from lit_gpt.methods.finetuned_model import load_finetuned
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.text.prompt_style import PromptStyle

SLOTS, CONTEXT = 4, 120


@pytest.fixture(scope="module")
def loras(llama, tmp_path_factory):
    """LoRAs beside their base, and what each prompt is answered with under each of them alone."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("base") / "base")
    paths = lora_files(folder, LORAS)
    pool = LoRAPool.beside(BaseCheckpoint.open(folder), paths, PromptStyle.from_dict(STYLE))
    models = [pool.base.build(), *(load_finetuned(folder, path, lora.NAME)[0] for path in paths)]
    draw = random.Random(5)
    prompts = [[draw.randrange(300) for _ in range(n)] for n in (1, 2, 7, 19, 40, 90)]
    alone = {
        (i, number): list(generate(model, prompt, 20, temperature=0))
        for i, prompt in enumerate(prompts)
        for number, model in enumerate(models)
    }
    return pool, prompts, alone


def run(schedule: random.Random, loras, step, piece: int | None) -> int:
    """Let rows arrive and go away as the schedule has it; check each and return how many there were."""
    pool, prompts, alone = loras
    model = pool.model
    batch = Batch(model, model.kv_cache(SLOTS, CONTEXT), step, lambda rows: pool.choose([r.lora for r in rows]), piece)
    asked: list[tuple[DecodingRow, int]] = []
    while len(asked) < 10 or batch.rows:
        while batch.free and len(asked) < 10 and schedule.random() < 0.5:
            i = schedule.randrange(len(prompts))
            row = DecodingRow(list(prompts[i]), schedule.randint(1, 20), lora=schedule.randrange(5), sampling=GREEDY)
            asked.append((row, i))
            batch.join(row)
        if batch.rows and schedule.random() < 0.1:
            batch.leave(schedule.choice(batch.rows))
        for row, _ in batch.advance():
            row.remaining *= schedule.random() > 0.03
    for row, i in asked:
        found = row.ids[len(prompts[i]) :]
        assert found == alone[i, row.lora][: len(found)]
        assert row.remaining or found
    return len(asked)


@pytest.mark.parametrize("piece", [None, 16])
def test_random_schedules(loras, piece):
    step = FastStep(loras[0].model)
    assert sum(run(random.Random(seed), loras, step if seed % 4 else None, piece) for seed in range(12)) == 120


@pytest.mark.slow
def test_two_hundred_random_schedules(loras):
    step = FastStep(loras[0].model)
    assert sum(run(random.Random(seed), loras, step, (None, 8, 33)[seed % 3]) for seed in range(200)) == 2000


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(loras):
    pool, prompts, alone = loras
    pool.choose([0])
    batch = Batch(pool.model, pool.model.kv_cache(2, CONTEXT), piece=16)
    quick, slow = (DecodingRow(list(prompts[i]), 20, sampling=GREEDY) for i in (1, 5))
    batch.join(quick)
    assert [row for row, _ in batch.advance()] == [quick]
    batch.join(slow)
    turns = 0
    while slow.ids == prompts[5]:
        assert quick in [row for row, _ in batch.advance()]
        assert slow.cache[0].length <= 16 * (turns := turns + 1) or slow.ids != prompts[5]
    assert turns == 6  # of 90 tokens
    while batch.rows:
        list(batch.advance())
    assert [quick.ids[2:], slow.ids[90:]] == [alone[1, 0], alone[5, 0]]


def test_each_row_samples_in_its_own_way(loras):
    """By its own settings and generator, and as it would alone."""
    pool, prompts, alone = loras
    pool.choose([0])
    model = pool.model
    settings = [GREEDY, Sampling(0.9, top_k=20), Sampling(1.3, top_p=0.8), Sampling(1.0, min_p=0.1)]
    settings += [Sampling(0.0, repetition_penalty=1.5)]

    def rows() -> list[DecodingRow]:
        return [
            DecodingRow(list(prompts[3]), 20, torch.Generator().manual_seed(seed), sampling=sampling)
            for seed, sampling in enumerate(settings)
        ]

    def finish(some: list[DecodingRow]) -> list[list[int]]:
        batch = Batch(model, model.kv_cache(len(some), CONTEXT))
        for row in some:
            batch.join(row)
        while batch.rows:
            list(batch.advance())
        return [row.ids for row in some]

    together = finish(rows())
    assert together == [ids for row in rows() for ids in finish([row])]
    assert together[0][19:] == alone[3, 0] and len({tuple(ids) for ids in together}) == len(settings)
