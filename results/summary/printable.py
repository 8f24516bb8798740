"""What may be shown on a terminal: text of others with its control characters escaped."""

from __future__ import annotations

import unicodedata

_LONGEST = 2000  # characters of a sentence, of which a megabyte may be quoted
# Control characters, what changes the direction of text or is not seen, halves of characters, and private
# ones: what a terminal obeys rather than shows, or shows as something else.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def printable(text: str, keep: str = "\n\t") -> str:
    """Return a text whose characters a terminal shows and does not obey; others are escaped as Python does.

    Args:
        text: Any text.
        keep: Characters that stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else _escaped(c) for c in text)


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Return a text as one line of at most so many characters, the middle of a longer one left out."""
    if len(text) > 4 * longest:
        text = text[: 2 * longest] + text[-2 * longest :]
    line = printable(text, keep="")
    if len(line) <= longest:
        return line
    return f"{line[: longest // 2]} ... {line[-longest // 2 :]}"


def _escaped(character: str) -> str:
    if unicodedata.category(character) in _UNSEEN:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character  # a space of another width, or a character newer than this Python
