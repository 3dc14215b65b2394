"""`python tools/dev.py bench`: what every system costs, as a ratio to plain sampling in the same run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from .quiet import without_warnings
from .tables import markdown, write_json, write_section

if TYPE_CHECKING:
    from .benches import Session
    from .rigs import Rig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "bench.md"
ARCHITECTURES = ("tiny", "sd15", "sdxl")
DEVICES = ("cpu", "cuda")
HOST = "host"
"""System name in the rows of plain sampling."""

PREFACE = """\
# What the systems cost

Made by the commands below; do not edit. Models have their true architecture and random weights. Every variant takes
turns with plain sampling: its ratio is the median over rounds of its seconds by those of the plain sampling before it.
Encoding prompts and references is not counted.

UNet evaluations are rows of whole passes; a pass that ends early counts as the part of a row's floating-point
operations that it ran. Peak memory on the CPU is the growth of resident memory over the loaded model, at its peak,
in a process of its own per number of subjects; on CUDA it is the most that torch had allocated, the model included.

*GPU ratio* compares the seconds that the GPU spent computing, measured once. With one small picture a fast GPU mostly
waits for the CPU to start operations; *ratio* then reflects their number rather than the work in them."""


@dataclass(frozen=True)
class Cost:
    """One row of the benchmark; `subjects` is 0 for plain sampling. `peak_mib` and `gpu_ratio`, which only
    CUDA has, as in PREFACE."""

    system: str
    variant: str
    arch: str
    subjects: int
    ratio: float
    seconds: float
    peak_mib: float
    unet_evaluations: float
    gpu_ratio: float | None = None

    def as_json(self) -> dict:
        """The row as a dict."""
        return asdict(self)


def systems() -> list[str]:
    """Names of the systems that have a benchmark."""
    # By path: importing the package would import ComfyUI, which --help does not need.
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "benches")])]


def sessions_of(system: str, rig: Rig) -> list[Session]:
    """The sessions of a system; for HOST, that of plain sampling."""
    from .benches import plain_session

    if system == HOST:
        return [plain_session(rig)]
    return importlib.import_module(f".benches.{system}", __package__).sessions(rig)


def facts_of(system: str, rig: Rig) -> list[str]:
    """Sentences about a system's costs outside its sessions; none if its module has no `facts`."""
    module = importlib.import_module(f".benches.{system}", __package__)
    return module.facts(rig) if hasattr(module, "facts") else []


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    result = argparse.ArgumentParser(prog="dev.py bench", description=__doc__)
    add = result.add_argument
    add("systems", metavar="SYSTEM", nargs="*", help=f"of {', '.join(systems())}; all if none is named")
    add("--json", metavar="FILE", type=Path, help="write the rows to this file")
    add("--device", choices=DEVICES, default=DEVICES[torch.cuda.is_available()], help="default: %(default)s")
    add("--arch", choices=ARCHITECTURES, default="tiny", help="default: %(default)s")
    add("--docs", action="store_true", help="write this architecture's section of docs/bench.md")
    return result


