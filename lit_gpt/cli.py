"""Reads command lines: a script's annotated constants, and the groups of arguments that `main` takes, are its flags.

    learning_rate: PositiveFloat = 3e-4  # Set the peak learning rate, reached after warmup_steps.

gives `--learning_rate` with that type, default and help, whether it stands at the top of a script or in a dataclass.
A script's `main` names the dataclasses that it wants (`def main(args: TrainArgs) -> None`); their fields become flags
too, listed by group. A constant of the script that has the name of such a field gives its default. All other constants
of the script hold the values of the command line when `main` runs. Nothing here imports torch: `--help` answers at
once.
"""

import dataclasses
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import tokenize
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from lit_gpt import habits
from lit_gpt.errors import UsageError, UserError

if TYPE_CHECKING:
    Fraction = float
else:  # a fraction of which something must be left: dropout, validation splits
    Fraction = restricted_number_type("Fraction", float, [(">=", 0.0), ("<", 1.0)])
# Kinds of devices, see lit_gpt.hardware.choose_device.
Device = Literal["auto", "cpu", "cuda", "mps"]
# What `--help` says of a flag without a comment, by its type.
HELP = {Device: "Run on this (auto: a GPU if there is one, else the CPU); mps is that of Apple's chips."}
# The formats of lit_gpt/quantization/formats.py.
Quantizer = Literal["int8", "int4", "nf4", "nf4-dq"]
# What lit_gpt/training/memory/activation_checkpointing.py can keep for the backward pass.
Checkpointing = Literal["auto", "none", "selective", "full", "offload"]

EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    PositiveInt: "a whole number above 0",
    NonNegativeInt: "a whole number, 0 or more",
    PositiveFloat: "a number above 0",
    NonNegativeFloat: "a number, 0 or more",
    ClosedUnitInterval: "a number from 0 to 1",
    Fraction: "a number from 0 up to, not including, 1",
}

# What takes memory outside of a finetune, by the flags that say how much.
SIZES = ("batch_size", "batch_tokens", "calibration_tokens", "window", "context", "max_new_tokens")


def tune_torch() -> None:
    """Set what torch reads when it is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages, measured 5 % faster in training
    # packed rows of ever new lengths make new matrix kernels, 60 of half a megabyte each; by default 1000 are kept
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "160")
    # cuDNN's attention builds a plan for each new length, a good part of a second each; untried on a GPU so far
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    # where a browser is open, a thread of OpenMP that spins while it waits keeps the core from what it waits for
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # rows of ever new lengths near the limit would fragment CUDA's memory; untried on a GPU so far
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def run(
    main: Callable[..., None],
    groups: Callable[[], tuple[type, ...]] | None = None,
    aliases: dict[str, str] | None = None,
) -> None:
    """Parse the command line and call `main` with its groups of arguments.

    Args:
        main: the script's main function; the script's annotated constants take the values of their flags.
        groups: gives the dataclasses for the parameters of `main`, in their order. None: those that `main` annotates.
        aliases: {old spelling of a flag: the flag}; old spellings are taken and not listed.

    Exits with 0 when done, 2 on wrong usage and 1 on failure, the last two with one line on stderr.
    """
    tune_torch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    values: dict[str, Any] = {}
    try:
        types = groups() if groups else annotated_groups(main)
        values = parse(main.__globals__, sys.argv[1:], types, aliases)
        main.__globals__.update({name: values[name] for name in own_constants(main.__globals__)})
        main(*(build(group, values) for group in types))
    except UserError as error:
        fail(str(error), error.exit_code)
    except MemoryError as error:
        fail(out_of_memory(str(error), values), 1)
    except RuntimeError as error:
        on_cpu = re.search(r"DefaultCPUAllocator: .* (\d+) bytes|std::bad_alloc", str(error))  # of no class of its own
        if type(error).__name__ != "OutOfMemoryError" and not on_cpu:  # of torch, which need not be imported
            raise
        wanted = on_cpu and on_cpu[1] and f"tried to allocate {int(on_cpu[1]) / 1e6:,.0f} MB"
        fail(out_of_memory(wanted or str(error), values), 1)
    except BrokenPipeError:  # the reader of our stdout has gone (`| head`): nobody is left to tell
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that cannot be written: the user's to mend
        if error.strerror is None:
            raise
        path = error.filename2 or error.filename  # of two, the one that is written
        fail(f"{path}: {error.strerror}" if path else error.strerror, 1)
    except KeyboardInterrupt:
        fail("interrupted", 128 + signal.SIGINT)


def annotated_groups(main: Callable[..., None]) -> tuple[type, ...]:
    """Return the dataclasses of arguments that a script's main function annotates its parameters with."""
    types = get_type_hints(main)
    return tuple(types[name] for name in inspect.signature(main).parameters)


