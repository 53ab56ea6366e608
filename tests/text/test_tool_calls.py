"""Calls are found in the forms that models write them in, and nothing else is taken for one."""

import json

import pytest

from lit_gpt.text.tool_calls import parse_calls

TOOLS = ("weather", "get-time")
PARIS = {"city": "Paris", "when": {"day": 1}}
SPELLED = json.dumps(PARIS)


@pytest.mark.parametrize(
    "text",
    [
        f'<tool_call>\n{{"name": "weather", "arguments": {SPELLED}}}\n</tool_call>',
        f'<tool_call>{{"name": "weather", "arguments": {SPELLED}}}',  # cut off behind it
        f'<tool_call>{{"name": "weather", "arguments": {json.dumps(SPELLED)}}}</tool_call>',
        f'{{"name": "weather", "parameters": {SPELLED}}}',
        f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {SPELLED}}}',
        f'{{"type": "function", "function": {{"name": "weather", "arguments": {SPELLED}}}}}',
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {SPELLED}}}]',
        f' [{{"name": "weather", "arguments": {SPELLED}, "id": "abc123456"}}]',
        f"[TOOL_CALLS]weather[ARGS]{SPELLED}",
        f"weather{SPELLED}",
    ],
)
def test_a_call(text):
    content, calls = parse_calls(text, TOOLS)
    assert content == "" and [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", PARIS)]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{}</tool_call>\n<tool_call>\n{}\n</tool_call>", "{}; {}", "[TOOL_CALLS] [{}, {}]", "{}\n{}",
    ],
)  # fmt: skip
def test_several_calls(text):
    one, two = '{"name": "weather", "arguments": {"city": "Äö"}}', '{"name": "get-time", "arguments": {}}'
    calls = parse_calls(text.replace("{}", one, 1).replace("{}", two, 1) if text.count("{}") == 2 else text, TOOLS)[1]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("weather", {"city": "Äö"}),
        ("get-time", {}),
    ]


def test_text_before_a_call_stays_text():
    text = 'I look it up.\n<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    assert parse_calls(text, TOOLS) == ("I look it up.", [("weather", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        "", "Hello", "<tool_call>", "<tool_call>weather</tool_call>", '{"name": "weather"',
        '{"name": "rm", "arguments": {}}',
        '{"city": "Paris"}', "[1, 2]", "3", "null", '{"name": "weather", "arguments": 3}', '{"name": ["weather"]}',
        '{"name": "weather", "arguments": "{"}', "weather is fine {today}", "[TOOL_CALLS]", "[" * 100_000,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', '[{"name": "weather"}, 3]', "weather{} and more",
    ],
)  # fmt: skip
def test_what_is_no_call_stays_as_it_is(text):
    assert parse_calls(text, TOOLS) == (text, [])
