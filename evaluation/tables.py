"""Tables of rows, for the screen and for documents."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .metrics import LEAD, Row


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, readable as plain text and as Markdown."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (header, rule, *lines)
    )


def report_table(rows: Sequence[Row]) -> str:
    """Variants as rows, metrics as columns, and in each cell a mean with its interval.

    A star marks a value that differs from the default's: the interval of the paired difference excludes zero.
    """
    cells: dict[tuple[int, str], dict[str, str]] = {}
    leads = {(r.subjects, r.variant, r.metric): r for r in rows if r.metric.endswith(LEAD)}
    metrics = list(dict.fromkeys(r.metric for r in rows if not r.metric.endswith(LEAD)))
    for row in rows:
        if row.metric in metrics:
            lead = leads.get((row.subjects, row.variant, row.metric + LEAD))
            star = "*" if lead is not None and not lead.low <= 0 <= lead.high else ""
            line = cells.setdefault((row.subjects, row.variant), {"n": str(row.n)})
            line[row.metric] = f"{row.mean:.3f}{star} [{row.low:.3f}, {row.high:.3f}]"
    lines = [
        [str(subjects or "1-3"), variant, *(line.get(metric, "") for metric in metrics), line["n"]]
        for (subjects, variant), line in cells.items()
    ]
    return markdown(["subjects", "variant", *metrics, "pictures"], lines)


def write_json(path: Path, rows: Sequence[dict]) -> None:
    """Writes rows as a list, one row per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def write_section(path: Path, preface: str, title: str, body: str) -> None:
    """Writes one section of a document, in place of any section with the same title; the others stay as they are.

    Args:
        path: the document; created if absent.
        preface: text before the first section.
        title: title of the section, without Markdown.
        body: its text.
    """
    sections = {}
    if path.exists():
        for part in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name, _, text = part.partition("\n")
            sections[name] = text.strip()
    sections[title] = body.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [preface.strip(), *(f"## {name}\n\n{text}" for name, text in sections.items())]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
