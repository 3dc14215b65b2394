"""Tables of a training run, which grow by one row at a time and lose rows when the run resumes at an earlier step."""

from __future__ import annotations

import csv
from pathlib import Path


def add_row(path: Path, step: int, row: dict[str, float]) -> None:
    """Appends a step's values to a table. The header comes from the first row and stays, even if the run is resumed
    with options that give other values."""
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
    """Removes the rows after `step`, because those steps are run again."""
    if path.exists():
        head, *rows = path.read_text().splitlines()
        kept = [row for row in rows if int(row.split(",")[0]) <= step]
        path.write_text("".join(f"{row}\n" for row in (head, *kept)))
