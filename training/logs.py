"""Tables of a training run that grow by a row at a time and go back with it."""

from __future__ import annotations

import csv
from pathlib import Path


def add_row(path: Path, step: int, row: dict[str, float]) -> None:
    """Appends a step's numbers to a table, which begins with their names and keeps to these: a run may be continued
    with options by which it has other numbers to tell."""
    row = {"step": step, **row}
    new = not path.exists()
    with path.open("a+", newline="") as file:
        file.seek(0)
        names = list(row) if new else next(csv.reader(file))
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(row)


def go_back(path: Path, step: int) -> None:
    """Takes away what was logged after `step`, for those steps are made again."""
    if path.exists():
        head, *rows = path.read_text().splitlines()
        kept = [row for row in rows if int(row.split(",")[0]) <= step]
        path.write_text("".join(f"{row}\n" for row in (head, *kept)))
