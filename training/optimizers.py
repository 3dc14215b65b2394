"""Optimizers of the models that this pack trains, and schedules of their learning rates.

A schedule gives, for each step, the factor of every parameter group's learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def adamw(model: torch.nn.Module, learning_rate: float, weight_decay: float = 0.01) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and none on biases and norms."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Brings the singular values of matrices (k, m, n), m <= n, close to 1 with Muon's five Newton-Schulz steps X <- aX
    + b(XX')X + c(XX')^2 X (Jordan et al. 2024).

    The steps are polynomials in G = XX', so they are computed on the (k, m, m) matrices G, and X is multiplied once at
    the end: less than half the work for a 3x3 convolution.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.transpose(1, 2)
    identity = torch.eye(gram.shape[1], dtype=x.dtype, device=x.device).expand_as(gram)
    product = identity
    for _ in range(5):
        factor = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
        product = factor @ product
        gram = factor @ factor @ gram
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): replaces a matrix's momentum by the nearest semi-orthogonal matrix, scaled to AdamW's
    update size (arXiv 2502.16982, eq. 4). Convolution kernels count as matrices with a row per output channel.

    torch's own takes one matrix at a time and always in bfloat16, which most CPUs only emulate; this one takes all
    matrices of one shape together, in the precision of their gradients.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        learning_rate: float,
        weight_decay: float,
        momentum: float = 0.95,
    ):
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters from their gradients."""
        for group in self.param_groups:
            parameters, momentum, learning_rate = group["params"], group["momentum"], group["lr"]
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads = [p.grad for p in parameters]
            buffers = [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            # Nesterov's look ahead.
            updates = torch._foreach_lerp(grads, buffers, momentum)
            same: dict[tuple[int, int], list[int]] = {}
            for i, update in enumerate(updates):
                same.setdefault(update.flatten(1).shape, []).append(i)
            torch._foreach_mul_(parameters, 1 - learning_rate * group["weight_decay"])
            for (m, n), members in same.items():
                stack = torch.stack([updates[i].flatten(1) for i in members])
                turned = orthogonalize(stack.transpose(1, 2)).transpose(1, 2) if m > n else orthogonalize(stack)
                for i, update in zip(members, turned, strict=True):
                    alpha = -learning_rate * 0.2 * max(m, n) ** 0.5
                    parameters[i].add_(update.view_as(parameters[i]), alpha=alpha)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside a model, AdamW for the rest, with a common learning rate.

    `outside` are name prefixes of the first and last layers' parameters, which use AdamW.
    """

    def __init__(self, model: torch.nn.Module, learning_rate: float, weight_decay: float, outside: tuple[str, ...]):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if p.ndim > 1 and not n.startswith(outside)]
        chosen = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        self._parts = (
            Muon(inner, learning_rate, weight_decay),
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        )
        super().__init__([p for _, p in named], {"lr": learning_rate})

    def step(self) -> None:
        """Updates all parameters from their gradients, at the learning rate of the first parameter group."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            part.step()

    def state_dict(self) -> dict:
        """The states of both optimizers."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def warmup(steps: int) -> Callable[[int], float]:
    """Rises linearly to 1 over the first `steps` steps and stays there."""
    return lambda step: min(1.0, (step + 1) / max(1, steps))


def warmup_cosine(warmup_steps: int, steps: int, floor: float = 0.02) -> Callable[[int], float]:
    """Rises linearly to 1 over `warmup_steps` steps, and falls along a half cosine to `floor` at step `steps`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(progress * math.pi))

    return factor
