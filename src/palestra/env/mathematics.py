"""Whether two mathematical answers say the same."""

from palestra.env.aside import TooSlowError, limited, needs

_CPU_S = 5.0
_LONGEST = 10_000  # characters of an answer that is looked at


async def math_equal(answer: str, gold: str) -> bool:
    r"""Whether `answer` says what `gold` says: numbers, expressions, sets, intervals, equations, in LaTeX or plain.

    By math-verify, in a process of its own. Whatever a policy writes, it does not raise; what cannot be read, or takes
    5 s of CPU time or 4 GiB to compare, is not equal. Errors: InfrastructureError.
    """
    if answer.strip() == gold.strip():
        return bool(answer.strip())
    if not answer.strip() or len(answer) > _LONGEST:
        return False
    try:
        return await limited(_CPU_S, _equal, answer, gold)
    except (TooSlowError, MemoryError):
        return False


@needs("math_verify")
def _equal(answer: str, gold: str) -> bool:
    """In another process: the import takes 2 s."""
    from math_verify import parse, verify

    def read(text: str) -> list:
        """As an expression, or for one in a text."""
        expression = text if "$" in text or "\\boxed" in text else f"${text}$"
        return parse(expression, parsing_timeout=0) or parse(text, parsing_timeout=0)

    return verify(read(gold), read(answer), timeout_seconds=0)
