"""The step of CUDA, by Triton's interpreter and without a graph, against the plain loop."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.methods import LORAS, STYLE, as_if_trained, lora_files, with_adapter_v2, with_lora_and_adapter
from helpers.tiny_models import model_of
from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.generation.engine import decode, generate
from lit_gpt.generation.sampling import GREEDY, RowSampling, Sampling, sample_rows
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps import FastStep
from lit_gpt.generation.steps.cuda_tape import CudaTape, Product
from lit_gpt.generation.steps.graph import GraphStep
from lit_gpt.kernels.cuda import gemv, launch
from lit_gpt.kernels.cuda.decoding import attention
from lit_gpt.kernels.cuda.decoding.rows import exponential_noise
from lit_gpt.kernels.cuda.language import power_of_2
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods import lora
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.model.gpt import quantize
from lit_gpt.text.prompt_style import PromptStyle

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs triton, and no GPU")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a product be one program, since for the interpreter what costs is their number."""

    def shape(m: int, outputs: int, codes: Tensor, *_: Any) -> dict[str, int]:
        rows, block = max(16, power_of_2(outputs)), max(32, power_of_2(codes.size(1)))
        return {"INPUTS": 1 if m == 1 else 16, "ROWS": rows, "BLOCK": block, "SPLITS": 1}

    monkeypatch.setattr(gemv, "launch_shape", shape)
    monkeypatch.setattr(attention, "PROGRAMS", 1)


@contextmanager
def on_cuda() -> Iterator[None]:
    with use_policy(simulate_cuda=True):
        yield


