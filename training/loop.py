"""One resumable training loop for every model of this project."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..encoders.files import whole_file
from .logs import add_row, go_back

Losses = Callable[[int, torch.Generator], dict[str, torch.Tensor]]
"""(step, generator) to named losses, whose sum is minimised."""


class Lanes:
    """The losses of a step, in parts that are computed at the same time, each by a thread of its own on one processor.

    A model of some millions of weights gains more from a thread for each half of the batch than from two threads on
    each operation, which wait for one another (measured on two idle cores: 1.94 s for the gradients of a step of
    Shapeland's UNet instead of 2.25 s). The parts must share their parameters and nothing else that changes (see
    `replica`).
    """

    def __init__(self, parts: Sequence[Losses]):
        self.parts = parts
        self._threads = ThreadPoolExecutor(len(parts))

    def gradients(
        self, parameters: Sequence[torch.nn.Parameter], step: int, seed: int, device: str, half: bool
    ) -> dict[str, torch.Tensor]:
        """Sets the parameters' gradients to the mean over the parts, and returns the means of their losses."""

        def work(number: int) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor | None, ...]]:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * len(self.parts) + number)
            with bfloat16_where_fast(device, half):
                losses = self.parts[number](step, generator)
            # Not backward(), by which threads would add to the same tensors at once.
            gradients = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
            return {name: value.detach() for name, value in losses.items()}, gradients

        before = torch.get_num_threads()
        torch.set_num_threads(before if len(self.parts) == 1 else 1)
        try:
            results = list(self._threads.map(work, range(len(self.parts))))
        finally:
            torch.set_num_threads(before)
        for parameter, *found in zip(parameters, *(gradients for _, gradients in results), strict=True):
            present = [gradient for gradient in found if gradient is not None]
            parameter.grad = sum(present[1:], present[0]) / len(self.parts) if present else None
        return {name: sum(losses[name] for losses, _ in results) / len(results) for name in results[0][0]}


