"""Prompt styles of models that were published without a chat template, by name; an entry here is a new one.

Each is a Jinja template over the messages of a conversation, as its model card has it. It renders the user's turns up
to where the answer begins, and closes an answer with `eos_token`. BOS is what the tokenizer adds.
"""


def turns(user: str, answer: str, system: str = "{{ m.content + '\\n\\n' }}", opening: str = "") -> str:
    """Return the template of a style, from the templates of a turn `m` of each role.

    Args:
        opening: stands before conversations that have no system message.
    """
    begin = "{% if not messages or messages[0].role != 'system' %}" + opening + "{% endif %}" if opening else ""
    return (
        begin + "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% elif m.role == 'system' %}"
        + system + "{% else %}" + user + "{% endif %}{% endfor %}"
    )  # fmt: skip


ANSWER, SPACED = "{{ m.content + eos_token }}", "{{ ' ' + m.content + eos_token }}"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)

STYLES = {
    # lmsys/vicuna-7b-v1.1 and later
    "vicuna": turns(
        "{{ 'USER: ' + m.content + ' ASSISTANT:' }}", SPACED, "{{ m.content + ' ' }}", '{{ "' + VICUNA + '" }}'
    ),
    # togethercomputer/RedPajama-INCITE-7B-Chat
    "redpajama-incite": turns("{{ '<human>: ' + m.content + '\\n<bot>:' }}", SPACED),
    # stabilityai/stablelm-tuned-alpha-7b
    "stablelm-alpha": turns("{{ '<|USER|>' + m.content + '<|ASSISTANT|>' }}", ANSWER, "{{ '<|SYSTEM|>' + m.content }}"),
    # stabilityai/StableBeluga-7B
    "stable-beluga": turns(
        "{{ '### User:\\n' + m.content + '\\n\\n### Assistant:\\n' }}",
        ANSWER,
        "{{ '### System:\\n' + m.content + '\\n\\n' }}",
    ),
    # OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5
    "open-assistant": turns("{{ '<|prompter|>' + m.content + eos_token + '<|assistant|>' }}", ANSWER),
    # h2oai/h2ogpt-gm-oasst1-en-2048-falcon-7b-v3
    "h2ogpt": turns("{{ '<|prompt|>' + m.content + eos_token + '<|answer|>' }}", ANSWER),
    # microsoft/phi-2
    "phi-2": turns("{{ 'Instruct: ' + m.content + '\\nOutput:' }}", SPACED),
}
