"""The one error tree.

Every failure that can reach a user is a `PenstockError`. Each class fixes the HTTP status, OpenAI's
`type` and `code`, and whether the service may try the request again elsewhere. Errors cross
processes as `ErrorInfo` (plain data) and come back as the class of the same `code`.

    PenstockError
    ├── InvalidRequest            400  what the caller sent cannot be served; says what to change
    │   ├── UnsupportedFeature    400  names the field that is not supported
    │   ├── ContextLengthExceeded 400  both lengths are in the message
    │   ├── InvalidConstraint     400  schema, grammar or regex does not compile
    │   └── TemplateFailed        400  the checkpoint's chat template raised
    ├── AuthenticationFailed      401
    ├── ModelNotFound             404
    ├── PayloadTooLarge           413
    ├── Overloaded                429  carries retry_after_s
    ├── RequestCancelled          499  the client went away, or asked for it
    ├── EngineFailed              500  a step raised; the request may be tried elsewhere
    ├── EngineUnavailable         503  no instance took (or resumed) the request within the bound
    ├── ProtocolError             500  a peer sent what the protocol does not allow
    │   └── VersionMismatch       500
    └── StartupError               –   the process cannot start: one line and a non-zero exit
        ├── CheckpointError        –   missing, truncated, misshapen, or not a checkpoint
        │   └── UnsupportedModel   –   an architecture or a setting that no family here covers
        ├── NotEnoughMemory        –
        └── ConfigError            –   flags or files that contradict each other
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `PenstockError` as data."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class PenstockError(Exception):
    """Root of the tree. `message` is one sentence that says what to do about it."""

    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    http_status: ClassVar[int] = 500
    #: Whether the service may place the same request again (on this or another instance).
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def info(self) -> ErrorInfo:
        return ErrorInfo(self.code, self.message, self.param, self.retry_after_s)


class InvalidRequest(PenstockError, ValueError):
    code = "invalid_request"
    type = "invalid_request_error"
    http_status = 400


class UnsupportedFeature(InvalidRequest):
    code = "unsupported_feature"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class InvalidConstraint(InvalidRequest):
    code = "invalid_constraint"


class TemplateFailed(InvalidRequest):
    code = "template_failed"


class AuthenticationFailed(PenstockError):
    code = "invalid_api_key"
    type = "authentication_error"
    http_status = 401


class ModelNotFound(PenstockError):
    code = "model_not_found"
    type = "not_found_error"
    http_status = 404


class PayloadTooLarge(PenstockError):
    code = "payload_too_large"
    type = "invalid_request_error"
    http_status = 413


class Overloaded(PenstockError):
    code = "overloaded"
    type = "rate_limit_error"
    http_status = 429


class RequestCancelled(PenstockError):
    code = "request_cancelled"
    type = "invalid_request_error"
    http_status = 499


class EngineFailed(PenstockError):
    code = "engine_failed"
    retryable = True


class EngineUnavailable(PenstockError):
    code = "engine_unavailable"
    type = "service_unavailable_error"
    http_status = 503
    retryable = True


class ProtocolError(PenstockError):
    code = "protocol_error"


class VersionMismatch(ProtocolError):
    code = "version_mismatch"


class StartupError(PenstockError):
    code = "startup_error"


class CheckpointError(StartupError):
    code = "checkpoint_error"


class UnsupportedModel(CheckpointError):
    code = "unsupported_model"


class NotEnoughMemory(StartupError):
    code = "not_enough_memory"


class ConfigError(StartupError, ValueError):
    code = "config_error"


def _tree(root: type[PenstockError]) -> dict[str, type[PenstockError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE = _tree(PenstockError)


def from_info(info: ErrorInfo) -> PenstockError:
    """The exception an `ErrorInfo` describes; an unknown code becomes the root class."""
    cls = _BY_CODE.get(info.code, PenstockError)
    return cls(info.message, param=info.param, retry_after_s=info.retry_after_s)
