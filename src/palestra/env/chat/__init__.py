"""Token-exact conversations for any Hugging Face chat template, without torch and transformers.

`load_tokenizer` reads a model directory; `Conversation` keeps one agent's exact tokens; `render_sft` makes a supervised
row with its mask.
"""

from palestra.env.chat.conversation import Conversation
from palestra.env.chat.reply import AssistantMessage, ToolCall
from palestra.env.chat.sft import SftRow, render_completion, render_sft
from palestra.env.chat.template import ImageError, Message, TemplateError
from palestra.env.chat.tokenizer import ChatTokenizer, load_tokenizer

__all__ = [
    "AssistantMessage",
    "ChatTokenizer",
    "Conversation",
    "ImageError",
    "Message",
    "SftRow",
    "TemplateError",
    "ToolCall",
    "load_tokenizer",
    "render_completion",
    "render_sft",
]
