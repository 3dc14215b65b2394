"""Which pictures a process sees in which step, and the random draws for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .data.dataset import EpochBatches
from .signals import ignore_stop_requests

if TYPE_CHECKING:
    from .base import Base


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


def load_batches(
    data: torch.utils.data.Dataset, shares: Shares, workers: int, collate: Callable[[list[dict]], dict]
) -> Iterable[dict[str, torch.Tensor]]:
    """The batches of some pictures.

    Args:
        data: pictures.
        shares: which of them.
        workers: processes that read pictures; 0 reads them between steps.
        collate: items of `data` -> a batch.
    """
    return torch.utils.data.DataLoader(
        data,
        batch_sampler=shares,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=ignore_stop_requests,
    )


def drawn_batches(
    data: torch.utils.data.Dataset,
    base: Base,
    shares: Shares,
    workers: int,
    collate: Callable[[list[dict]], dict],
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `load_batches`, each with its `Draws` by their names, on a device. The draws depend on the seed of
    `data`; the latent shape and the timesteps are those of the base."""
    for first, batch in zip(shares.numbers(), load_batches(data, shares, workers, collate), strict=True):
        draws = draw(data.seed, range(first, first + shares.batch), base.latent_shape, base.times)
        yield {name: tensor.to(device) for name, tensor in {**batch, **draws._asdict()}.items()}
