"""Trains PromptNet on diffusers' models, in one process or many."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from ...encoders.files import read_state
from ...encoders.promptnet import PREFIX, PromptNet, PromptNetConfig, save
from ..base import Base, open_base
from ..draws import Shares, drawn_batches
from ..on_pictures import accelerator_of, spread, train_on_pictures
from ..options import UNET_LEAST, check_run
from ..sampling import States
from ..shapeland.common import save_sheet
from .model import PromptNetTraining
from .pictures import Things, collate

SHOWN, SHEET_STEPS, GUIDANCE = 8, 25, 5.0
_SCALED_TO = 128
_LEAST = {**UNET_LEAST, "learning_rate": 0, "l2": 0, "region_channels": 1}


def train(options: Namespace, file: Path) -> None:
    """Runs the training of `options` (see the package) and writes its result to `file`.

    Raises:
        ValueError, FileNotFoundError: an option cannot be used; the message says which and why.
    """
    check_run(options, _LEAST)
    base = open_base(options.base, options.vision, options.resolution)
    data = Things(options.data, options.caption, base.resolution, options.seed)
    accelerator = accelerator_of(options)
    config = config_of(base, options.channels, options.region_channels)
    model = PromptNetTraining(base, config, options.l2, options.seed)
    if options.start:
        start_from(model.promptnet, options.start)
    if options.checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    kind = {"channels": list(config.channels), "caption": options.caption}
    weights = list(model.promptnet.parameters())
    optimizer = torch.optim.AdamW(weights, options.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    read = partial(collate, vocabulary=base.vocabularies[0])

    def batches(shares: Shares):
        return drawn_batches(data, base, shares, options.workers, read, accelerator.device)

    sheet = None
    if options.sheet_every:
        sheet = partial(draw_sheet, model, read([data[row, 0] for row in spread(len(data), SHOWN)]))
    run = train_on_pictures(options, accelerator, model, optimizer, len(data), batches, kind, sheet)
    if run:
        export(model.promptnet, run.best_state(), file)
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def config_of(base: Base, channels: list[int] | None = None, region_channels: int = 128) -> PromptNetConfig:
    """The architecture for a base: its UNet's, or with other channels, and one vector at the base's resolution.

    Raises:
        ValueError: the number of levels is not the UNet's, or a width does not suit.
    """
    unet, levels = base.unet.config, len(base.unet.config.block_out_channels)
    heads = unet.attention_head_dim  # diffusers' name for the number of heads
    heads = (heads,) * levels if isinstance(heads, int) else tuple(heads)
    chosen = tuple(channels or unet.block_out_channels)
    if len(chosen) != levels or any(width < 32 or width % 32 for width in chosen):
        raise ValueError(f"--channels: expected {levels} multiples of 32, got {' '.join(map(str, chosen))}")
    if any(width % count for width, count in zip(chosen, heads, strict=True)):
        raise ValueError(
            f"--channels: expected multiples of the base's numbers of heads ({' '.join(map(str, heads))}), got "
            f"{' '.join(map(str, chosen))}"
        )
    side = base.latent_shape[-1]
    return PromptNetConfig(
        channels=chosen,
        heads=heads,
        attention=tuple(kind.startswith("CrossAttn") for kind in unet.down_block_types),
        layers=unet.layers_per_block,
        latent_channels=unet.in_channels,
        vision_width=base.vision.config.hidden_size,
        context_width=base.towers[0].config.hidden_size,
        region=side // 2 ** (levels - 1),
        region_channels=region_channels,
        linear_projection=bool(unet.use_linear_projection),
    )


def start_from(net: PromptNet, path: Path) -> None:
    """Gives a PromptNet the weights of the one in a file.

    Raises:
        ValueError: the file holds no PromptNet of this architecture.
    """
    try:
        found = PromptNet.from_state(read_state(path, "--start"), net.config.heads)
    except ValueError as error:
        raise ValueError(f"--start: expected a PromptNet of this architecture, got {path.name} ({error})") from error
    if found.config != net.config:
        raise ValueError(f"--start: expected a PromptNet of this architecture, got {path.name} with {found.config}")
    net.load_state_dict(found.state_dict())


def export(net: PromptNet, state: dict[str, torch.Tensor], file: Path) -> None:
    """Writes the PromptNet of a training's weights in fp16, as Load PromptNet reads it."""
    save(net, file, {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)})


@torch.no_grad()
def draw_sheet(model: PromptNetTraining, batch: dict[str, torch.Tensor], path: Path) -> None:
    """Draws a row for each picture of a batch: the reference, the picture itself, and two samples of its caption."""
    device, base = next(model.parameters()).device, model.base
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    count = len(batch["target"])
    seen = model.see(batch["reference"], torch.zeros(count, *base.latent_shape, device=device))
    empty = base.vocabularies[0].row("")
    nothing = model.tower(torch.tensor([empty] * count, device=device)).last_hidden_state.float(), None
    rows = [batch["reference"], batch["target"]]

    def states(_step: int, x: torch.Tensor, t: torch.Tensor) -> States:
        return model.read(batch["tokens"], batch["place"], model.words(seen, x, t))

    for seed in range(2):
        latents = base.sample(nothing, states, count, SHEET_STEPS, GUIDANCE, seed)
        rows.append(model.autoencoder.decode(latents))
    pictures = torch.stack(rows, 1).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(pictures, path, columns=len(rows), scale=max(1, _SCALED_TO // base.resolution))
