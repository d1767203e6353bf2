"""The APIs that agent programs speak, as translations to and from chat messages."""

from palestra.env.dialects import anthropic, chat, responses
from palestra.env.dialects.shape import Answer, Asked, BadRequest, Dialect

BY_PATH: dict[str, Dialect] = {
    "chat/completions": chat.Chat(),
    "responses": responses.Responses(),
    "messages": anthropic.Messages(),
}
"""By the path of the request, behind an optional `v1/`."""

__all__ = ["BY_PATH", "Answer", "Asked", "BadRequest", "Dialect"]
