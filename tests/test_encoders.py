"""FastComposer's fuser, its reference pictures, and low-rank factors (spec oracles O1, O2, O7)."""

import math

import pytest
import torch
from conceptloom.encoders.clip_pixels import MEAN_COLOR, normalize, square
from conceptloom.encoders.fuser import Fuser, fuse_rows
from conceptloom.encoders.lora import factor
from conceptloom.encoders.reference import BLACK, KEEP, NOISE, prepare_reference


def oracle_fuser(width):
    """Weights by the specification's formula: sin(0.37 i + 1.3 k) for flat index i of parameter k."""
    fuser = Fuser(width, width).double()
    state = {}
    for k, (name, value) in enumerate(fuser.state_dict().items()):
        wave = torch.sin(0.37 * torch.arange(value.numel(), dtype=torch.float64) + 1.3 * k).view(value.shape)
        if value.ndim == 2:
            state[name] = wave / math.sqrt(value.shape[1])
        else:
            state[name] = 0.1 * wave + (1 if name.endswith("weight") else 0)
    fuser.load_state_dict(state)
    i = torch.arange(width, dtype=torch.float64)
    return fuser, torch.cos(0.05 * i), torch.sin(0.11 * i + 0.5)


def test_fuser_of_width_4():
    fuser, text, image = oracle_fuser(4)
    expected = torch.tensor([-1.15708422, 0.82638042, 0.89100072, -0.93939967], dtype=torch.float64)
    torch.testing.assert_close(fuser(text, image), expected, atol=1e-7, rtol=0)


def test_fuser_of_width_768():
    fuser, text, image = oracle_fuser(768)
    out = fuser(text, image)
    expected = torch.tensor([1.17520606, -0.14779997, 0.22354847, 1.53424606], dtype=torch.float64)
    torch.testing.assert_close(out[:4], expected, atol=1e-7, rtol=0)
    assert out[767].item() == pytest.approx(1.29202013, abs=1e-7)
    assert out.sum().item() == pytest.approx(-2.79820184, abs=1e-6)
    assert out.norm().item() == pytest.approx(27.66149606, abs=1e-6)
    assert sum(p.numel() for p in fuser.parameters()) == 2_958_336


def test_fuser_without_weights_is_a_layer_norm():
    fuser = Fuser(4, 4)
    with torch.no_grad():
        for name, p in fuser.named_parameters():
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    out = fuser(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.randn(4))
    expected = torch.tensor([-1.34163542, -0.44721181, 0.44721181, 1.34163542])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_fuser_of_two_text_encoders_is_found_from_its_weights():
    fuser = Fuser.from_state(Fuser(2048, 768).state_dict())
    assert (fuser.text_width, fuser.image_width) == (2048, 768)
    assert fuser(torch.randn(3, 2048), torch.randn(3, 768)).shape == (3, 2048)


