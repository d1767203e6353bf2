"""What the length of a rollout adds to its reward, before advantages: a pure function of its number of tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LengthShaping:
    """`max_tokens` is the length that counts as full; `overlong_tokens` of it are where the soft penalty grows."""

    max_tokens: int
    penalty: float = 0.0
    overlong_tokens: int = 0
    overlong_penalty: float = 0.0

    @property
    def is_off(self) -> bool:
        return not self.penalty and not (self.overlong_tokens and self.overlong_penalty)

    def added_to_reward(self, num_tokens: int) -> float:
        """-penalty x tokens / max_tokens, and the soft overlong punishment: 0 up to max_tokens - overlong_tokens, then
        linearly down to -overlong_penalty at max_tokens and beyond.

        Source: DAPO, arXiv:2503.14476, equation 13 (with overlong_penalty = 1).
        """
        added = -self.penalty * num_tokens / self.max_tokens
        if self.overlong_tokens:
            over = num_tokens - (self.max_tokens - self.overlong_tokens)
            added -= self.overlong_penalty * min(max(over / self.overlong_tokens, 0.0), 1.0)
        return added
