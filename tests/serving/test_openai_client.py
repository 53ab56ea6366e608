"""The openai client drives the server; what it answers is what the engine gives alone."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from lit_gpt.generation.engine import generate
from lit_gpt.generation.sampling import Sampling

openai = pytest.importorskip("openai")
MODELS = ["base", "lora0", "lora1", "lora2", "lora3"]
TEXTS = ["the cat", "a task", "the dog and the cat", "Below is an instruction that describes a task " * 3, "x"]


@pytest.fixture(scope="module")
def alone(served):
    """What a model alone gives to a chat of one message: text and the number of tokens, a stop token included."""
    catalog = served.completions.catalog
    singles, known = {}, {}

    def answer(model: str, text: str, new: int, **sampling) -> tuple[str, int]:
        key = (model, text, new, *sampling.items())
        if key not in known:
            if model not in singles:
                singles[model] = single_model(catalog, model)
            style = catalog.served[model].style
            ids = style.encode_prompt([{"role": "user", "content": text}], catalog.tokenizer)
            found = list(generate(singles[model], ids, new, **{"temperature": 0} | sampling))
            ends = [i for i, token in enumerate(found) if token in style.stop_ids]
            end = ends[0] if ends else new
            known[key] = catalog.tokenizer.decode(found[:end]), min(end + 1, new)
        return known[key]

    return answer


def single_model(catalog, model: str):
    """The model that serves this name alone: nothing of the server's is used."""
    from lit_gpt.methods.finetuned_model import load_finetuned

    served, base = catalog.served[model], catalog.adapters.pool.base
    return load_finetuned(base.checkpoint_dir, served.path, "lora")[0] if served.path else base.build()


def chat(client, model: str, text: str, new: int, **options):
    options = {"temperature": 0} | options
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, max_tokens=new, **options)


@pytest.mark.parametrize("seed", range(2))
def test_each_answer_is_that_of_its_model_alone_however_they_arrive(served, client, alone, seed):
    draw = random.Random(seed)
    asked = [(draw.choice(MODELS), draw.choice(TEXTS), draw.randint(1, 30)) for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda one: chat(client, *one), asked))
    for one, reply in zip(asked, replies, strict=True):
        text, tokens = alone(*one)
        assert reply.choices[0].message.content == text and reply.usage.completion_tokens == tokens, one
        assert reply.choices[0].finish_reason == ("length" if tokens == one[2] else "stop") or tokens == one[2]
    assert len({alone(model, TEXTS[0], 20) for model in MODELS}) > 2  # they say different things


