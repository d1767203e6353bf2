"""What ends a rollout before its `run` does."""


class Limit(BaseException):
    """A limit of turns or tokens ended the rollout. Not an Exception: an author's `except Exception` lets it pass."""


class ContextFull(Limit):
    """There is no room in the model's context for another reply."""


class AgentError(Exception):
    """Raised by an environment's `run` or its tools when the agent broke the rules: the rollout ends `failed` and is
    scored."""