def test_fuser_refuses_other_weights():
    with pytest.raises(ValueError, match="mlp1.fc1.weight"):
        Fuser.from_state({"x": torch.zeros(1)})
    state = Fuser(8, 8).state_dict()
    with pytest.raises(ValueError, match="shapes that fit"):
        Fuser.from_state({**state, "layer_norm.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="shapes that fit"):
        Fuser.from_state({**state, "mlp1.fc1.weight": torch.zeros(8, 8)})


def test_strength_and_emphasis():
    fuser, text, image = oracle_fuser(4)
    fuser, text, image = fuser.float(), text.float()[None], image.float()[None]
    fused, neutral = fuser(text, image), torch.randn(1, 4)
    assert torch.equal(fuse_rows(fuser, text, image, 0.0), text)
    torch.testing.assert_close(fuse_rows(fuser, text, image), fused)
    torch.testing.assert_close(fuse_rows(fuser, text, image, 0.25), text + 0.25 * (fused - text))
    loud = fuse_rows(fuser, text, image, 1.0, (torch.tensor([1.3]), neutral))
    torch.testing.assert_close(loud, neutral + 1.3 * (fused - neutral))
    assert torch.equal(fuse_rows(fuser, text, image, 1.0, (torch.tensor([1.0]), neutral)), fused)


def test_reference_is_padded_and_scaled_with_antialiasing():
    # 300 high, 200 wide: bars of 50 left and right become 37.33 pixels of 224.
    row = (square(torch.full((300, 200, 3), 128 / 255), 224)[112, :, 0] * 255).round().int().tolist()
    assert row[34:42] == [0, 0, 0, 83, 128, 128, 128, 128]
    assert row[::-1] == row


def test_pixels_are_those_that_clip_was_trained_on():
    white = normalize(torch.ones(2, 3, 1, 1))
    for channel, value in enumerate((1.9303361, 2.0748837, 2.1458969)):
        assert white[:, channel].flatten().tolist() == pytest.approx([value] * 2, abs=1e-6)
    mean = normalize(torch.tensor(MEAN_COLOR)[:, None, None] / 255)
    assert mean.abs().max() < 0.01


def test_odd_padding_squeezes_by_a_pixel_as_published():
    # 5 high, 2 wide is padded to 5x4, so the picture covers half the square: one pixel of five less than 2/5 would.
    white = square(torch.ones(5, 2, 3), 400)[200, :, 0]
    assert white.mean().item() == pytest.approx(0.5, abs=0.01)


def test_backgrounds_and_crop():
    image, mask = torch.full((64, 64, 3), 0.5), torch.zeros(32, 32)
    mask[8:24, 4:12] = 1  # 16 high, 8 wide, in half the picture's pixels
    assert torch.equal(prepare_reference(image, None, 64, BLACK, crop=True), prepare_reference(image, None, 64))
    assert torch.equal(prepare_reference(image, mask, 64, KEEP), prepare_reference(image, None, 64))
    black = prepare_reference(image, mask, 64, BLACK)
    assert black[32, 16, 0] == pytest.approx(0.5, abs=0.01) and black[:, 40:].max() == 0
    noise = prepare_reference(image, mask, 64, NOISE)
    assert noise[:, 40:].std() > 0.2 and torch.equal(noise, prepare_reference(image, mask, 64, NOISE))
    cropped = prepare_reference(image, mask, 64, BLACK, crop=True)
    assert (cropped[:, 18:46] > 0.3).all() and cropped[:, :15].max() == 0
    empty = torch.zeros(64, 64)
    assert torch.equal(prepare_reference(image, empty, 64, KEEP), prepare_reference(image, None, 64))
    for background, crop in ((KEEP, True), (NOISE, False), (BLACK, False)):
        with pytest.raises(ValueError, match="empty"):
            prepare_reference(image, empty, 64, background, crop)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 5, 3, 3)])
def test_factors_are_the_nearest_of_their_rank(shape):
    difference = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(difference.flatten(1))
    for rank in (1, 3, 99):
        up, down = factor(difference, rank)
        error = (difference.flatten(1) - up.flatten(1).double() @ down.flatten(1).double()).norm()
        torch.testing.assert_close(error, values[rank:].norm(), atol=1e-5, rtol=1e-5)
    assert down.shape[1:] == difference.shape[1:]


def test_reference_is_torchvision_s_to_one_gray_level():
    v2 = pytest.importorskip("torchvision.transforms.v2.functional", reason="torchvision is not installed")
    generator = torch.Generator().manual_seed(0)
    for height, width in ((300, 200), (131, 97), (64, 250), (224, 224)):
        pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        pad = abs(height - width) // 2
        padded = v2.pad(pixels, [pad, 0, pad, 0] if height > width else [0, pad, 0, pad])
        expected = v2.resize(padded, [224, 224], antialias=True).int()
        ours = (square(pixels.movedim(0, -1) / 255, 224) * 255).round().int().movedim(-1, 0)
        assert (ours - expected).abs().max() <= 1
