"""The table of lit_gpt/families/README.md: `PYTHONPATH=.:tests python -m helpers.family_table` writes it anew."""

from collections import Counter
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_gpt.families.registry import config_from_hf, config_from_name, families
from lit_gpt.model.config import Config

PAGE = Path(__file__).parents[2] / "lit_gpt" / "families" / "README.md"
BEGIN = "<!-- tests/helpers/family_table.py writes what follows -->\n"
# What every model has, as large as it is.
SIZES = {
    "name", "family", "n_layer", "n_head", "n_embd", "vocab_size", "block_size", "padded_vocab_size", "head_size",
    "intermediate_size", "n_query_groups", "norm_eps", "rope_base",
}  # fmt: skip
FEW = 3  # an option that no more families use is named


def short_name(family: ModuleType) -> str:
    return family.__name__.rpartition(".")[2]


def default(field: Field[Any]) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]


def options(family: ModuleType) -> set[str]:
    """Return the options of Config that the family's layouts and published sizes use, with the word of each choice."""
    found = set()
    configs = [config_from_hf(hf.to_dict()) for hf in family.tiny_hf().values()]
    for config in configs + [config_from_name(name) for name in family.PRESETS]:
        for field in fields(Config):
            value = getattr(config, field.name)
            if field.name == "mixers":
                found |= {f"`{name}`" for kind in value for name in kind.split("+")} - {"`attention`"}
            elif field.name == "rope_scaling":
                found |= {f"`{value['rope_type']}` rope"} if value else set()
            elif field.name not in SIZES and value != default(field):
                found.add(f"`{value}`" if isinstance(value, str) and value else f"`{field.name}`")
    return found


def table() -> str:
    """Return the rows, one for each family."""
    used = {short_name(family): options(family) for family in families()}
    users = Counter(option for own in used.values() for option in own)
    rows = ["| file | lines | ideas that few share |", "|---|---|---|"]
    for name, own in used.items():
        lines = len((PAGE.parent / f"{name}.py").read_text(encoding="utf-8").splitlines())
        few = sorted((o for o in own if users[o] <= FEW), key=lambda option: (users[option], option))
        rows.append(f"| {name}.py | {round(lines, -1)} | {', '.join(few) or 'none'} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(BEGIN)[0] + BEGIN + table(), encoding="utf-8")
