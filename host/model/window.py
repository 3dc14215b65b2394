"""The part of the sampling schedule in which a system acts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """From one part of the schedule to another, 0 its beginning and 1 its end, both included.

    Raises:
        ValueError: it ends before it starts.
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
        """Whether it leaves nothing of the schedule out."""
        return self.start_percent <= 0 and self.end_percent >= 1

    def levels(self, model_sampling) -> NoiseLevels:
        """Its noise levels in the host's model_sampling of a model."""
        return NoiseLevels(*map(model_sampling.percent_to_sigma, (self.start_percent, self.end_percent)))


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels (sigmas) from the `highest` down to the `lowest`, both included."""

    highest: float
    lowest: float

    def __contains__(self, level: float) -> bool:
        return self.lowest <= level <= self.highest
