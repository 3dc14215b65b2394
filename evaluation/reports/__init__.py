"""One module per system, with the system's name and `report(studio, pictures, chance, tell) -> Report`.

A new system is a new file here; `report.py` finds it by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from ..metrics import Row


@dataclass(frozen=True)
class Report:
    """What a system's module returns.

    Attributes:
        rows: the measurements.
        about: what was measured and how, in a few sentences for the document.
        sheet: the contact sheet.
        plots: further pictures by name, for the document.
        sampling: how pictures were sampled, if not with the studio's settings.
    """

    rows: list[Row]
    about: str
    sheet: Image.Image
    plots: dict[str, Image.Image] = field(default_factory=dict)
    sampling: str = ""
