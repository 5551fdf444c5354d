"""What a client did not get, in OpenAI's shape of an error."""

from __future__ import annotations

from core.console import OneLine


class Problem(OneLine, ValueError):
    """A request that is refused or failed; one line for the client, without anything of this machine."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def kind(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict:
        return {
            "error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code},
        }

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}


def invalid(message: str, param: str | None = None, code: str | None = None) -> Problem:
    return Problem(400, message, param=param, code=code)
