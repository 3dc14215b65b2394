"""Where ComfyUI manages memory dynamically, as it does by default on NVIDIA cards, its linear layers have no weights
until these are loaded."""

import pytest
import torch
from conceptloom.encoders.caption_prior import CaptionPrior, PriorConfig
from conceptloom.encoders.composer_adapter import ComposerAdapter, ComposerAdapterConfig
from conceptloom.encoders.promptnet import PromptNet, PromptNetConfig

pytestmark = pytest.mark.usefixtures("host")

NETS = {
    ComposerAdapter: ComposerAdapterConfig((32, 64), 24, 20, 16, 12, local_width=8, body=(8, 16)),
    CaptionPrior: PriorConfig(24, 32, 4, 2, 9),
    PromptNet: PromptNetConfig(
        (32, 32), (2, 2), attention=(True, True), vision_width=24, context_width=24, region=2, region_channels=16
    ),
}


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_files_are_loaded_as_without_it(monkeypatch, kind):
    import comfy.memory_management
    import comfy.ops

    torch.manual_seed(0)
    config = NETS[kind]
    state = kind(config).state_dict()
    architecture = config if kind is ComposerAdapter else config.heads
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    net = kind.from_state(state, architecture, comfy.ops.manual_cast)
    found = net.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    missing = dict(list(state.items())[:-1])
    with pytest.raises(ValueError, match="got nothing for"):
        kind.from_state(missing, architecture, comfy.ops.manual_cast)
