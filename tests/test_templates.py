"""Chat templates against transformers: the same tokens, the assistant's turns supervised, and no code of theirs run."""

from pathlib import Path

import pytest
from chat_templates import CONVERSATIONS, FAMILIES, SPECIAL, Family
from jinja2 import TemplateError
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Tokens
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_gpt import Tokenizer
from lit_gpt.errors import UserError
from lit_gpt.prompts import PromptStyle


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
    assert sample.learnt == [any(wanted[a:b]) for a, b in places], marked(theirs, sample)
    for end in (places[answer.stop - 1][1] for answer in sample.answers if sample.learnt[answer.stop - 1]):
        assert any(text[:end].endswith(token) for token in SPECIAL)  # each ends with its end token


def marked(tokenizer, sample) -> str:
    return "|".join(tokenizer.decode([i]) + "*" * taught for i, taught in zip(sample.ids, sample.learnt, strict=True))


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
    if not sample.rewritten:
        for i, answer in zip(shown, sample.answers, strict=True):
            same = style.encode_prompt(messages[:i], ours, tools) == sample.ids[: answer.start]
            assert answer.displaced != same