def peek(name: str, default: str) -> str:
    """Return the value of a flag that decides which other flags there are, before the command line is parsed."""
    given = [value for flag, value in pairwise(sys.argv) if flag == f"--{name}"]
    given += [a.partition("=")[2] for a in sys.argv if a.startswith(f"--{name}=")]
    return given[-1] if given else default


def out_of_memory(what: str, flags: dict[str, Any]) -> str:
    """Return the error line for memory that ran out, with those of the script's flags that could be lowered."""
    if "micro_batch_tokens" in flags:  # a finetune, whose --batch_size costs no memory
        tries = ["a lower --micro_batch_tokens", "--activation_checkpointing full"]
    else:
        tries = [f"a lower --{flag}" for flag in SIZES if flag in flags]
        tries += ["--quantize nf4"] if flags.get("quantize", "none") is None else []
    return "out of memory" + (f": {what}" if what else "") + (f"; try {' or '.join(tries)}" if tries else "")


def fail(message: str, exit_code: int) -> None:
    """Print one error line and end the process."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(exit_code)


@dataclass(frozen=True)
class Flag:
    """Describes a flag of a script."""

    name: str
    kind: Any
    default: Any
    help: str
    group: str  # title of the group that `--help` lists it in


def own_constants(script: dict[str, Any]) -> dict[str, Any]:
    """Return {name: type} of the annotated constants in a script's globals."""
    if "__annotate__" in script:  # Python 3.14 makes them when asked
        return script["__annotate__"](1)
    return script.get("__annotations__", {})


def collect(script: dict[str, Any], groups: tuple[type, ...]) -> dict[str, Flag]:
    """Return the flags of a script and of the groups of arguments that its main function takes, by name."""
    types, helps = own_constants(script), trailing_comments(Path(script["__file__"]).read_text(encoding="utf-8"))
    flags = {
        name: Flag(name, kind, script[name], helps.get(name, HELP.get(kind, "")), "options")
        for name, kind in types.items()
    }
    for group in groups:
        for flag in group_flags(group):
            if own := flags.pop(flag.name, None):  # the script gives the default, and may say more in its help
                flag = dataclasses.replace(flag, default=own.default, help=own.help or flag.help)
            flags[flag.name] = flag
    return flags


def group_flags(group: type) -> Iterator[Flag]:
    """Yield the flags of a dataclass of arguments. Fields that are dataclasses themselves are groups of their own.

    The class variable `prefix` stands before the names of its fields.
    """
    types = get_type_hints(group)
    try:
        helps = trailing_comments(textwrap.dedent(inspect.getsource(group)))
    except OSError:  # as in an interpreter
        helps = {}
    title = (inspect.getdoc(group) or group.__name__).splitlines()[0].rstrip(".")
    for field in dataclasses.fields(group):
        if dataclasses.is_dataclass(types[field.name]):
            yield from group_flags(types[field.name])
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        name, kind = getattr(group, "prefix", "") + field.name, types[field.name]
        yield Flag(name, kind, default, helps.get(field.name, HELP.get(kind, "")), title)


