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
            ours = config_from_hf(fields)
        except UserError as error:
            assert "needs the field" in str(error), (left_out, str(error))
            continue
        filled = AutoConfig.for_model(**fields).to_dict()
        assert asdict(ours) == asdict(config_from_hf(filled)), left_out
