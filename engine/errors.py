"""Every error the engine raises on purpose. The message is one line: what was found, what was expected, what to do."""


class EngineError(Exception):
    """Base class of the errors below."""


class ConfigError(EngineError):
    """A configuration that cannot work on this machine or with this model."""


class CheckpointError(EngineError):
    """A checkpoint that cannot be used; the message names file, tensor, expected and found."""


class RequestError(EngineError, ValueError):
    """A request that can never run.

    Args:
        message: what was found and what was expected.
        param: name of the offending request field, as the caller spelled it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooManyTokensError(RequestError):
    """A text that has more tokens than it may have, by far: it was not read to its end."""


class QueueFullError(EngineError):
    """The engine already holds as many waiting requests as its configuration allows."""


class EngineDeadError(EngineError):
    """The engine stopped on a fault; every request it held ended with the same reason."""
