"""Command lines. A script's annotated constants are its hyperparameters and, under the same names, its flags.

    learning_rate: PositiveFloat = 3e-4  # peak learning rate, reached after warmup_steps

gives `--learning_rate` with that type, default and help; one of type `list[Path]` takes the arguments that belong to no
flag. Nothing here imports torch: `--help` answers at once.
"""

import difflib
import inspect
import io
import json
import os
import re
import signal
import sys
import tokenize
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from lit_gpt.errors import UsageError, UserError

# A fraction of which something must be left: dropout, validation splits.
Fraction = restricted_number_type("Fraction", float, [(">=", 0.0), ("<", 1.0)])
# The formats of lit_gpt/quantization/formats.py.
Quantizer = Literal["int8", "int4", "nf4", "nf4-dq"]
# The ways of lit_gpt/hardware.py to keep less for the backward pass.
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
    """Settings of torch on a CPU; to be called before it is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages, measured 5 % faster in training
    # Packed rows have ever new lengths, and each makes new matrix kernels of half a megabyte, about 60 in a row.
    # By default a thousand are kept.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "160")


def run(main: Callable[[SimpleNamespace], None], *more: dict[str, Any]) -> None:
    """Parse the command line against the constants of `main`'s script and call `main` with their values.

    Args:
        more: the globals of other scripts, whose flags `main`'s takes too.

    Exits with 0 when done, 2 on wrong usage and 1 on failure, the last two with one line on stderr.
    """
    tune_torch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    hp = SimpleNamespace()
    try:
        hp = parse(main.__globals__, sys.argv[1:], *more)
        main(hp)
    except UserError as error:
        fail(str(error), error.exit_code)
    except MemoryError as error:
        fail(out_of_memory(str(error), hp), 1)
    except RuntimeError as error:
        on_cpu = re.search(r"DefaultCPUAllocator: .* (\d+) bytes|std::bad_alloc", str(error))  # of no class of its own
        if type(error).__name__ != "OutOfMemoryError" and not on_cpu:  # of torch, which need not be imported
            raise
        wanted = on_cpu and on_cpu[1] and f"tried to allocate {int(on_cpu[1]) / 1e6:,.0f} MB"
        fail(out_of_memory(wanted or str(error), hp), 1)
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


def out_of_memory(what: str, hp: SimpleNamespace) -> str:
    """The line for it, with what there is to try of the flags that the script has."""
    flags = vars(hp)
    if "micro_batch_tokens" in flags:  # a finetune, whose --batch_size costs no memory
        tries = ["a lower --micro_batch_tokens", "--activation_checkpointing full"]
    else:
        tries = [f"a lower --{flag}" for flag in SIZES if flag in flags]
        tries += ["--quantize nf4"] if flags.get("quantize", "none") is None else []
    return "out of memory" + (f": {what}" if what else "") + (f"; try {' or '.join(tries)}" if tries else "")


def fail(message: str, exit_code: int) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(exit_code)


def parse(script: dict[str, Any], argv: list[str], *more: dict[str, Any]) -> SimpleNamespace:
    """The script's hyperparameters with the values of the command line.

    Args:
        script: the script's globals; every annotated name in them is a hyperparameter.
        argv: the arguments after the script's name. `--config FILE` reads a JSON file of values, such as the
            `hyperparameters.json` that a run leaves; flags after it win.
        more: those of other scripts, whose flags are taken too.

    Raises:
        UsageError: an unknown flag or a value that the type does not admit, named in one line.
    """
    types, defaults, helps = {}, {}, {}
    for source in (*(other for other in more if other), script):
        types |= source.get("__annotations__") or source["__annotate__"](1)  # Python 3.14 makes them when asked
        defaults |= source
        helps |= trailing_comments(source["__file__"])
    prog = Path(script["__file__"])
    parser = ArgumentParser(
        prog=f"python {prog.parent.name}/{prog.name}",
        usage="%(prog)s [--flag value ...]",
        description=script["__doc__"],
        formatter_class=partial(RawDescriptionHelpFormatter, max_help_position=30, width=110),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=str, metavar="PATH", help="JSON file of values for these flags")
    for name, kind in types.items():
        default = json.dumps(defaults[name], default=str).strip('"')
        text = f"{helps[name]} [{default}]"
        if kind == list[Path]:  # what is given without a flag
            parser.add_argument(name, type=Path, nargs="*", metavar=name.removesuffix("s").upper(), help=helps[name])
            continue
        parser.add_argument(f"--{name}", type=kind, default=defaults[name], metavar=metavar(kind), help=text)
    try:
        values = vars(parser.parse_args(expand_config(argv, types)))
    except SystemExit:
        raise
    except Exception as error:  # jsonargparse has no common base for what a value can do wrong
        raise UsageError(explain(str(error), argv, types)) from None
    return SimpleNamespace(**{name: plain(values[name]) for name in types})


def plain(value: Any) -> Any:
    """A value of jsonargparse's restricted number types as the number it is, fit to be stored."""
    return next((kind(value) for kind in (int, float) if isinstance(value, kind) and type(value) is not bool), value)


