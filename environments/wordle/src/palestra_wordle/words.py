"""Make the list of words: `python -m palestra_wordle.words /usr/share/dict/american-english OUT.txt`."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

_FIVE_LETTERS = re.compile("[a-z]{5}")
_NUMERAL = re.compile("c{0,3}(xc|xl|l?x{0,3})(ix|iv|v?i{0,3})")


def of_five_letters(lines: Iterable[str]) -> list[str]:
    """Those of small letters only, so neither names nor genitives, and no Roman numerals; in order and once each."""
    words = {line.strip() for line in lines}
    return sorted(word for word in words if _FIVE_LETTERS.fullmatch(word) and not _NUMERAL.fullmatch(word))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m palestra_wordle.words /usr/share/dict/american-english OUT.txt")
    source, out = map(Path, sys.argv[1:])
    words = of_five_letters(source.read_text(encoding="utf-8").splitlines())
    out.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
