"""Which pictures a process sees in which step, and the random draws for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .data.dataset import EpochBatches


class Draws(NamedTuple):
    """Random draws for each of n pictures.

    Attributes:
        noise: (n, C, h, w), added to the latents.
        latent: (n, C, h, w), samples the latents from the autoencoder's distribution.
        t: (n,), int64, the timesteps of the noise.
        coin: (n,), in [0, 1), decides what happens to a share of the pictures.
    """

    noise: torch.Tensor
    latent: torch.Tensor
    t: torch.Tensor
    coin: torch.Tensor


def draw(seed: int, numbers: Iterable[int], latent_shape: Sequence[int], times: int) -> Draws:
    """The draws for the pictures with these running numbers in a training run.

    A picture's draws depend on the seed and its number alone, not on interruptions or the number of processes.
    """
    rows = []
    for number in numbers:
        state = np.random.SeedSequence((seed, number)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        noise, latent = torch.randn(2, *latent_shape, generator=generator)
        t = torch.randint(times, (), generator=generator)
        rows.append((noise, latent, t, torch.rand((), generator=generator)))
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


def toward_noise(t: torch.Tensor, times: int) -> torch.Tensor:
    """Timesteps that are mostly high, of uniform ones (n,): (1 - (t/T)^3) T, T2I-Adapter's cubic sampling (Mou et al.,
    arXiv 2302.08453). High noise is where colors and layout are decided."""
    share = (t.double() + 0.5) / times
    return ((1 - share**3) * times).long()


class Shares(torch.utils.data.Sampler):
    """One process's part of the pictures of all steps: `accumulate` batches of `batch` keys for each step.

    A step's pictures go to the processes batch by batch, so that N processes see in one step what a single process sees
    that accumulates N batches.
    """

    def __init__(self, steps: EpochBatches, batch: int, accumulate: int, processes: int, process: int):
        self.steps, self.batch, self.accumulate = steps, batch, accumulate
        self.processes, self.process = processes, process

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for keys in self.steps:
            for i in range(self.accumulate):
                start = self.offset(i)
                yield keys[start : start + self.batch]

    def offset(self, i: int) -> int:
        """Offset of batch `i` of this process among the pictures of a step."""
        return (i * self.processes + self.process) * self.batch

    def numbers(self) -> Iterator[int]:
        """The running number of the first picture of each batch."""
        for step in range(self.steps.start, self.steps.steps):
            for i in range(self.accumulate):
                yield step * self.steps.batch + self.offset(i)


def shares_of(count: int, options, pictures_a_step: int, step: int, processes: tuple[int, int]) -> Shares:
    """The part of one process (number of processes, its index) of the steps from `step` on, of `count` pictures."""
    steps = EpochBatches(count, pictures_a_step, options.steps, step, options.seed)
    return Shares(steps, options.batch_size, options.accumulate, *processes)
