"""Errors as OpenAI's API spells them."""

from typing import Any


class APIError(Exception):
    """Is answered with its HTTP status.

    Attributes:
        param: the field of the request that is wrong, if one is.
        code: what a program may go by.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """Return the JSON that tells of it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def bad(param: str, expected: str) -> APIError:
    """Return the error for a field of which something else was expected."""
    return APIError(400, f"{param}: expected {expected}", param, "invalid_value")
