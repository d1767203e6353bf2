"""What ends a rollout before its `run` does."""

from palestra.core.errors import UserError


class Limit(BaseException):
    """A limit of turns or tokens ended the rollout. Not an Exception: an author's `except Exception` lets it pass."""


class ContextFull(Limit):
    """There is no room in the model's context for another reply."""


class Unplayable(UserError):
    """The policy cannot be given what the environment sends, in this rollout as in any other: none is played again."""


class AgentError(Exception):
    """Raised by an environment's `run` or its tools when the agent broke the rules: the rollout ends `failed` and is
    scored."""
