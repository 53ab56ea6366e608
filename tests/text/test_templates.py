"""Chat templates against transformers: the same tokens, the assistant's turns supervised, and no code of theirs run."""

import json
import shutil
from pathlib import Path

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Tokens
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.chat_templates import CONVERSATIONS, Family, talk
from helpers.chat_templates import FAMILIES as FIRST
from helpers.chat_templates import SPECIAL as FIRST_SPECIAL
from helpers.newer_templates import NEWER, NEWER_SPECIAL
from lit_gpt import Tokenizer
from lit_gpt.errors import UserError
from lit_gpt.text.prompt_style import PromptStyle

FAMILIES = FIRST | NEWER
SPECIAL = [*FIRST_SPECIAL, *NEWER_SPECIAL]


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """A byte-level BPE that joins blanks with the words and lines around them, as those of the families do."""
    tokens = Tokens(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [m["content"] for messages, _ in CONVERSATIONS.values() for m in messages]
    tokens.train_from_iterator(texts * 3 + ["user assistant system\n\n", "<|user|>\n", ".\n\n"] * 9, trainer)
    tokens.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokens


def save(tokens: Tokens, family: Family, folder: Path):
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=family.bos, eos_token=family.eos)
    theirs.chat_template = family.template
    theirs.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tokens, tmp_path_factory):
    """A family, its tokenizer in transformers, and ours with its prompt style."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save(tokens, FAMILIES[request.param], folder)
    ours = Tokenizer(folder)
    return FAMILIES[request.param], theirs, ours, PromptStyle.from_name("checkpoint", ours)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_and_mask(case, name):
    """Ids equal transformers'; learnt is what the family's own pieces say, and nothing else."""
    family, theirs, ours, style = case
    messages, tools = CONVERSATIONS[name]
    try:
        expected = theirs.apply_chat_template(messages, tools=tools, return_dict=False)
    except TemplateError:
        with pytest.raises(UserError, match="the template failed"):
            style.encode_sample(messages, ours, tools)
        return
    sample = style.encode_sample(messages, ours, tools)
    assert sample.ids == expected
    pieces = list(family.pieces(messages, tools))
    text = "".join(piece for piece, _ in pieces)
    assert text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    wanted = [taught for piece, taught in pieces for _ in piece]
    places = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert sample.supervised == [any(wanted[a:b]) for a, b in places], marked(theirs, sample)
    for end in (places[answer.stop - 1][1] for answer in sample.answers if sample.supervised[answer.stop - 1]):
        # each ends with its end token, if it is shown with one that is generated
        assert (
            any(text[:end].endswith(token) for token in SPECIAL) or text[end:].startswith("<|end|>") or end == len(text)
        )


def marked(tokenizer, sample) -> str:
    places = zip(sample.ids, sample.supervised, strict=True)
    return "|".join(tokenizer.decode([i]) + "*" * supervised for i, supervised in places)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts(case, name):
    """What is generated from equals transformers', and precedes the answer in training too, or the audit counts it."""
    family, theirs, ours, style = case
    messages, tools = CONVERSATIONS[name]
    try:
        sample = style.encode_sample(messages, ours, tools)
    except UserError:
        return
    shown = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i in shown:
        expected = theirs.apply_chat_template(messages[:i], tools=tools, add_generation_prompt=True, return_dict=False)
        assert style.encode_prompt(messages[:i], ours, tools) == expected
    if not sample.not_verbatim:
        for i, answer in zip(shown, sample.answers, strict=True):
            same = style.encode_prompt(messages[:i], ours, tools) == sample.ids[: answer.start]
            assert answer.prompt_mismatch != same


@pytest.mark.parametrize("name", ["chatml-tagged", "llama3-tagged"])
def test_tags_as_transformers_reads_them(tokens, tmp_path, name):
    theirs = save(tokens, FAMILIES[name], tmp_path)
    ours = Tokenizer(tmp_path)
    style = PromptStyle.from_name("checkpoint", ours)
    for messages, _ in (CONVERSATIONS[c] for c in ("three turns", "unicode", "an empty answer", "spaces around")):
        found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert style.encode_sample(messages, ours).supervised == [bool(taught) for taught in found["assistant_masks"]]


def test_turns_that_are_not_to_be_learnt(tokens, tmp_path):
    """`train` and `weight` of a message; a tagged template keeps a part of a turn from being learnt."""
    save(tokens, FAMILIES["chatml"], tmp_path)
    ours = Tokenizer(tmp_path)
    style = PromptStyle.from_name("checkpoint", ours)
    messages = talk("a", "first", "b", "second", "c", "third")
    messages[1]["train"], messages[3]["weight"] = False, 0
    sample = style.encode_sample(messages, ours)
    learnt = [i for i, taught in zip(sample.ids, sample.supervised, strict=True) if taught]
    assert ours.decode(learnt, skip_special_tokens=False) == "third<|im_end|>"
    assert sample.ids == style.encode_sample(talk("a", "first", "b", "second", "c", "third"), ours).ids


