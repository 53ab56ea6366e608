"""Answers that are held to JSON are JSON, of the schema that was asked for."""

import json

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
PLACE = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}


def ask(client, format: dict, **options):
    messages = [{"role": "user", "content": "the cat"}]
    options = {"model": "lora1", "max_tokens": 120, "temperature": 1.0} | options
    return client.chat.completions.create(messages=messages, response_format=format, **options)


def held(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def test_answers_of_a_schema(client):
    for options in ({"seed": 1, "n": 4}, {"temperature": 0}, {"seed": 2, "model": "base", "top_p": 0.5}):
        for choice in ask(client, held(PLACE), **options).choices:
            found = json.loads(choice.message.content)
            assert set(found) == {"kind", "n"} and found["kind"] in ("cat", "dog") and found["n"] in range(10)
            assert choice.finish_reason == "stop"


def test_objects_and_streams(client):
    for seed in range(3):
        choice = ask(client, {"type": "json_object"}, seed=seed).choices[0]
        text = choice.message.content
        assert text.startswith("{") and (choice.finish_reason == "length" or isinstance(json.loads(text), dict))
    chunks = ask(client, held(PLACE), seed=3, stream=True)
    assert set(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks))) == {"kind", "n"}


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"not": {"type": "string"}}, {"type": "string", "pattern": "("}]
)
def test_what_nothing_can_be_held_to_is_refused(client, schema):
    with pytest.raises(openai.BadRequestError, match="response_format: "):
        ask(client, held(schema))
