"""Tools go into the prompt by the template, and what calls them comes back as calls."""

import json

import pytest

from helpers.servers import running
from lit_gpt.serving.replies import Reply
from lit_gpt.serving.scheduler import Piece

openai = pytest.importorskip("openai")
TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }} {{ m.content or '' }} "
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments }} {% endfor %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TEXT = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def served(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("style") / "tools.jinja"
    path.write_text(TEMPLATE)
    with running(llama, {}, prompt_style=str(path), batch_size=1, context=256) as server:
        yield server


def test_tools_and_their_answers_are_in_the_prompt(served, llama):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        ask = lambda messages, **more: client.chat.completions.create(  # noqa: E731
            model=llama.name, messages=messages, max_tokens=4, **more
        )
        user = {"role": "user", "content": "the cat"}
        without, with_tools, none = ask([user]), ask([user], tools=TOOLS), ask([user], tools=TOOLS, tool_choice="none")
        assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens == none.usage.prompt_tokens
        call = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        messages = [user, {"role": "assistant", "content": None, "tool_calls": [call]}]
        longer = ask([*messages, {"role": "tool", "tool_call_id": "x", "content": "rain"}], tools=TOOLS)
        assert longer.usage.prompt_tokens > with_tools.usage.prompt_tokens
        chunks = list(ask([user], tools=TOOLS, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage.completion_tokens and [c.choices[0].finish_reason for c in chunks[:-1]][-1]


def test_a_template_without_a_place_for_tools_refuses_them(llama):
    with running(llama, {}, batch_size=1, context=64) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="tools: the model's prompt style 'chatml' has no place"):
                client.chat.completions.create(
                    model=llama.name, messages=[{"role": "user", "content": "x"}], tools=TOOLS
                )


@pytest.mark.parametrize(("tools", "called"), [(["weather"], True), (["other"], False), ([], False)])
def test_calls_come_back_as_the_client_knows_them(tools, called):
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    reply, events = Reply(None, "m", True, 1, False, 3, tools), ""
    for piece in (Piece(TEXT[:20], 5), Piece(TEXT[20:], 30, finish="stop")):
        reply.choices[0].add(piece)
        events += reply.event(0, piece)
    choice = ChatCompletion.model_validate(reply.whole()).choices[0]
    chunks = [ChatCompletionChunk.model_validate_json(x.removeprefix("data: ")) for x in events.split("\n\n") if x]
    if called:
        (call,), (part,) = choice.message.tool_calls, chunks[-1].choices[0].delta.tool_calls
        assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
        for one in (call, part):
            assert one.function.name == "weather" and json.loads(one.function.arguments) == {"city": "Paris"}
        assert choice.message.content == chunks[-1].choices[0].delta.content == "Let me see." and len(chunks) == 1
    else:
        assert choice.message.content == TEXT and not choice.message.tool_calls and choice.finish_reason == "stop"
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
