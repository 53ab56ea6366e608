"""What the user can mend. `lit_gpt.cli.run` prints these as one line, without a traceback."""


class UserError(Exception):
    """The message names the file, field or flag, says what was expected and what to do next."""

    exit_code = 1


class UsageError(UserError):
    """A wrong or missing flag."""

    exit_code = 2
