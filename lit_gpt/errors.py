"""Defines the errors that the user can mend. `lit_gpt.cli.run` prints them as one line, without a traceback."""

from importlib.util import find_spec


class UserError(Exception):
    """Names the file, field or flag in its message, what was expected there and what to do next."""

    exit_code = 1


class UsageError(UserError):
    """Tells of a wrong or missing flag."""

    exit_code = 2


def reason(error: Exception) -> str:
    """Return why something failed in words alone: of the system's errors without their number and path."""
    return getattr(error, "strerror", None) or str(error)


def require(module: str, extra: str, wanted_by: str) -> None:
    """Refuse what needs an optional package that is not there, before anything else is done.

    Args:
        extra: that of pyproject.toml which brings it.
        wanted_by: the flag or script that needs it.
    """
    if find_spec(module) is None:
        raise UsageError(f"{wanted_by} needs {module}, which is not installed: pip install -e '.[{extra}]'")