def test_named_templates(tokens, tmp_path):
    """A list of templates, or files: the one for tools where there are tools, as in transformers."""
    chat, tools = CONVERSATIONS["tools"]
    family = FAMILIES["qwen"]._replace(
        template={"default": FAMILIES["chatml"].template, "tool_use": FAMILIES["qwen"].template}
    )
    theirs = save(tokens, family, tmp_path)
    files = sorted(path.name for path in tmp_path.rglob("*.jinja"))
    assert files == ["chat_template.jinja", "tool_use.jinja"]

    def check() -> None:
        ours = Tokenizer(tmp_path)
        style = PromptStyle.from_name("checkpoint", ours)
        style = PromptStyle.from_dict(json.loads(json.dumps(style.to_dict())))
        for given in (tools, None):
            expected = theirs.apply_chat_template(chat[:1], tools=given, add_generation_prompt=True, return_dict=False)
            assert style.encode_prompt(chat[:1], ours, given) == expected
        assert style.encode_prompt(chat[:1], ours, tools) != style.encode_prompt(chat[:1], ours)

    check()
    for path in list(tmp_path.rglob("*.jinja")):
        path.unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": text} for name, text in family.template.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    check()


def test_functions_of_templates_equal_transformers(tokens, tmp_path):
    source = """
{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ tools | tojson(sort_keys=true, separators=(',', ':')) }}
{{ messages[0].content | tojson(ensure_ascii=true) }}{{ strftime_now('%Y') }}
  {% for i in range(9) %}
    {% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}
    {{ i }}
  {% endfor %}
{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}
{{ ns.n }}{{ dict(a=1) }}{{ bos_token is defined }}{{ pad_token }}{{ unknown }}{{ messages[0].reasoning_content }}
"""
    theirs = save(tokens, Family(source, None, "<s>", "</s>"), tmp_path)
    ours = Tokenizer(tmp_path)
    style = PromptStyle("x", ours.chat_template, template_writes_bos=True)
    messages = [{"role": "user", "content": "Grüße <b> & 'q'", "reasoning": "why", "name": None}]
    tools = [{"b": 1, "a": ["x"]}]
    assert style.render(messages, ours, tools=tools) == theirs.apply_chat_template(
        messages, tools=tools, tokenize=False
    )


ATTACKS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ cycler.__init__.__globals__.os.system('touch HERE') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ messages.append(1) }}",
    "{% set _ = messages.pop() %}",
    "{{ messages[0].update({'role': 'assistant'}) }}",
    "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
    "{{ namespace(__call__=1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_a_template_is_refused(llama, tmp_path, monkeypatch, attack):
    """By one line, whatever the template does; nothing is written, and the messages stay as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_gpt.text.chat_template.MAX_STEPS", 20_000)
    ours = Tokenizer(llama)
    messages = talk("a", "b")
    with pytest.raises(UserError, match="the template failed: .+"):
        PromptStyle("x", attack, template_writes_bos=False).render(messages, ours)
    assert messages == talk("a", "b") and not list(tmp_path.iterdir())


def test_a_bad_template_ends_the_script_with_one_line(cli, llama, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ ''.__class__ }}")
    flags = {"checkpoint_dir": llama, "prompt": "a", "prompt_style": tmp_path / "t.jinja"}
    cli("generate/base.py", **flags).refused("t.jinja", "'__class__'", "not allowed")


def test_the_end_of_a_turn_stops_though_reasoning_comes_first(tokens, tmp_path):
    """The token that closes an answer, not one that the template opens it with."""
    save(tokens, FAMILIES["qwen3"]._replace(eos="<|endoftext|>"), tmp_path)
    ours = Tokenizer(tmp_path)
    ends = [ours.token_id("<|endoftext|>"), ours.token_id("<|im_end|>")]
    assert list(PromptStyle.from_checkpoint(tmp_path, ours).stop_ids) == ends


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama2"])
@pytest.mark.parametrize("bos", [False, True])
def test_styles_go_along_to_transformers(tokens, tmp_path, name, bos):
    """A style by another name than the checkpoint's own: as a chat template it gives transformers the same tokens."""
    from tokenizers.processors import TemplateProcessing

    tokens = Tokens.from_str(tokens.to_str())
    if bos:
        begin = [("<s>", tokens.token_to_id("<s>"))]
        tokens.post_processor = TemplateProcessing(single="<s> $A", special_tokens=begin)
    theirs = save(tokens, Family(None, None, "<s>", "</s>"), tmp_path)
    ours = Tokenizer(tmp_path)
    style = PromptStyle.from_name(name, ours)
    theirs.chat_template = style.for_others(ours)
    for messages in (talk("a", "b", "c"), talk("a", system="Be brief.")):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert style.encode_prompt(messages, ours) == expected and (expected[0] == ours.bos_id) == bos


def test_export_carries_the_style_that_was_trained(cli, llama, tmp_path):
    """transformers' tokenizer of the exported folder makes our tokens, and its generation ends where ours does."""
    folder, out = tmp_path / "tuned", tmp_path / "hf"
    shutil.copytree(llama, folder)
    ours = Tokenizer(folder)
    style = PromptStyle.from_name("chatml", ours)
    style.save(folder)
    assert cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=folder, out_dir=out).code == 0
    messages = talk("the cat?", "the dog", "and?", system="Be brief.")
    theirs = AutoTokenizer.from_pretrained(out)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert PromptStyle.from_checkpoint(folder, ours).encode_prompt(messages, ours) == expected
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert set(style.stop_ids) <= set(ends if isinstance(ends, list) else [ends])
