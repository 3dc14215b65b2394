"""FastComposer's training losses against the numbers of the specification (oracles O5, O6)."""

import pytest
import torch
import torch.nn.functional as F
from conceptloom.attention.localization import localization_loss, masked_noise_loss, mean_of_pictures


def layer(*maps):
    """Attention probabilities (1, 4, tokens) whose columns are the given maps of a 2x2 grid."""
    return torch.tensor(maps, dtype=torch.float64).mT[None]


def marked(tokens, count):
    """Subjects (n, subjects) by the index of their token, as marks among `count` tokens."""
    return F.one_hot(torch.tensor(tokens), count)


def published(*present):
    """Weights of subjects (n, subjects)."""
    return mean_of_pictures(torch.tensor(present, dtype=torch.float64))


CORNER = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
ONE = marked([[0]], 1), CORNER, published([1])


@pytest.mark.parametrize(
    "values, loss",
    [
        ([0.9, 0.1, 0.1, 0.1], -0.79998330),
        ([0.25] * 4, 1.6667e-6),
        ([1.0, 0.0, 0.0, 0.0], -0.99997999),
    ],
)
def test_one_subject(values, loss):
    assert localization_loss([layer(values)], *ONE).item() == pytest.approx(loss, abs=1e-7)


def test_pictures_without_subjects_count_as_zero():
    # The mean of two heads, [.9, .1, .1, .1] and [.5, .1, .1, .1].
    heads = layer([0.7, 0.1, 0.1, 0.1])
    maps = torch.cat((heads, torch.rand_like(heads)))
    loss = localization_loss([maps], marked([[0], [0]], 1), CORNER.repeat(2, 1, 1, 1), published([1], [0]))
    assert loss.item() == pytest.approx(-0.29999366, abs=1e-8)


def test_two_subjects_layers_and_gradient():
    left = torch.zeros(4, 4, dtype=torch.float64)
    left[:, :2] = 1
    masks, weights = torch.stack((left, 1 - left))[None], published([1, 1])
    first = layer([0.6, 0.2, 0.6, 0.2], [0.1, 0.7, 0.1, 0.7]).requires_grad_()
    order, swapped = marked([[0, 1]], 2), marked([[1, 0]], 2)
    loss = localization_loss([first], order, masks, weights)
    assert loss.item() == pytest.approx(-0.35713929, abs=1e-8)
    loss.backward()
    expected = torch.tensor([-0.17856964, 0.17856964, -0.17856964, 0.17856964], dtype=torch.float64)
    torch.testing.assert_close(first.grad[0, :, 0], expected, atol=1e-8, rtol=0)
    assert localization_loss([first], swapped, masks, weights).item() == pytest.approx(0.35713929, abs=1e-8)
    halved = localization_loss([first, torch.zeros_like(first)], order, masks, weights)
    assert halved.item() == pytest.approx(-0.17856964, abs=1e-8)


def test_masks_are_scaled_with_antialiasing():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    mask[..., :3] = 1
    inside = torch.tensor([0.67857143, 0.03571429] * 2, dtype=torch.float64)
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    outside = 1 - inside
    expected = attention @ outside / (outside.sum() + 1e-5) - attention @ inside / (inside.sum() + 1e-5)
    loss = localization_loss([layer(attention.tolist())], marked([[0]], 1), mask, published([1]))
    assert loss.item() == pytest.approx(expected.item() / (1 + 1e-5), abs=1e-7)


def test_tokens_of_a_subject_are_summed_and_weights_and_scaling_are_the_callers():
    masks = torch.zeros(1, 3, 16, 16)
    masks[0, 0, :8] = 1
    tokens = torch.zeros(1, 3, 6)
    tokens[0, 0, [4, 5]] = 1
    attention = torch.zeros(1, 64, 6)
    attention[0, :32, 4], attention[0, :32, 5] = 0.5, 0.25
    attention[0, 32:, 4] = 0.125
    weights = torch.tensor([[2.0, 0.0, 0.0]])
    loss = localization_loss([attention], tokens, masks, weights, F.adaptive_avg_pool2d)
    assert float(loss) == pytest.approx(2 * (0.125 - 0.75))


def test_half_precision_rounds_no_attention():
    maps, rest = torch.rand(1, 4, 1), (marked([[0]], 1), CORNER, published([1]))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = localization_loss([maps], *rest)
    assert torch.equal(rounded, localization_loss([maps], *rest))


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
