"""Chat templates of the structure that the families of 2025 and 2026 have, beside what each writes; see
helpers.chat_templates."""

import json
from typing import Any

from helpers.chat_templates import Family, Messages, Pieces, plain, system_first

# --- an opening and a closing for each role

BRACKETED = """
{{- BOS }}
{%- set open = OPEN %}{%- set close = CLOSE %}
{%- for m in messages %}
    {%- if m.role not in open %}{{- raise_exception('unknown role') }}{%- endif %}
    {{- open[m.role] }}{{- m.content STRIP }}{{- close[m.role] }}
{%- endfor %}
{%- if add_generation_prompt %}{{- PROMPT }}{%- endif %}
"""


def bracketed(bos: str | None, eos: str, prompt: str = "", strip: bool = False, **roles: tuple[str, str]) -> Family:
    """`prompt`: what generation begins after, if not the assistant's opening alone."""
    opens, closes = ({role: pair[i] for role, pair in roles.items()} for i in (0, 1))
    words = {
        "BOS": "bos_token" if bos else "''", "OPEN": json.dumps(opens), "CLOSE": json.dumps(closes),
        "STRIP": "| trim" if strip else "", "PROMPT": json.dumps(prompt or opens["assistant"]),
    }  # fmt: skip
    source = BRACKETED
    for word, text in words.items():
        source = source.replace(f" {word} ", f" {text} ")

    def pieces(messages: Messages, tools: Any) -> Pieces:
        yield bos or "", False
        for m in messages:
            ours, close = m["role"] == "assistant", closes[m["role"]]
            content = m["content"].strip() if strip else m["content"]
            begun = prompt.removeprefix(opens["assistant"]) if ours else ""  # of the content, by the prompt
            begun = begun if content.startswith(begun) else ""
            yield opens[m["role"]] + begun, False
            yield content.removeprefix(begun) + close.rstrip("\n"), ours and plain(m)
            yield "\n" * close.endswith("\n"), False

    return Family(source, pieces, bos, eos)


def command(role: str) -> tuple[str, str]:
    return f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>", "<|END_OF_TURN_TOKEN|>"


# --- gpt-oss: channels, the reasoning of earlier answers is removed, the last message ends by a token of its own

