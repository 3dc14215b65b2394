"""FastComposer's training losses against the numbers of the specification (oracles O5, O6)."""

import pytest
import torch
from conceptloom.attention.localization import localization_loss, masked_noise_loss


def layer(*maps):
    """Attention probabilities (1, 1, 4, tokens) whose columns are the given maps of a 2x2 grid."""
    return torch.tensor(maps, dtype=torch.float64).mT[None, None]


CORNER = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
ONE = torch.tensor([[0]]), CORNER, torch.tensor([[True]])


@pytest.mark.parametrize(
    "values, normalize, loss",
    [
        ([0.9, 0.1, 0.1, 0.1], False, -0.79998330),
        ([0.9, 0.1, 0.1, 0.1], True, -0.88886048),
        ([0.25] * 4, False, 1.6667e-6),
        ([1.0, 0.0, 0.0, 0.0], False, -0.99997999),
    ],
)
def test_one_subject(values, normalize, loss):
    assert localization_loss([layer(values)], *ONE, normalize).item() == pytest.approx(loss, abs=1e-7)


def test_pictures_without_subjects_count_as_zero_and_heads_are_averaged():
    heads = torch.cat((layer([0.9, 0.1, 0.1, 0.1]), layer([0.5, 0.1, 0.1, 0.1])), 1)
    maps = torch.cat((heads, torch.rand_like(heads)))
    tokens, masks = torch.zeros(2, 1, dtype=torch.long), CORNER.repeat(2, 1, 1, 1)
    loss = localization_loss([maps], tokens, masks, torch.tensor([[True], [False]]))
    assert loss.item() == pytest.approx(-0.29999366, abs=1e-8)


def test_two_subjects_layers_and_gradient():
    left = torch.zeros(4, 4, dtype=torch.float64)
    left[:, :2] = 1
    masks, present = torch.stack((left, 1 - left))[None], torch.tensor([[True, True]])
    first = layer([0.6, 0.2, 0.6, 0.2], [0.1, 0.7, 0.1, 0.7]).requires_grad_()
    order, swapped = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    loss = localization_loss([first], order, masks, present)
    assert loss.item() == pytest.approx(-0.35713929, abs=1e-8)
    loss.backward()
    expected = torch.tensor([-0.17856964, 0.17856964, -0.17856964, 0.17856964], dtype=torch.float64)
    torch.testing.assert_close(first.grad[0, 0, :, 0], expected, atol=1e-8, rtol=0)
    assert localization_loss([first], swapped, masks, present).item() == pytest.approx(0.35713929, abs=1e-8)
    halved = localization_loss([first, torch.zeros_like(first)], order, masks, present)
    assert halved.item() == pytest.approx(-0.17856964, abs=1e-8)


def test_masks_are_scaled_with_antialiasing():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    mask[..., :3] = 1
    inside = torch.tensor([0.67857143, 0.03571429] * 2, dtype=torch.float64)
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    outside = 1 - inside
    expected = attention @ outside / (outside.sum() + 1e-5) - attention @ inside / (inside.sum() + 1e-5)
    loss = localization_loss([layer(attention.tolist())], torch.tensor([[0]]), mask, torch.tensor([[True]]))
    assert loss.item() == pytest.approx(expected.item() / (1 + 1e-5), abs=1e-7)


def test_no_attention_map_is_an_error_and_not_zero():
    with pytest.raises(ValueError, match="expected attention maps"):
        localization_loss([], *ONE)


def test_masked_noise_loss():
    prediction, target = torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    masks = torch.zeros(2, 2, 2, 2)
    masks[0, 0, 0, 0] = masks[0, 1, 1, 1] = 1
    both = torch.tensor([True, True])
    assert masked_noise_loss(prediction, target, masks, both).item() == pytest.approx(0.25)
    assert masked_noise_loss(prediction, target, masks, ~both).item() == 1.0
    assert masked_noise_loss(prediction, target, masks, torch.tensor([True, False])).item() == pytest.approx(0.75)