def answers(
    model: GPT, prompts: list[list[int]], new: list[int], places: int, step: Any = None, **options: Any
) -> list[list[int]]:
    """Return the greedy answers of rows in a batch with so many places."""
    loras = options.pop("loras", [0] * len(prompts))
    rows = [
        DecodingRow(list(prompt), n, lora=number, sampling=GREEDY)
        for prompt, n, number in zip(prompts, new, loras, strict=True)
    ]
    for _ in decode(model, rows, model.kv_cache(places, 40), step=step, **options):
        pass
    return [row.ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


PROMPTS, NEW = [[5, 6, 7], [9] * 11, [3, 4], [8]], [4, 2, 5, 1]


def same_answers(model: GPT, places: int = 1) -> GraphStep:
    expected = answers(model, PROMPTS[:2] if places == 1 else PROMPTS, NEW[:2] if places == 1 else NEW, places)
    with on_cuda():
        step = GraphStep(model, places)
        rows = (PROMPTS[:2], NEW[:2]) if places == 1 else (PROMPTS, NEW)
        assert answers(model, *rows, places, step) == expected
    return step


def small(family: str, layout: str, folder: Any, **fields: Any) -> GPT:
    return model_of(family, layout, folder, num_hidden_layers=1, **fields)


@pytest.mark.parametrize("places", [1, 3])
@pytest.mark.parametrize("family, layout", [("falcon", "7b"), ("llama", "llama3")])
def test_greedy_answers_are_those_of_the_plain_loop(family, layout, places, tmp_path):
    same_answers(model_of(family, layout, tmp_path), places)


@pytest.mark.parametrize(
    "family, layout, format",
    [("falcon", "7b", "int8"), ("llama", "llama3", "int4"), ("llama", "llama3", "nf4"), ("falcon", "7b", "nf4-dq")],
)
def test_quantized_bases(family, layout, format, tmp_path):
    same_answers(quantize(small(family, layout, tmp_path), format), 1 if format == "nf4" else 3)


@pytest.mark.parametrize(
    "family, layout",
    [("llama", "mistral"), ("gemma", "gemma2"), ("mpt", "mpt"), ("gpt2", "gpt2"), ("qwen", "qwen3")],
)
def test_windows_soft_caps_slopes_learned_positions_and_norms_of_heads(family, layout, tmp_path):
    same_answers(small(family, layout, tmp_path))


@pytest.mark.parametrize("attach", [with_lora_and_adapter, with_adapter_v2], ids=["lora, adapter", "adapter_v2"])
def test_what_is_attached_is_computed(attach, tmp_path):
    same_answers(as_if_trained(attach(model_of("llama", "llama3", tmp_path))), 3)


def test_a_merged_lora(tmp_path):
    model = as_if_trained(lora.attach(small("falcon", "7b", tmp_path), lora.LoRAConfig(r=4)))
    lora.merge(model)
    same_answers(model.eval())


@pytest.mark.parametrize("format", [None, "nf4"])
def test_each_row_goes_through_its_own_lora(llama, tmp_path, format):
    folder = shutil.copytree(llama, tmp_path / "base")
    paths = lora_files(folder, LORAS[:2], format)
    pool = LoRAPool.beside(BaseCheckpoint.open(folder), paths, PromptStyle.from_dict(STYLE))
    options = {"loras": [1, 2, 0, 2], "choose": lambda rows: pool.choose([row.lora for row in rows])}
    expected = answers(pool.model, PROMPTS, NEW, 4, **options)
    with on_cuda():
        assert answers(pool.model, PROMPTS, NEW, 4, GraphStep(pool.model, 4), **options) == expected


def test_a_falcon_layer_is_six_launches_and_a_llama_layer_five(tmp_path):
    for i, (family, layout, launches, outside) in enumerate((("falcon", "7b", 6, 4), ("llama", "llama3", 5, 3))):
        model = model_of(family, layout, tmp_path / str(i))
        with on_cuda():
            operations = CudaTape(model, 1).operations
        # outside: angles, embedding, head, and a last norm that is not within its product
        assert len(operations) - outside == launches * model.config.n_layer
        products = [operation for operation in operations if isinstance(operation, Product)]
        assert sum(product.epilogue.residual is not None for product in products) == 2 * model.config.n_layer


def test_a_model_without_a_kernel_for_some_part_goes_its_own_way(tmp_path):
    model = small("llama", "llama3", tmp_path)
    model.h[0].mlp.__class__ = type("Other", (type(model.h[0].mlp),), {})
    expected = answers(model, PROMPTS[:1], [4], 1)
    with on_cuda():
        step = FastStep(model)
        assert answers(model, PROMPTS[:1], [4], 1, step) == expected
        assert isinstance(step.chosen, partial)


def counted(step: GraphStep) -> list[str]:
    """Let the step count what it runs: the kinds of its graphs, one for each step."""
    kinds, replay = [], step.replay

    def count(rows: list[DecodingRow], lengths: list[int], kind: str) -> None:
        kinds.append(kind)
        replay(rows, lengths, kind)

    step.replay = count
    return kinds


def test_steps_run_ahead_but_not_beyond_what_is_asked_for(tmp_path):
    model = small("falcon", "7b", tmp_path)
    with on_cuda():
        step = GraphStep(model)
        kinds = counted(step)
        answer = generate(model, PROMPTS[0], 5, temperature=0, step=step)
        next(answer), next(answer)  # from the prompt, and from a step, behind which another is under way
        assert len(kinds) == 2 and len(step.under_way) == 1
        assert len(list(answer)) == 3 and len(kinds) == 4 and not step.under_way


def test_a_conversation_goes_on_behind_a_step_that_nobody_wanted(tmp_path):
    """A stop token leaves a step under way, which has written to the cache."""
    model = small("llama", "llama3", tmp_path)
    first = list(generate(model, PROMPTS[0], 5, temperature=0))
    with on_cuda():
        step, cache = GraphStep(model), model.kv_cache(1, 40)
        stopped = list(generate(model, PROMPTS[0], 9, temperature=0, stop_ids=[first[3]], cache=cache, step=step))
        assert stopped == first[: first.index(first[3])] and step.under_way
        for layer in cache:
            layer.length = len(PROMPTS[0]) + len(stopped)
        more = [*PROMPTS[0], *stopped, 1, 2]
        assert list(generate(model, more, 4, temperature=0, cache=cache, step=step)) == list(
            generate(model, more, 4, temperature=0)
        )


def test_what_looks_at_tokens_goes_step_by_step(tmp_path):
    model = small("llama", "llama3", tmp_path)
    expected = list(generate(model, PROMPTS[0], 5, temperature=0, repetition_penalty=1.5))
    with on_cuda():
        step = FastStep(model)
        assert list(generate(model, PROMPTS[0], 5, temperature=0, repetition_penalty=1.5, step=step)) == expected
        assert {kind for _, _, kind in step.chosen.graphs} == {"logits"}


def test_weights_that_change_count_from_the_next_answer_on(tmp_path):
    model = small("llama", "llama3", tmp_path)
    with on_cuda():
        step = GraphStep(model)
        list(generate(model, PROMPTS[0], 3, temperature=0, step=step))
        for weight in model.parameters():
            weight.data = torch.randn_like(weight) / 10
        found = list(generate(model, PROMPTS[0], 5, temperature=0, step=step))
    assert found == list(generate(model, PROMPTS[0], 5, temperature=0))


def test_a_row_draws_the_same_whoever_is_beside_it(tmp_path):
    model = small("llama", "llama3", tmp_path)
    settings = Sampling(temperature=0.8, top_k=20, top_p=0.9)
    drawn = []
    with on_cuda():
        for others in ([], [PROMPTS[1]]):
            row = DecodingRow(list(PROMPTS[0]), 5, torch.Generator().manual_seed(7), sampling=settings)
            rows = [row, *(DecodingRow(list(ids), 5, sampling=GREEDY) for ids in others)]
            for _ in decode(model, rows, model.kv_cache(2, 40), step=GraphStep(model, 2)):
                pass
            drawn.append(row.ids[len(PROMPTS[0]) + 1 :])  # the first is drawn from the prompt
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "settings", [Sampling(0.7), Sampling(1.3, top_k=3), Sampling(1.0, None, 0.6), Sampling(1.0, None, 1.0, 0.2)]
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(settings):
    """And greedy rows beside them are greedy."""
    logits = torch.tensor([2.0, 1.5, 1.4, 0.2, 0.1, -1.0, -3.0, 1.0]).expand(2, -1)
    sampling = RowSampling.zeros(2, logits.device)
    kind = sampling.choose([settings, GREEDY])
    counts, noise = torch.zeros(8), torch.empty(2, 8 * 600)
    exponential_noise(noise, torch.tensor([5, 5]), torch.tensor([0, 1]))
    for row in noise.view(-1, 1, 8).expand(-1, 2, -1):
        drawn = sample_rows(logits, sampling, row, kind)
        counts[drawn[0]] += 1
        assert drawn[1] == 0
    p = expected_probabilities(logits[0], settings)
    assert ((counts > 0) <= (p > 0)).all() and (counts / counts.sum() - p).abs().max() < 0.05


def expected_probabilities(logits: Tensor, settings: Sampling) -> Tensor:
    logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        logits = logits.index_fill(0, order[ordered.cumsum(0) - ordered > settings.top_p], -torch.inf)
    p = logits.softmax(-1)
    return logits.masked_fill(p < settings.min_p * p.max(), -torch.inf).softmax(-1)