def peak_memory(system: str, session: Session, arch: str, device: torch.device) -> dict[str, float]:
    """Peak MiB of each variant of a session; see PREFACE."""
    if device.type == "cpu":
        runner = [sys.executable, str(ROOT / "tools" / "run.py"), "evaluation.memory"]
        # Without a visible GPU, ComfyUI uses the CPU.
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        words = [system, arch, str(session.subjects)]
        done = subprocess.run([*runner, *words], cwd=ROOT, env=environ, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    peaks = {}
    for variant, sample in session.begin().items():
        torch.cuda.reset_peak_memory_stats(device)
        sample()
        peaks[variant] = torch.cuda.max_memory_allocated(device) / 2**20
    return peaks


def evaluations(rig: Rig, session: Session, flops_per_row: float) -> dict[str, float]:
    """UNet evaluations of each variant of a session; also warms it up."""
    from .meters import counted_calls

    counts = {}
    for variant, sample in session.begin().items():
        with counted_calls(rig.model.model.diffusion_model) as calls:
            sample()
        counts[variant] = calls.evaluations(flops_per_row)
    return counts


def measure_costs(rig: Rig, names: list[str], arch: str) -> list[Cost]:
    """Measures plain sampling and the systems; one row per variant.

    Args:
        rig: the model.
        names: names of the systems.
        arch: name of the architecture, for the processes that measure memory.
    """
    from .meters import counted_calls, gpu_seconds_of, seconds_of

    device = rig.model.load_device
    plan = rig.plan

    def sample_plain():
        return rig.sample(rig.model, 1)

    with counted_calls(rig.model.model.diffusion_model) as calls:
        sample_plain()
    per_row = calls.flops_per_row()
    sample_plain()
    plain_seconds, rows = [], []
    for name in names:
        for session in sessions_of(name, rig):
            counts = evaluations(rig, session, per_row)
            seconds: dict[str, list[float]] = {}
            ratios: dict[str, list[float]] = {}
            for _ in range(plan.rounds):
                plain = seconds_of(sample_plain, device)
                plain_seconds.append(plain)
                for variant, sample in session.begin().items():
                    seconds.setdefault(variant, []).append(seconds_of(sample, device))
                    ratios.setdefault(variant, []).append(seconds[variant][-1] / plain)
            of_gpu: dict[str, float] = {}
            if device.type == "cuda":
                plain = gpu_seconds_of(sample_plain, device)
                of_gpu = {one: gpu_seconds_of(sample, device) / plain for one, sample in session.begin().items()}
            peaks = peak_memory(name, session, arch, device)
            rows += [
                Cost(
                    name, variant, plan.label, session.subjects,
                    median(ratios[variant]), median(seconds[variant]), peaks[variant], counts[variant],
                    of_gpu.get(variant),
                )
                for variant in counts
            ]  # fmt: skip
    plain_peak = peak_memory(HOST, sessions_of(HOST, rig)[0], arch, device)["plain"]
    whole = calls.evaluations(per_row)
    return [Cost(HOST, "plain", plan.label, 0, 1.0, median(plain_seconds), plain_peak, whole), *rows]


def cost_table(rows: list[Cost], budgets: dict[tuple[str, str, int], float]) -> str:
    """A table of the rows with their budgets; a ratio over its budget is marked."""
    on_gpu, lines = any(row.gpu_ratio is not None for row in rows), []
    for row in rows:
        budget = budgets.get((row.system, row.variant, row.subjects))
        # Compared as printed, because further digits are not shown.
        over = " over" if budget is not None and round(row.ratio, 2) > budget else ""
        lines.append(
            [
                row.system,
                row.variant,
                str(row.subjects),
                f"{row.ratio:.2f}{over}",
                "" if budget is None else f"{budget:.2f}",
                *(["1.00" if row.gpu_ratio is None else f"{row.gpu_ratio:.2f}"] if on_gpu else []),
                f"{row.seconds:.3g}",
                f"{row.peak_mib:.1f}",
                f"{row.unet_evaluations:.1f}",
            ]
        )
    header = ["system", "variant", "subjects", "ratio", "budget", *(["GPU ratio"] if on_gpu else [])]
    header += ["seconds", "peak MiB", "UNet evaluations"]
    return markdown(header, lines)


def main(argv: list[str]) -> int:
    """Measures the named systems and returns the exit code."""
    options = parser().parse_args(argv)
    names = options.systems or systems()
    for name in names:
        if name not in systems():
            parser().error(f"there is no benchmark of {name!r} yet: choose from {', '.join(systems())}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device: expected cpu, since torch sees no CUDA card here, got cuda")
    # ComfyUI chooses its device when it is first imported, so this comes before the modules that import it.
    from comfy.cli_args import args

    args.cpu = args.cpu or options.device == "cpu"
    from .rigs import CFG, PLANS, SAMPLER, SCHEDULER, Rig

    plan = PLANS[options.arch, options.device]
    with torch.inference_mode(), without_warnings():
        rig = Rig.build(plan)
        budgets = {
            (name, variant, session.subjects): budget
            for name in names
            for session in sessions_of(name, rig)
            for variant, budget in session.budgets.items()
        }
        rows = measure_costs(rig, names, options.arch)
        facts = "".join(f"\n- {fact}" for name in names for fact in facts_of(name, rig))
    where = f"{torch.get_num_threads()} threads of a CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    # A section per choice of systems, so that measuring one does not replace the others' figures.
    title = ", ".join([f"{plan.label} on {options.device}", *options.systems])
    how = (
        f"Latent {plan.side}x{plan.side}, one picture, {plan.steps} steps of {SAMPLER} ({SCHEDULER}), cfg {CFG:g}, "
        f"{plan.rounds} rounds, on {where}."
    )
    table = cost_table(rows, budgets) + (f"\n{facts}" if facts else "")
    print(f"{title}. {how}\n{table}")
    if options.json:
        write_json(options.json, [row.as_json() for row in rows])
    if options.docs:
        command = " ".join(
            [
                "python tools/dev.py bench",
                *options.systems,
                "--arch",
                options.arch,
                "--device",
                options.device,
                "--docs",
            ]
        )
        write_section(DOCUMENT, PREFACE, title, f"`{command}`\n\n{how}\n\n{table}")
    return 0