def test_a_stream_joined_is_the_whole_answer(client, alone):
    for model in MODELS:
        chunks = list(chat(client, model, TEXTS[2], 25, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        joined = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        text, tokens = alone(model, TEXTS[2], 25)
        assert joined == text and chunks[-1].usage.completion_tokens == tokens and not chunks[-1].choices
        assert [c.choices[0].finish_reason for c in chunks[:-1]].count(None) == len(chunks) - 2
        assert len(chunks) > 5


def test_a_seed_gives_what_generate_gives_with_it(client, alone, served):
    import torch

    options = {"temperature": 0.9, "seed": 7, "top_p": 0.9, "extra_body": {"top_k": 30, "min_p": 0.01}}
    one, again, other = (chat(client, "lora1", "the cat", 20, **options | {"seed": s}) for s in (7, 7, 8))
    expected = alone(
        "lora1", "the cat", 20, **vars(Sampling(0.9, 30, 0.9, 0.01)), generator=torch.Generator().manual_seed(7)
    )
    assert one.choices[0].message.content == again.choices[0].message.content == expected[0]
    assert other.choices[0].message.content != expected[0]


def test_several_choices_differ_and_follow_the_seed(client):
    def texts(**options) -> list[str]:
        reply = chat(client, "base", "the cat", 15, temperature=1.0, seed=3, **options)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.message.content for choice in reply.choices]

    three = texts(n=3)
    assert three == texts(n=3) and len(set(three)) == 3 and texts() == three[:1]
    chunks = list(chat(client, "base", "the cat", 15, temperature=1.0, seed=3, n=3, stream=True))
    joined = ["", "", ""]
    for chunk in chunks:
        joined[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert joined == three


def test_a_stop_string_ends_the_answer(client, alone):
    text, tokens = alone("lora0", "the cat", 25)
    stop = text[6:8]
    reply = chat(client, "lora0", "the cat", 25, stop=[stop, "nowhere"])
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens < tokens
    joined = "".join(
        c.choices[0].delta.content or "" for c in chat(client, "lora0", "the cat", 25, stop=stop, stream=True)
    )
    assert joined == text[: text.index(stop)]


def test_log_probabilities(client, served):
    import torch

    reply = chat(client, "lora2", "the cat", 6, logprobs=True, top_logprobs=4)
    told = reply.choices[0].logprobs.content
    catalog = served.completions.catalog
    ids = catalog.served["lora2"].style.encode_prompt([{"role": "user", "content": "the cat"}], catalog.tokenizer)
    with torch.no_grad():
        expected = single_model(catalog, "lora2")(torch.tensor([ids]))[0, -1].log_softmax(-1)
    assert told[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert [t.logprob for t in told[0].top_logprobs] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
    assert told[0].token == told[0].top_logprobs[0].token and len(told) == reply.usage.completion_tokens
    assert all(t.bytes is None or bytes(t.bytes).decode() == t.token for t in told)
    streamed = chat(client, "lora2", "the cat", 6, logprobs=True, top_logprobs=4, stream=True)
    chunks = [t.token for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert chunks == [t.token for t in told]


def test_texts_and_token_ids_are_continued(client, served):
    catalog = served.completions.catalog
    ids, model = catalog.tokenizer.encode("the cat").tolist(), single_model(catalog, "base")
    stops = catalog.served["base"].style.stop_ids
    expected = catalog.tokenizer.decode(list(generate(model, ids, 10, temperature=0, stop_ids=stops)))
    options = {"model": "base", "max_tokens": 10, "temperature": 0}
    assert client.completions.create(prompt="the cat", **options).choices[0].text == expected
    reply = client.completions.create(prompt=[ids, ids], n=2, logprobs=2, **options)
    assert [choice.text for choice in reply.choices] == [expected] * 4
    assert reply.usage.prompt_tokens == 2 * len(ids)
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.text_offset) and all(len(top) <= 2 for top in logprobs.top_logprobs)
    joined = "".join(c.choices[0].text for c in client.completions.create(prompt="the cat", stream=True, **options))
    assert joined == expected


def test_the_models_are_listed_with_their_distance_from_the_base(client):
    models = {model.id: model for model in client.models.list().data}
    assert list(models) == MODELS
    assert models["base"].method is None and models["base"].distance is None
    assert all(models[name].method == "lora" and models[name].distance > 0 for name in MODELS[1:])
    assert len({model.base for model in models.values()}) == 1
    assert client.models.retrieve("lora3").id == "lora3"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_messages_in_parts_and_from_a_developer(client, served):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    whole = [{"role": "system", "content": "a"}, {"role": "user", "content": "the cat"}]
    cut = [{"role": "developer", "content": "a"}, {"role": "user", "content": parts}]
    texts = {
        client.chat.completions.create(model="base", messages=m, max_tokens=8, temperature=0).choices[0].message.content
        for m in (whole, cut)
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model: 'gpt-4' is not served; expected base, lora0"),
        ({"temperature": 3}, openai.BadRequestError, "temperature: expected a number, from 0 to 2"),
        ({"n": 0}, openai.BadRequestError, "n: expected a whole number"),
        ({"n": 24}, openai.BadRequestError, "n: 24 answers at once; expected at most 23"),
        ({"max_tokens": 500}, openai.BadRequestError, "500 new ones exceed the context of 256"),
        ({"messages": []}, openai.BadRequestError, "the field .messages.: expected a list of messages"),
        ({"messages": [{"role": "user", "content": 3}]}, openai.BadRequestError, "message 1: expected each message as"),
        ({"stop": [""]}, openai.BadRequestError, "stop: expected a text that is not empty"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty: is not served here"),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs: expected logprobs true"),
        ({"extra_body": {"beam": 3}}, openai.BadRequestError, "beam: no such field is known here"),
        ({"messages": [{"role": "user", "content": "z" * 400}]}, openai.BadRequestError, "exceed the context of 256"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(client, change, error, words):
    asked = {"model": "base", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4} | change
    with pytest.raises(error, match=words) as refused:
        client.chat.completions.create(**asked)
    assert set(refused.value.body) == {"message", "type", "param", "code"}
