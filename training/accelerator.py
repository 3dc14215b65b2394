"""The accelerator of a training command line."""

from __future__ import annotations

from argparse import Namespace


def accelerator_of(options: Namespace):
    """accelerate's `Accelerator` for the options of `options.add_run`.

    Raises:
        ValueError: the device cannot compute in the requested precision.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(f"--precision: expected no or bf16 on a {accelerator.device.type}, got fp16")
    return accelerator
