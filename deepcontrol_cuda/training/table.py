"""Tables in Markdown, with columns that also line up as plain text."""

from __future__ import annotations


def markdown_table(lines: list[list[str]]) -> str:
    """The cells of ``lines``, the first of which is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])
