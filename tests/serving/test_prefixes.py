"""What is known of a prompt is not read again, and changes no answer."""

import random
import shutil

import pytest

from helpers.methods import LORAS, STYLE, lora_files
from helpers.tiny_models import tiny_hf_model
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.generation.engine import generate
from lit_gpt.generation.sampling import GREEDY
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps import FastStep
from lit_gpt.methods import lora
from lit_gpt.methods.finetuned_model import load_finetuned
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.serving.prefixes import Prefixes, SharingBatch
from lit_gpt.text.prompt_style import PromptStyle

CONTEXT = 120


@pytest.fixture
def pool(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "base")
    return LoRAPool.beside(BaseCheckpoint.open(folder), lora_files(folder, LORAS[:2]), PromptStyle.from_dict(STYLE))


def sharing(pool, slots: int, kept: int) -> SharingBatch:
    model = pool.model
    prefixes = Prefixes(model.kv_cache(kept, CONTEXT) if kept else None)
    choose = lambda rows: pool.choose([row.lora for row in rows])  # noqa: E731
    return SharingBatch(model, model.kv_cache(slots, CONTEXT), FastStep(model), choose, 16, prefixes)


def finish(batch: SharingBatch, *rows: DecodingRow) -> None:
    for row in rows:
        batch.join(row)
    while batch.rows:
        list(batch.advance())


def test_the_next_turn_of_a_conversation_reads_what_is_new(pool):
    batch = sharing(pool, slots=2, kept=2)
    first = DecodingRow(list(range(40)), 10, sampling=GREEDY)
    finish(batch, first)
    then, other, same = (DecodingRow([*first.ids, 7, 8], 5, lora=n, sampling=GREEDY) for n in (0, 1, 0))
    finish(batch, then, other)
    assert then.cached == 49 and other.cached == 0  # under another LoRA nothing is known
    finish(batch, same)
    assert same.cached == 51 and same.ids == then.ids
    fresh = sharing(pool, slots=2, kept=0)
    expected = [DecodingRow([*first.ids, 7, 8], 5, lora=n, sampling=GREEDY) for n in (0, 1)]
    finish(fresh, *expected)
    assert [row.ids for row in (then, other)] == [row.ids for row in expected]
    again = DecodingRow([*first.ids, 7, 8], 5, sampling=GREEDY)
    finish(fresh, again)
    assert again.cached == 0


def test_the_least_recently_used_leaves_and_what_has_grown_takes_one_place(pool):
    batch, prefixes = sharing(pool, 1, kept=2), None
    prefixes = batch.prefixes
    for start in (0, 100, 200, 100):
        finish(batch, DecodingRow(list(range(start, start + 20)), 3, sampling=GREEDY))
    assert [kept.ids[0] for kept in prefixes.kept] == [200, 100] and not prefixes.free
    finish(batch, DecodingRow([*prefixes.kept[0].ids, 1, 2, 3], 3, sampling=GREEDY))
    assert [kept.ids[0] for kept in prefixes.kept] == [100, 200] and len(prefixes.kept[1].ids) > 22


def test_random_conversations_are_answered_as_they_would_be_alone(pool):
    """Prompts of few beginnings under three models, joining and leaving at random, with little room to keep them."""
    paths = {number: path for path, number in pool.numbers.items()}
    models = [pool.base.build()]
    models += [load_finetuned(pool.base.checkpoint_dir, paths[n], lora.NAME)[0] for n in (1, 2)]
    draw = random.Random(0)
    stems = [[draw.randrange(300) for _ in range(n)] for n in (12, 30, 60)]
    batch, asked, known = sharing(pool, 3, kept=2), [], {}
    while len(asked) < 60 or batch.rows:
        while batch.free and len(asked) < 60 and draw.random() < 0.6:
            stem = draw.choice(stems)
            prompt = stem[: draw.randint(9, len(stem))] + [draw.randrange(4) for _ in range(draw.randint(0, 2))]
            asked.append(
                (DecodingRow(list(prompt), draw.randint(1, 8), lora=draw.randrange(3), sampling=GREEDY), prompt)
            )
            batch.join(asked[-1][0])
        if batch.rows and draw.random() < 0.1:
            batch.leave(draw.choice(batch.rows))
        list(batch.advance())
    assert sum(row.cached for row, _ in asked) > 300
    for row, prompt in asked:
        key = (row.lora, *prompt)
        if key not in known:
            known[key] = list(generate(models[row.lora], prompt, 8, temperature=0))
        found = row.ids[len(prompt) :]
        assert found == known[key][: len(found)]


def test_keys_rotated_for_a_short_sequence_do_not_serve_a_long_one(tmp_path):
    tiny_hf_model("phi3", "longrope").save_pretrained(tmp_path)
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    model = load_model(tmp_path)
    batch = SharingBatch(model, model.kv_cache(1, 60), None, lambda rows: None, 16, Prefixes(model.kv_cache(4, 60)))
    prompt = list(range(12))
    cached = []
    for length in (12, 45, 50, 11):  # the original context is 16 or 32
        ids = (prompt * 5)[:length]
        row = DecodingRow(list(ids), 4, sampling=GREEDY)
        finish(batch, row)
        cached.append(row.cached)
        assert row.ids[length:] == list(generate(model, ids, 4, temperature=0))
    assert cached[1] == 0 and cached[2] > 40 and cached[3] >= 8