def metavar(kind: Any) -> str:
    """What a flag takes, in a word: the choices, or the type."""
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


def trailing_comments(path: str) -> dict[str, str]:
    """{name: comment} for the annotated constants `name: type = value  # comment` of a source file."""
    source = Path(path).read_text(encoding="utf-8")
    comments = {}
    for line in tokenize.generate_tokens(io.StringIO(source).readline):
        constant = re.match(r"([a-z]\w*)\s*:", line.line)
        if line.type == tokenize.COMMENT and constant:
            comments[constant[1]] = line.string.lstrip("# ").replace("%", "%%")
    return comments


def expand_config(argv: list[str], types: dict[str, Any]) -> list[str]:
    """`argv` with `--config FILE` replaced by the flags that the file holds."""
    expanded = []
    rest = iter(argv)
    for argument in rest:
        if argument != "--config" and not argument.startswith("--config="):
            expanded.append(argument)
            continue
        path = argument.partition("=")[2] or next(rest, "")
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--config {path}: expected a JSON file of flag values: {error}") from None
        if not isinstance(values, dict):
            raise UsageError(f'--config {path}: expected a JSON object of flag values, such as {{"seed": 1}}')
        for name, value in values.items():
            if name not in types:
                raise UsageError(f"--config {path}: {unknown_flag(f'--{name}', types)}")
            expanded.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return expanded


def explain(message: str, argv: list[str], types: dict[str, Any]) -> str:
    """One line that names the flag, what was expected and what came, from jsonargparse's several."""
    key = re.search(r'[Kk]ey "(\w+)"|argument --(\w+)', message)
    if key:
        name = key[1] or key[2]
        given = re.findall(rf"--{name}[= ](\S+)", " ".join(argv))
        got = f"got '{given[-1]}'" if given and not given[-1].startswith("--") else "got no value"
        return f"--{name}: expected {expected(types[name])}, {got}"
    unknown = re.search(r"[Uu]nrecognized arguments?: (\S+)", message)
    if not unknown:
        return message
    if unknown[1].startswith("-"):
        return unknown_flag(unknown[1].split("=")[0], types)
    name, kind = next(iter(types.items()))
    such = f"--{name} {metavar(kind)}; a value with spaces takes quotes"
    return f"unexpected argument '{unknown[1]}'; expected --flag value, such as {such}"


def expected(kind: Any) -> str:
    if kind in EXPECTED:
        return EXPECTED[kind]
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, choices))
    if get_origin(kind) is dict:
        return "a JSON object such as '{\"name\": 1}'"
    if bool in choices:
        return "one of true, false, " + ", ".join(word for choice in choices for word in get_args(choice))
    if choices:
        return " or ".join("nothing (null)" if choice is type(None) else expected(choice) for choice in choices)
    return "a path" if inspect.isclass(kind) and issubclass(kind, Path) else "text"


def unknown_flag(flag: str, types: dict[str, Any]) -> str:
    near = difflib.get_close_matches(flag.lstrip("-"), types, n=1, cutoff=0.5)
    return f"unknown flag {flag}" + (f"; did you mean --{near[0]}?" if near else "; --help lists the flags")
