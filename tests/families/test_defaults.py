"""Fields that a config.json leaves out have the values that transformers gives them."""

from dataclasses import asdict

import pytest
from transformers import AutoConfig

from helpers.tiny_models import LAYOUTS
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf, families

SAYS_WHICH = {"model_type", "transformers_version"}


def layout_config(family: str, layout: str):
    return next(f for f in families() if f.__name__.endswith("." + family)).tiny_hf()[layout]


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_a_field_left_out_is_transformers_default(layout):
    """Whichever it is; one without which the family cannot be is refused by name."""
    theirs = layout_config(*layout)
    whole = theirs.to_dict()
    for left_out in sorted(whole.keys() - SAYS_WHICH):
        fields = {name: value for name, value in whole.items() if name != left_out}
        try:
            filled = AutoConfig.for_model(**fields).to_dict()
        except Exception:  # of all kinds: the default does not go with a tiny model's other sizes
            continue
        ours = outcome(fields)
        if not isinstance(ours, str) or "needs the field" not in ours:
            assert ours == outcome(filled), left_out


def outcome(fields: dict) -> dict | str:
    """Return the fields of the Config, or why there is none: not every default goes with a tiny model's heads."""
    try:
        return asdict(config_from_hf(fields))
    except UserError as error:
        return str(error)