GPT_OSS = """
{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role == 'system' %}
    {{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}
    {%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- for m in rest %}
    {%- if m.role == 'assistant' %}
        {%- if m.tool_calls %}
            {{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}
            {{- '<|channel|>commentary json<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
        {%- else %}
            {%- if loop.last and m.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
            {{- '<|return|>' if loop.last else '<|end|>' }}
        {%- endif %}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
    {%- else %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""


def gpt_oss(messages: Messages, tools: Any) -> Pieces:
    from datetime import datetime

    system, rest = system_first(messages)
    yield f"<|start|>system<|message|>Date: {datetime.now():%Y-%m-%d}<|end|>", False
    if system is not None:
        yield f"<|start|>developer<|message|># Instructions\n\n{system}<|end|>", False
    for i, m in enumerate(rest):
        last, thinking = i + 1 == len(rest), m.get("reasoning_content")
        if m["role"] == "tool":
            said = json.dumps(m["content"], ensure_ascii=False)
            yield f"<|start|>functions to=assistant<|channel|>commentary<|message|>{said}<|end|>", False
        elif m["role"] != "assistant":
            yield f"<|start|>user<|message|>{m['content']}<|end|>", False
        elif m.get("tool_calls"):
            # one call alone, and nothing of what is said beside it
            function, whole = m["tool_calls"][0]["function"], len(m["tool_calls"]) == 1 and not m["content"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            yield "<|start|>assistant", False
            yield f" to=functions.{function['name']}<|channel|>commentary json<|message|>{arguments}<|call|>", whole
        else:
            yield "<|start|>assistant", False
            if last and thinking:
                yield f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant", True
            whole = last or not thinking
            yield f"<|channel|>final<|message|>{m['content']}", whole
            # an answer in the midst ends as no answer does that is generated
            yield "<|return|>" if last else "<|end|>", last


# --- GLM 4.5: an answer ends where the next turn begins, and the reasoning of earlier answers is removed

GLM_4_5 = """
{{- '[gMASK]<sop>' }}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set reasoning = m.reasoning_content or '' %}{%- set content = m.content %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|assistant|>' }}
        {%- if loop.index0 > ns.last and reasoning %}{{- '\n<think>' + reasoning | trim + '</think>' }}
        {%- else %}{{- '\n<think></think>' }}{%- endif %}
        {%- if content | trim %}{{- '\n' + content | trim }}{%- endif %}
    {%- elif m.role == 'tool' %}{{- '<|observation|>\n' + m.content }}
    {%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""


def glm_4_5(messages: Messages, tools: Any) -> Pieces:
    yield "[gMASK]<sop>", False
    taught = False  # whether the answer before was: a user's opening ends it
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        if m["role"] != "assistant":
            yield f"<|{'observation' if m['role'] == 'tool' else m['role']}|>", taught and m["role"] == "user"
            yield f"\n{m['content']}", False
            taught = False
            continue
        reasoning, content = m.get("reasoning_content") or "", m["content"]
        if not reasoning and "</think>" in content:
            reasoning, content = content.replace("<think>", "").split("</think>")
        kept = reasoning.strip() if i > last else ""
        taught = whole = not m.get("tool_calls") and kept == reasoning.strip()
        yield "<|assistant|>", False
        yield f"\n<think>{kept}</think>" + f"\n{content.strip()}" * bool(content.strip()), whole


# --- Qwen 3.5: everything trimmed, an answer to the last question reasons, calls in tags

QWEN_3_5 = """
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools>' }}
    {%- if messages[0].role == 'system' and messages[0].content %}{{- '\n\n' + messages[0].content | trim }}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content | trim + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content | trim %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set reasoning = m.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] | trim %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n' + reasoning | trim + '\n</think>\n\n' }}{%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n\n' if loop.first and content else '\n' if not loop.first }}
            {{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
            {%- for name, value in call.function.arguments | items %}
                {{- '<parameter=' + name + '>\n' + value + '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}
"""


def tagged(calls: list[dict[str, Any]]) -> str:
    written = []
    for call in calls:
        items = call["function"]["arguments"].items()
        parameters = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in items)
        written.append(f"<tool_call>\n<function={call['function']['name']}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(written)


def qwen_3_5(messages: Messages, tools: Any) -> Pieces:
    system, rest = system_first(messages)
    if tools:
        listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        after = f"\n\n{system.strip()}" if system else ""
        yield f"<|im_start|>system\n# Tools\n\n<tools>{listed}\n</tools>{after}<|im_end|>\n", False
    elif system is not None:
        yield f"<|im_start|>system\n{system.strip()}<|im_end|>\n", False
    last = max(i for i, m in enumerate(rest) if m["role"] == "user")
    for i, m in enumerate(rest):
        if m["role"] == "user":
            yield f"<|im_start|>user\n{m['content'].strip()}<|im_end|>\n", False
        elif m["role"] == "tool":
            around = [not 0 <= j < len(rest) or rest[j]["role"] != "tool" for j in (i - 1, i + 1)]
            yield "<|im_start|>user" * around[0] + f"\n<tool_response>\n{m['content'].strip()}\n</tool_response>", False
            yield "<|im_end|>\n" * around[1], False
        else:
            reasoning, content = m.get("reasoning_content") or "", m["content"].strip()
            if not reasoning and "</think>" in content:
                reasoning, content = content.replace("<think>", "").split("</think>")
            answer = "\n\n".join(filter(None, (content.strip(), tagged(m.get("tool_calls") or []))))
            yield "<|im_start|>assistant\n" + "<think>\n" * (i > last), False
            if i > last:  # the prompt has begun to reason
                yield f"{reasoning.strip()}\n</think>\n\n{answer}<|im_end|>", True
            else:
                yield f"{answer}<|im_end|>", not reasoning and plain(m)
            yield "\n", False


NEWER = {
    "llama4": bracketed(
        "<|begin_of_text|>", "<|eot|>", strip=True,
        **{role: (f"<|header_start|>{role}<|header_end|>\n\n", "<|eot|>") for role in ("system", "user", "assistant")},
    ),
    "lfm2": bracketed(
        "<|startoftext|>", "<|im_end|>",
        **{role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")},
    ),
    "tekken": bracketed(
        "<s>", "</s>", system=("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), user=("[INST]", "[/INST]"),
        assistant=("", "</s>"),
    ),
    "command-r": bracketed(
        "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", strip=True, system=command("SYSTEM"), user=command("USER"),
        assistant=command("CHATBOT"),
    ),
    "gemma4": bracketed(
        "<bos>", "<turn|>", prompt="<|turn>model\n<|channel>thought\n<channel|>", strip=True,
        system=("<|turn>system\n", "<turn|>\n"), user=("<|turn>user\n", "<turn|>\n"),
        assistant=("<|turn>model\n", "<turn|>\n"),
    ),
    "nemotron3": bracketed(
        None, "<|im_end|>", prompt="<|im_start|>assistant\n<think></think>",
        system=("<|im_start|>system\n", "<|im_end|>\n"), user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n<think></think>", "<|im_end|>\n"),
    ),
    "deepseek-v3.1": bracketed(
        "<s>", "</s>", system=("", ""), user=("<|User|>", ""), assistant=("<|Assistant|></think>", "</s>")
    ),
    "ernie": bracketed(
        "<s>", "<|end_of_sentence|>", system=("", "\n"), user=("User: ", "\n"),
        assistant=("Assistant: ", "<|end_of_sentence|>"),
    ),
    "minimax-m2": bracketed(
        "]~!b[", "[e~[", prompt="]~b]ai\n<think>\n", system=("]~b]system\n", "[e~[\n"), user=("]~b]user\n", "[e~[\n"),
        assistant=("]~b]ai\n", "[e~[\n"),
    ),
    "seed-oss": bracketed(
        None, "<seed:eos>",
        **{role: (f"<seed:bos>{role}\n", "<seed:eos>") for role in ("system", "user", "assistant")},
    ),
    "apertus": bracketed(
        "<s>", "<|assistant_end|>",
        **{role: (f"<|{role}_start|>", f"<|{role}_end|>") for role in ("system", "user", "assistant")},
    ),
    "gpt-oss": Family(GPT_OSS, gpt_oss, None, "<|return|>"),
    "glm4.5": Family(GLM_4_5, glm_4_5, None, "<|endoftext|>"),
    "qwen3.5": Family(QWEN_3_5, qwen_3_5, None, "<|im_end|>"),
}  # fmt: skip
NEWER_SPECIAL = [
    "<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|startoftext|>", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>",
    "<|end_of_sentence|>", "]~!b[", "]~b]", "[e~[", "<seed:bos>", "<seed:eos>", "<|start|>", "<|message|>",
    "<|channel|>", "<|return|>", "<|call|>", "[gMASK]", "<sop>", "<|observation|>", "<tool_call>", "</tool_call>",
    *(f"<|{role}_{end}|>" for role in ("system", "user", "assistant") for end in ("start", "end")),
]  # fmt: skip
