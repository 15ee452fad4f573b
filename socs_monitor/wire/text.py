"""Text for people: what senders wrote, made safe to show, and counts with the right plural. Pure."""

from __future__ import annotations


def sanitize(text: object, max_chars: int | None = 300) -> str:
    """Return text from outside as one printable line: control characters escaped, at most `max_chars` characters."""
    line = str(text)
    if not line.isprintable():
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if max_chars is None else shorten(line, max_chars)


def shorten(text: str, max_chars: int) -> str:
    """Cut the middle out of a text of more than `max_chars` characters."""
    half = max_chars // 2
    return text if len(text) <= max_chars else f"{text[: half - 5]} ... {text[-half:]}"


def plural(count: int, noun: str) -> str:
    """Return a count and its noun: "1 file", "2 files"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
