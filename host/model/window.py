"""The part of the sampling schedule in which a system is active."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A part of the schedule from `start_percent` to `end_percent`, both included: 0 is its beginning, 1 its end.

    Raises:
        ValueError: the part ends before it starts.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self):
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"start_percent: expected at most end_percent ({self.end_percent:g}), got {self.start_percent:g}"
            )

    @property
    def is_whole(self) -> bool:
        """Whether the window covers the whole schedule."""
        return self.start_percent <= 0 and self.end_percent >= 1

    def levels(self, model_sampling) -> NoiseLevels:
        """The window in noise levels, converted by ComfyUI's model_sampling."""
        return NoiseLevels(*map(model_sampling.percent_to_sigma, (self.start_percent, self.end_percent)))


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels (sigmas) from `highest` down to `lowest`, both included."""

    highest: float
    lowest: float

    def __contains__(self, level: float) -> bool:
        return self.lowest <= level <= self.highest