def build(group: type, values: dict[str, Any]) -> Any:
    """Return the dataclass of arguments with the values of its flags."""
    types, prefix = get_type_hints(group), getattr(group, "prefix", "")
    names = [field.name for field in dataclasses.fields(group)]
    inner = {name: build(types[name], values) for name in names if dataclasses.is_dataclass(types[name])}
    return group(**inner, **{name: values[prefix + name] for name in names if name not in inner})


def flag_values(arguments: Any) -> dict[str, Any]:
    """Return {flag: value} of a dataclass of arguments, as `--config` reads it: paths as text."""
    flags: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if dataclasses.is_dataclass(value):
            flags |= flag_values(value)
        else:
            name = getattr(arguments, "prefix", "") + field.name
            flags[name] = str(value) if isinstance(value, Path) else value
    return flags


make_formatter = partial(RawDescriptionHelpFormatter, max_help_position=30, width=110)


def parse(
    script: dict[str, Any], argv: list[str], groups: tuple[type, ...] = (), aliases: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return {flag: value} for a command line.

    Args:
        script: the script's globals; every annotated name in them is a flag.
        argv: the arguments after the script's name. `--config FILE` reads a JSON or YAML file of values, such as the
            `hyperparameters.json` that a run leaves; flags after it win.
        groups: dataclasses whose fields are flags too.
        aliases: {old spelling: flag}.

    Raises:
        UsageError: an unknown flag or a value that the type does not admit, named in one line.
    """
    flags, aliases = collect(script, groups), aliases or {}
    kinds = {name: flag.kind for name, flag in flags.items()}
    prog = Path(script["__file__"])
    parser = ArgumentParser(
        prog=f"python {prog.parent.name}/{prog.name}",
        usage="%(prog)s [--flag value ...]",
        description=script["__doc__"],
        formatter_class=make_formatter,  # type: ignore[arg-type]  # argparse calls it, whatever it is
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=str, metavar="PATH", help="Read values of these flags from JSON or YAML.")
    sections: dict[str, Any] = {"options": parser}
    for flag in flags.values():
        if flag.group not in sections:
            sections[flag.group] = parser.add_argument_group(flag.group)
        add_flag(sections[flag.group], flag)
    argv = [rename_flag(habits.underscored(argument), aliases) for argument in argv]
    expanded, choices = argv, {name: metavar(kind) for name, kind in kinds.items()}
    try:
        expanded = list(habits.with_true(expand_config(argv, kinds, aliases), kinds))
        habits.refuse_empty_paths(expanded, kinds)
        values = vars(parser.parse_args([habits.respell(*pair, choices) for pair in pairwise(["", *expanded])]))
    except Exception as error:  # jsonargparse has no common base for what a value can do wrong
        raise UsageError(explain(str(error), expanded, kinds)) from None
    for name, kind in kinds.items():
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            raise UsageError(f"--{name}: expected {expected(kind)}, got '{values[name]}'")
    return {name: plain(values[name]) for name in kinds}


def add_flag(section: Any, flag: Flag) -> None:
    if flag.kind == list[Path]:  # what is given without a flag
        name = flag.name.removesuffix("s").upper()
        section.add_argument(flag.name, type=Path, nargs="*", metavar=name, help=flag.help)
        return
    default = json.dumps(flag.default, default=str).strip('"') if flag.default != [] else "none"
    text, several = f"{flag.help} [{default}]", {"type": str, "nargs": "*"} if flag.kind == list[str] else {}
    settings = {"type": flag.kind, "default": flag.default, "metavar": metavar(flag.kind), "help": text} | several
    section.add_argument(f"--{flag.name}", **settings)


def rename_flag(argument: str, aliases: dict[str, str]) -> str:
    """Return `--old` or `--old=value` with the flag's present name."""
    name, equals, value = argument.removeprefix("--").partition("=")
    return f"--{aliases[name]}{equals}{value}" if argument.startswith("--") and name in aliases else argument


def plain(value: Any) -> Any:
    """Return a value of jsonargparse's restricted number types as the plain number, fit to be stored; `~` expanded."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if isinstance(value, list):
        return [plain(part) for part in value]
    return next((kind(value) for kind in (int, float) if isinstance(value, kind) and type(value) is not bool), value)


def metavar(kind: Any) -> str:
    """Return what a flag takes, in a word: the choices, or the type."""
    choices = [choice for choice in get_args(kind) if choice is not type(None)]
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, choices)) + "}"
    if get_origin(kind) is dict:
        return "JSON"
    if bool in choices:  # or a word
        return "{true,false," + ",".join(word for choice in choices for word in get_args(choice)) + "}"
    if choices:
        return metavar(choices[0])
    return {bool: "{true,false}", Path: "PATH", str: "TEXT"}.get(kind) or ("INT" if issubclass(kind, int) else "NUMBER")


def trailing_comments(source: str) -> dict[str, str]:
    """Return {name: comment} for the annotated names `name: type = value  # comment` in a source text."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        named = re.match(r"\s*([a-z]\w*)\s*:", token.line)
        if token.type == tokenize.COMMENT and named:
            comments[named[1]] = token.string.lstrip("# ").replace("%", "%%")
    return comments


def expand_config(argv: list[str], types: dict[str, Any], aliases: dict[str, str]) -> list[str]:
    """Return `argv` with `--config FILE` replaced by the flags that the file holds."""
    expanded = []
    rest = iter(argv)
    for argument in rest:
        if argument != "--config" and not argument.startswith("--config="):
            expanded.append(argument)
            continue
        path = os.path.expanduser(argument.partition("=")[2] or next(rest, ""))
        try:
            values = read_config(Path(path))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UsageError(f"--config {path}: expected a JSON or YAML file of flag values: {reason}") from None
        if not isinstance(values, dict):
            raise UsageError(f'--config {path}: expected an object of flag values, such as {{"seed": 1}}')
        for name, value in values.items():
            name = name.replace("-", "_")
            name = aliases.get(name, name)
            if name not in types:
                raise UsageError(f"--config {path}: {habits.unknown_flag(f'--{name}', types)}")
            if types[name] == list[str] and isinstance(value, list):
                expanded += [f"--{name}", *map(str, value)]
            else:
                expanded.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return expanded


def read_config(path: Path) -> Any:
    return (yaml.safe_load if path.suffix in (".yaml", ".yml") else json.loads)(path.read_text(encoding="utf-8-sig"))


def explain(message: str, argv: list[str], types: dict[str, Any]) -> str:
    """Return one line that names the flag, what was expected and what came, from jsonargparse's several."""
    key = re.search(r'[Kk]ey "(\w+)"|argument --(\w+)', message)
    if key:
        name = key[1] or key[2]
        given = [value for flag, value in pairwise([*argv, "--"]) if flag == f"--{name}"]
        given += [argument.partition("=")[2] for argument in argv if argument.startswith(f"--{name}=")]
        got = f"got '{given[-1]}'" if given and not given[-1].startswith("--") else "got no value"
        return f"--{name}: expected {expected(types[name])}, {got}"
    unknown = re.search(r"[Uu]nrecognized arguments?: (\S+)", message)
    if not unknown:
        return message
    if unknown[1].startswith(("-", *habits.DASHES)):
        return habits.unknown_flag(unknown[1].split("=")[0], types)
    name, kind = next(iter(types.items()))
    such = f"--{name} {metavar(kind)}; a value with spaces takes quotes"
    return f"unexpected argument '{unknown[1]}'; expected --flag value, such as {such}"


def expected(kind: Any) -> str:
    """Return what values a flag of this type takes, in words."""
    if kind in EXPECTED:
        return EXPECTED[kind]
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, choices))
    if kind == list[str]:
        return "a list of texts"
    if get_origin(kind) is dict:
        return "a JSON object such as '{\"name\": 1}'"
    if bool in choices:
        return "one of true, false, " + ", ".join(word for choice in choices for word in get_args(choice))
    if choices:
        return " or ".join("nothing (null)" if choice is type(None) else expected(choice) for choice in choices)
    return "a path" if kind is Path else "text"
