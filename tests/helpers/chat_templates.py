"""Chat templates of the structure that the model families use, and conversations to render.

Beside each template stands, in Python, what it writes: pieces of text, each with whether the assistant generates it.
The two were written apart, so that one checks the other.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Pieces = Iterator[tuple[str, bool]]
Messages = list[dict[str, Any]]


class Family(NamedTuple):
    template: str
    pieces: Callable[[Messages, Any], Pieces]
    bos: str | None
    eos: str
    prompt_mismatch: Callable[[Messages], bool] = lambda messages: (
        False
    )  # whether history is rendered otherwise than a prompt


def plain(message: dict) -> bool:
    """Whether an assistant's message is text alone: the simpler templates leave out the rest."""
    return not (message.get("tool_calls") or message.get("reasoning_content"))


def calls(message: dict) -> list[str]:
    return [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]


def system_first(messages: Messages) -> tuple[str | None, Messages]:
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else (None, messages)


# --- ChatML, as Qwen 2.5 has it: a default system prompt, tools in it, calls and results

QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}{{- 'You help.' }}{%- endif %}
    {{- '\\n\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not (loop.first and tools))
           or (m.role == 'assistant' and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n' }}{{- call | tojson }}{{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def qwen(messages: Messages, tools: Any) -> Pieces:
    system, rest = system_first(messages)
    listed = (
        "\n\n# Tools\n<tools>" + "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools) + "\n</tools>"
        if tools
        else ""
    )
    yield f"<|im_start|>system\n{'You help.' if system is None else system}{listed}<|im_end|>\n", False
    for i, m in enumerate(rest):
        if m["role"] == "assistant":
            called = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls(m))
            yield "<|im_start|>assistant\n", False
            yield "\n".join(filter(None, (m["content"], called))) + "<|im_end|>", not m.get("reasoning_content")
            yield "\n", False
        elif m["role"] == "tool":
            around = [not 0 <= j < len(rest) or rest[j]["role"] != "tool" for j in (i - 1, i + 1)]
            yield "<|im_start|>user" * around[0] + f"\n<tool_response>\n{m['content']}\n</tool_response>", False
            yield "<|im_end|>\n" * around[1], False
        else:
            yield f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", False


# --- one header and one end for each role

HEADED = (
    "{BOS}{% for m in messages %}{{ 'OPEN' + m['role'] + 'SHUT' }}{% if m['role'] == 'assistant' %}{TAG}"
    "{{ CONTENT + 'END' }}{ENDTAG}{{ 'AFTER' }}{% else %}{{ CONTENT + 'END' + 'AFTER' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'OPEN' + 'assistant' + 'SHUT' }}{% endif %}"
)


def headed(open: str, shut: str, end: str, after: str, bos: str | None = None, strip: bool = False, tags: str = "",
           eos: str | None = None) -> Family:  # fmt: skip
    """`tags`: "" for none, "all" around content and end, "content" around the content alone."""
    source = HEADED.replace("{BOS}", "{{ bos_token }}" if bos else "")
    if tags == "content":
        source = source.replace("{{ CONTENT + 'END' }}{ENDTAG}", "{{ CONTENT }}{ENDTAG}{{ 'END' }}")
    source = source.replace("{TAG}", "{% generation %}" if tags else "").replace(
        "{ENDTAG}", "{% endgeneration %}" if tags else ""
    )
    source = source.replace("CONTENT", "m['content'] | trim" if strip else "m['content']").replace(
        "| trim +", "| trim ~"
    )
    for word, text in (("OPEN", open), ("SHUT", shut), ("END", end), ("AFTER", after)):
        source = source.replace(f"'{word}'", f"'{text}'".replace("\n", "\\n"))

    def pieces(messages: Messages, tools: Any) -> Pieces:
        yield bos or "", False
        for m in messages:
            ours = m["role"] == "assistant"
            yield open + m["role"] + shut, False
            # these templates have no place for calls: an answer that makes one is not shown in full
            yield (m["content"].strip() if strip else m["content"]) + end, ours and plain(m)
            yield after, False

    return Family(source, pieces, bos, eos or end)


# --- Llama 2: system prompt within the first question, BOS before each, everything stripped

LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for m in rest %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system != false %}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}
    {%- else %}{% set content = m['content'] %}{% endif %}
    {%- if m['role'] == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif m['role'] == 'assistant' %}{{- ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}
"""


def llama2(messages: Messages, tools: Any) -> Pieces:
    system, rest = system_first(messages)
    for i, m in enumerate(rest):
        if m["role"] == "user":
            before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None and i == 0 else ""
            yield f"<s>[INST] {(before + m['content']).strip()} [/INST]", False
        else:
            yield f" {m['content'].strip()} </s>", plain(m)


# --- Mistral 7B v0.3: the system prompt goes into the last question, if that is the last message

MISTRAL = """
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for m in rest %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {%- if m['role'] == 'user' %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}
        {%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + m['content'] | trim + eos_token }}{%- endif %}
{%- endfor %}
"""


def mistral(messages: Messages, tools: Any) -> Pieces:
    system, rest = system_first(messages)
    yield "<s>", False
    for m in rest:
        if m["role"] == "user":
            yield f"[INST] {m['content']}[/INST]", False
        else:
            yield " ", system is None and plain(m)  # with a system prompt only the content itself can be found
            yield m["content"].strip() + "</s>", plain(m)


# --- Gemma: the assistant is "model", there is no system prompt

GEMMA = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""


def gemma(messages: Messages, tools: Any) -> Pieces:
    yield "<bos>", False
    for m in messages:
        ours = m["role"] == "assistant"
        yield f"<start_of_turn>{'model' if ours else m['role']}\n", False
        yield m["content"].strip() + "<end_of_turn>", ours and plain(m)
        yield "\n", False


# --- Phi-3: after the last message the end of the text, which an answer's own end precedes

PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def phi3(messages: Messages, tools: Any) -> Pieces:
    for m in messages:
        yield f"<|{m['role']}|>\n", False
        yield m["content"] + "<|end|>", m["role"] == "assistant" and plain(m)
        yield "\n", False
    yield "<|endoftext|>", False


# --- Zephyr and StableLM: the generation prompt is written within the loop

ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + m['content'] + eos_token }}
{% else %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


def zephyr(messages: Messages, tools: Any) -> Pieces:
    for m in messages:
        yield f"<|{m['role']}|>\n", False
        yield m["content"] + "</s>", m["role"] == "assistant" and plain(m)
        yield "\n", False


# --- OLMo 2: a line between turns, none after the last

OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}{{ '\n' if not loop.last }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)


def olmo(messages: Messages, tools: Any) -> Pieces:
    yield "<|endoftext|>", False
    for i, m in enumerate(messages):
        yield f"<|{m['role']}|>\n", False
        if m["role"] == "assistant":
            yield m["content"] + "<|endoftext|>", plain(m)
            yield "\n" * (i + 1 < len(messages)), False
        else:
            yield m["content"] + "\n", False


# --- SmolLM3: a date, and generation tags that take in the header and the line after the end

SMOLLM3 = """
{%- set today = strftime_now("%d %B %Y") %}
{{- '<|im_start|>system\\nToday: ' ~ today ~ '\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- if tools %}{{- '\\nTools: ' }}{%- for tool in tools %}{{- tool | string ~ '\\n' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in rest %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {% generation %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}{%- endif %}
"""


def smollm3(messages: Messages, tools: Any) -> Pieces:
    from datetime import datetime

    system, rest = system_first(messages)
    yield f"<|im_start|>system\nToday: {datetime.now():%d %B %Y}\n{system or ''}", False
    yield "\nTools: " + "".join(f"{tool}\n" for tool in tools) if tools else "", False
    yield "<|im_end|>\n", False
    for m in rest:
        ours = m["role"] == "assistant"
        yield f"<|im_start|>{m['role']}\n" + "<think>\n\n</think>\n" * ours, False
        yield (m["content"].lstrip("\n") if ours else m["content"]) + "<|im_end|>", ours and plain(m)
        yield "\n", False


# --- Qwen 3: the reasoning of turns before the last question is removed, the last answer always has some

QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def qwen3(messages: Messages, tools: Any) -> Pieces:
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        yield f"<|im_start|>{m['role']}\n", False
        if m["role"] != "assistant":
            yield m["content"] + "<|im_end|>\n", False
            continue
        reasoning, content = m.get("reasoning_content") or "", m["content"]
        if "</think>" in content:
            reasoning, content = content.replace("<think>", "").split("</think>")
        reasoning, answer = reasoning.strip("\n"), content.lstrip("\n")
        if i > last and (reasoning or i == len(messages) - 1):
            yield f"<think>\n{reasoning}\n</think>\n\n{answer}<|im_end|>", not m.get("tool_calls")
        else:  # what the assistant said is not shown if its reasoning is removed
            content = answer if "</think>" in m["content"] else content
            yield content + "<|im_end|>", not reasoning and not m.get("tool_calls")
        yield "\n", False


# --- DeepSeek R1: all reasoning is removed, and the prompt opens some

R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)


def r1(messages: Messages, tools: Any) -> Pieces:
    yield "<s>", False
    for m in messages:
        if m["role"] == "user":
            yield f"<|User|>{m['content']}", False
        elif m["role"] == "assistant":
            yield "<|Assistant|>", False
            whole = "</think>" not in m["content"] and plain(m)
            yield m["content"].split("</think>")[-1] + "</s>", whole
        else:
            yield m["content"], False


FAMILIES = {
    "qwen": Family(QWEN, qwen, None, "<|im_end|>"),
    "chatml": headed("<|im_start|>", "\n", "<|im_end|>", "\n"),
    "chatml-tagged": headed("<|im_start|>", "\n", "<|im_end|>", "\n", tags="all"),
    "chatml-tagged-content": headed("<|im_start|>", "\n", "<|im_end|>", "\n", tags="content"),
    "llama2": Family(LLAMA2, llama2, "<s>", "</s>"),
    "llama3": headed("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "", bos="<s>", strip=True),
    "llama3-tagged": headed(
        "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "", bos="<s>", strip=True, tags="all"
    ),
    "gemma": Family(GEMMA, gemma, "<bos>", "<eos>"),
    "phi3": Family(PHI3, phi3, "<s>", "<|endoftext|>"),
    "mistral": Family(MISTRAL, mistral, "<s>", "</s>"),
    "zephyr": Family(ZEPHYR, zephyr, "<s>", "</s>"),
    "stablelm": headed("<|", "|>\n", "<|endoftext|>", "\n"),
    "granite": headed("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "\n"),
    "olmo": Family(OLMO, olmo, "<|endoftext|>", "<|endoftext|>"),
    "smollm3": Family(SMOLLM3, smollm3, None, "<|im_end|>"),
    "qwen3": Family(QWEN3, qwen3, None, "<|im_end|>"),
    "r1": Family(R1, r1, "<s>", "</s>"),
}
SPECIAL = sorted(
    {"<s>", "</s>", "<bos>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end|>",
     "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
     "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"}
)  # fmt: skip


def says(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(*contents: str, system: str | None = None) -> Messages:
    turns = [says("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return turns if system is None else [says("system", system), *turns]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather <today>.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "Oslo"]}}, "required": ["city"]}}},
]  # fmt: skip
CONVERSATIONS: dict[str, tuple[Messages, Any]] = {
    "one turn": (talk("Who?", "Me."), None),
    "a system prompt": (talk("Who?", "Me.", system="Be brief."), None),
    "an empty system prompt": (talk("Who?", "Me.", system=""), None),
    "three turns": (talk("Who?", "Me.", "And?", "You.", "Then?", "All of us."), None),
    "three turns, a system prompt": (talk("a", "b", "c", "d", "e", "f", system="The cat and the dog."), None),
    "the same answer again": (talk("yes", "yes", "yes", "yes", "no", "yes"), None),
    "the answer in the question": (talk("Say assistant.", "assistant", "Say user.", "user"), None),
    "unicode": (talk("Wie heißt 你好?", "🙂 Grüße, 世界", "e\u0301?", "👩‍👩‍👧 ok"), None),
    "an emoji alone": (talk("🙂", "🙂", "🙂", "🙂"), None),
    "an empty answer": (talk("Say nothing.", "", "Now?", "Now."), None),
    "an empty last answer": (talk("Say.", "Now.", "Say nothing.", ""), None),
    "an empty question": (talk("", "Yes?"), None),
    "spaces around": (talk("  a ", "  b  ", " c\n", "\td \n"), None),
    "blank lines around": (talk("\n\na\n\n", "\n\nb\n\n", "c", "\nd\n"), None),
    "blanks alone": (talk("a", "  ", "b", " \n "), None),
    "lines and code": (talk("Code?", "```py\nfor i in x:\n    i()\n```\n\nDone.", "ok", "{{ no }} {% raw %}"), None),
    "a question last": (talk("a", "b", "c"), None),
    "reasoning": (talk("2+2?", "<think>\nAdd.\n</think>\n\n4", "3+3?", "<think>\nAdd again.\n</think>\n\n6"), None),
    "reasoning apart": (
        [says("user", "2+2?"), says("assistant", "4", reasoning_content="Add."), says("user", "Sure?"),
         says("assistant", "Yes.", reasoning_content="Check.")],
        None,
    ),
    "tools": (
        [says("user", "Weather?"), says("assistant", "Let me see.", tool_calls=[call("weather", city="Köln")]),
         says("tool", "12 °C"), says("assistant", "Twelve degrees.")],
        TOOLS,
    ),
    "two calls, a system prompt": (
        [says("system", "Use tools."), says("user", "Both?"),
         says("assistant", "", tool_calls=[call("weather", city="Köln"), call("weather", city="Oslo")]),
         says("tool", "12"), says("tool", "3"), says("assistant", "12 and 3."), says("user", "Thanks"),
         says("assistant", "Bye")],
        TOOLS,
    ),
    "nulls": (
        [says("user", "a", name=None), says("assistant", "b", tool_calls=None, reasoning_content=None)],
        None,
    ),
}  # fmt: skip
