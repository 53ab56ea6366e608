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


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "place.json"
    path.write_text(json.dumps(PLACE))
    return path


def test_generate_holds_its_answers_to_a_schema(cli, llama, tmp_path, schema):
    options = {"checkpoint_dir": llama, "prompt_style": "chatml", "json_schema": schema, "max_new_tokens": 60}
    told = cli("generate/base.py", prompt="the cat", num_samples=2, **options)
    assert len(told.out.splitlines()) == 2 and not told.code, told.err
    for line in told.out.splitlines():
        assert set(json.loads(line)) == {"kind", "n"}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n')
    cli("generate/base.py", prompt_file=prompts, out=tmp_path / "answers.jsonl", **options)
    for line in (tmp_path / "answers.jsonl").read_text().splitlines():
        assert set(json.loads(json.loads(line)["answer"])) == {"kind", "n"}


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read"), ("[]", "expected a JSON schema"), ('{"not": {}}', "not")]
)
def test_what_is_no_schema_is_refused(cli, llama, schema, text, words):
    schema.write_text(text)
    refused = cli("generate/base.py", checkpoint_dir=llama, prompt_style="chatml", prompt="x", json_schema=schema)
    refused.refused("--json_schema", words, code=2 if "not" in text else 1)