def replica(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module that shares its parameters and buffers, for another thread."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


class Run:
    """A training run in a folder: modules, optimizer, averaged weights, step count and loss log, resumed exactly.
    Without a folder nothing is written.

    Batches must depend on the step alone (`batch(step)`), never on hidden state, so that an interrupted run and an
    uninterrupted one see the same data. Randomness inside a step comes from `generator`, seeded by (seed, step).

    With an `accelerator` (of the library accelerate) it decides on precision and shares the work among processes:
    losses must then be computed by `module`, the model as prepared for that, and the first process alone writes. All
    of them read the checkpoint, so the folder must be one that all see.

    `kind` is what a checkpoint must agree in to be continued, by the names of its options.

    Raises:
        ValueError: the folder's checkpoint is of another kind of run.
    """

    def __init__(
        self,
        folder: Path | None,
        model: torch.nn.Module,
        rate: Callable[[int], float],
        steps: int,
        seed: int = 0,
        average: float = 0.0,
        weight_decay: float = 0.01,
        device: str = "cpu",
        optimizer: torch.optim.Optimizer | None = None,
        accelerator=None,
        kind: dict[str, str | int | float | bool | None] | None = None,
    ):
        self.folder, self.steps, self.rate, self.seed, self.device = folder, steps, rate, seed, device
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self.model = model.to(device)
        self.optimizer = optimizer or adamw(model, weight_decay)
        self.accelerator, self.module = accelerator, model
        self.writes = accelerator is None or accelerator.is_main_process
        if accelerator:
            self.module, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.average = average
        self.kind = kind or {}
        self.averaged = {k: v.detach().clone() for k, v in model.state_dict().items()} if average else None
        self.step = 0
        if folder and self._checkpoint.exists():
            saved = torch.load(self._checkpoint, map_location=device, weights_only=True)
            for option, value in self.kind.items():
                if (begun := saved.get("kind", {}).get(option)) != value:
                    raise ValueError(
                        f"--out: expected a new folder, or one of a run with {option} {value}, got {folder}, begun "
                        f"with {begun}"
                    )
            model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.averaged, self.step = saved["averaged"], saved["step"]
            if self.writes:
                for name in ("log.csv", "report.csv"):
                    go_back(folder / name, self.step)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint so that an interruption at any moment leaves a whole one."""
        if not self.folder or not self.writes:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged,
            "step": self.step,
            "kind": self.kind,
        }
        with whole_file(self._checkpoint) as part:
            torch.save(state, part)

    def best_state(self) -> dict[str, torch.Tensor]:
        """The averaged weights where the run keeps them, else the current ones."""
        return self.averaged if self.averaged is not None else self.model.state_dict()

    def train(
        self,
        loss_of: Losses | Lanes,
        every: int,
        report: Callable[[int], dict[str, float]] | None = None,
        report_every: int = 0,
        save_seconds: float = 180.0,
        half: bool = True,
        after: Callable[[int, dict[str, torch.Tensor]], None] | None = None,
        seconds: float = float("inf"),
    ) -> None:
        """Train to `steps`, or until `seconds` have passed. The means of the losses over `every` steps go to `log.csv`
        and the screen, `report`'s numbers to `report.csv` each `report_every` steps. `half` computes in bfloat16 where
        the device is fast at it. `after(step, losses)` is told when a step is done and holds no memory."""
        sums: dict[str, float] = {}
        counted = 0
        saved_at = began = time.monotonic()
        end = began + seconds
        while self.step < self.steps and time.monotonic() < end:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.step)
            losses = self._gradients(loss_of, half)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.averaged is not None:
                self._update_average()
            for name, value in {**losses, "gradient_norm": norm}.items():
                sums[name] = sums.get(name, 0.0) + value.float()
            counted += 1
            if after:
                after(self.step - 1, losses)
            if self.step % every == 0:
                means = torch.stack(list(sums.values())) / counted
                if self.accelerator:
                    means = self.accelerator.reduce(means, "mean")
                row = {name: round(mean, 5) for name, mean in zip(sums, means.tolist(), strict=True)}
                row["seconds"] = round((time.monotonic() - began) / counted, 3)
                self._log("log.csv", row)
                sums, counted, began = {}, 0, time.monotonic()
            if report and self.step % report_every == 0:
                self._log("report.csv", report(self.step))
                began = time.monotonic()
            if time.monotonic() - saved_at > save_seconds:
                self.save()
                saved_at = time.monotonic()
        self.save()

    def _gradients(self, loss_of: Losses | Lanes, half: bool) -> dict[str, torch.Tensor]:
        """Computes the gradients of a step; returns its losses, which hold no memory."""
        if isinstance(loss_of, Lanes):
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return loss_of.gradients(trained, self.step, self.seed, self.device, half)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        with self.accelerator.autocast() if self.accelerator else bfloat16_where_fast(self.device, half):
            losses = loss_of(self.step, generator)
        total = sum(losses.values())
        self.accelerator.backward(total) if self.accelerator else total.backward()
        return {name: value.detach() for name, value in losses.items()}

    def _update_average(self) -> None:
        # A short memory at first: the average must forget the random initialisation.
        keep = min(self.average, (1 + self.step) / (10 + self.step))
        state = self.model.state_dict()
        floats = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.averaged[k] for k in floats], [state[k] for k in floats], 1 - keep)

    def _log(self, name: str, row: dict[str, float]) -> None:
        if not self.folder or not self.writes:
            return
        add_row(self.folder / name, self.step, row)
        print(f"step {self.step}/{self.steps}", " ".join(f"{k}={v}" for k, v in row.items()), flush=True)


def bfloat16_where_fast(device: str, enabled: bool = True) -> torch.autocast:
    """Autocast to bfloat16, but not on a processor without instructions for it: there a product of two matrices
    takes over a hundred times as long as in fp32."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=enabled and (kind != "cpu" or _cpu_has_bfloat16()))


def _cpu_has_bfloat16() -> bool:
    # torch tells it in places that differ from one version to the next.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def adamw(model: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and none on biases and norms."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), fused=True)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (k, m, n), m <= n, with their singular values brought near 1 by Muon's five Newton-Schulz steps
    X <- aX + b(XX')X + c(XX')^2 X (Jordan et al. 2024).

    The steps are polynomials in G = XX', so they are taken on the (k, m, m) matrices G, and X is multiplied once at
    the end: for a 3x3 convolution under half the work.
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
    """Muon (Jordan et al. 2024): a matrix's momentum is replaced by the nearest semi-orthogonal matrix, scaled to
    AdamW's update size (arXiv 2502.16982, eq. 4). Convolution kernels count as matrices of their output channels.

    torch's own takes one matrix at a time and always in bfloat16, which most processors only emulate; this one takes
    all matrices of one shape together, in the precision of their gradients.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": 1.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters from their gradients."""
        for group in self.param_groups:
            parameters, momentum, rate = group["params"], group["momentum"], group["lr"]
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
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            for (m, n), members in same.items():
                stack = torch.stack([updates[i].flatten(1) for i in members])
                turned = orthogonalize(stack.transpose(1, 2)).transpose(1, 2) if m > n else orthogonalize(stack)
                for i, update in zip(members, turned, strict=True):
                    parameters[i].add_(update.view_as(parameters[i]), alpha=-rate * 0.2 * max(m, n) ** 0.5)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside a model, AdamW for the rest, behind one learning rate.

    `outside` names the parameters of the first and last layers, which stay with AdamW.
    """

    def __init__(self, model: torch.nn.Module, weight_decay: float, outside: tuple[str, ...]):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if p.ndim > 1 and not n.startswith(outside)]
        chosen = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        self._parts = (
            Muon(inner, weight_decay),
            torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        )
        super().__init__([p for _, p in named], {"lr": 1.0})

    def step(self) -> None:
        """Update all parameters from their gradients at the learning rate of the first parameter group."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            part.step()

    def state_dict(self) -> dict:
        """Both optimizers' states."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def warmup_cosine(peak: float, warmup: int, steps: int, floor: float = 0.02) -> Callable[[int], float]:
    """Learning rate that rises linearly over `warmup` steps and falls along a half cosine to `floor * peak`."""

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return peak * (floor + (1 - floor) * 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi)))))

    return rate
