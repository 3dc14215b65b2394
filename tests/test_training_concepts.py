"""Augmentation, trained weights and loss of concept training, against naive computations."""

import pytest
import torch
from conceptloom.training.concepts.augment import AUGMENTATIONS, CUSTOM, GRAY, NONE, STRONG, augment
from conceptloom.training.concepts.learner import ConceptWeights, Recipe, latent_mask, masked_error, prediction_weight
from conceptloom.training.concepts.pictures import Pictures

KEYS = ["input.1.0", "middle.0.0"]


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


class TestAugmentation:
    def test_strong_pastes_a_third_to_the_whole_anywhere_on_gray(self):
        image = torch.full((40, 60, 3), 0.9)
        sizes, corners = [], set()
        for generator in generators(200):
            view = augment(image, None, 48, STRONG, generator)
            shown = (view.image[..., 0] - GRAY).abs() > 0.2
            rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
            sizes.append(len(rows))
            corners.add((int(rows[0]), int(columns[0])))
            assert len(rows) == len(columns)
            # The loss counts inside what is pasted alone.
            assert not view.mask[~shown].any()
            assert view.mask.sum() > 0
            assert view.prefix == ""
        assert min(sizes) in (16, 17) and max(sizes) > 45
        assert len(corners) > 100

    def test_custom_diffusion_says_what_it_does(self):
        image, said = torch.full((48, 48, 3), 0.9), {}
        for generator in generators(300):
            view = augment(image, None, 48, CUSTOM, generator)
            gray = float(((view.image[..., 0] - GRAY).abs() < 0.2).float().mean())
            said.setdefault(view.prefix, []).append(gray)
        assert set(said) == {"", "a far away ", "very small ", "zoomed in ", "close up "}
        assert min(said["a far away "] + said["very small "]) > 0.6
        assert max(said[""] + said["zoomed in "]) == 0
        crops = len(said["zoomed in "]) + len(said["close up "])
        assert 0.25 < crops / 300 < 0.42

    def test_none_is_the_middle_square_with_its_mask(self):
        image, mask = torch.rand(32, 48, 3), torch.zeros(32, 48)
        mask[:, :24] = 1
        view = augment(image, mask, 32, NONE, torch.Generator())
        assert torch.allclose(view.image, image[:, 8:40], atol=1e-6)
        assert torch.equal(view.mask[:, :15], torch.ones(32, 15)) and not view.mask[:, 17:].any()

    def test_a_mask_goes_with_its_picture(self):
        image, mask = torch.zeros(48, 48, 3), torch.zeros(48, 48)
        image[12:36, 12:36] = 1
        mask[12:36, 12:36] = 1
        for kind in AUGMENTATIONS:
            view = augment(image, mask, 48, kind, torch.Generator().manual_seed(4))
            assert view.image[view.mask > 0.9].min() > 0.8

    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(ValueError, match="augmentation: expected one of none, custom diffusion, strong"):
            augment(torch.zeros(8, 8, 3), None, 8, "weak", torch.Generator())


@pytest.mark.parametrize(("kind", "steps", "count"), [(NONE, 400, 3), (STRONG, 400, 96), (STRONG, 10, 21)])
def test_a_training_gets_no_more_views_than_it_sees(kind, steps, count):
    pictures = Pictures([torch.rand(32, 32, 3) for _ in range(3)], [None] * 3, ["a {}", "b {}", "c {}"])
    views = pictures.views(Recipe(steps=steps, augmentation=kind), 32)
    assert [caption for _, caption in views] == ["a {}", "b {}", "c {}"] * (count // 3)


class TestWeights:
    def build(self, rank):
        generator = torch.Generator().manual_seed(0)
        layers = {
            key: {part: torch.randn(6, 5, generator=generator) * (i + 1) for part in "kv"} for i, key in enumerate(KEYS)
        }
        weights = ConceptWeights(layers, {"l": torch.randn(2, 5, generator=generator)}, rank, seed=1)
        return layers, weights

    @pytest.mark.parametrize("rank", [0, 3])
    def test_they_start_as_nothing_and_add_what_the_concept_will(self, rank):
        _, weights = self.build(rank)
        context = torch.randn(2, 7, 5)
        assert not any(weights.addition(key, "k", context).any() for key in KEYS)
        for p in weights.parameters():
            torch.nn.init.normal_(p)
        for key, parts in weights.deltas().items():
            for part, delta in parts.items():
                added = weights.addition(key, part, context)
                assert torch.allclose(added, delta.apply(context), rtol=5e-3, atol=5e-2)

    def test_the_first_token_teaches_nothing(self):
        _, weights = self.build(0)
        context = torch.randn(1, 4, 5)
        added = weights.addition(KEYS[0], "k", context)
        (added[:, :1] * 3).sum().add(added[:, 1:].sum() * 0).backward()
        assert not weights.up["input_1_0_k"].grad.any()

    def test_one_rate_moves_layers_of_any_scale_alike(self):
        layers, weights = self.build(0)
        optimizer = torch.optim.AdamW(weights.parameters(), lr=0.01, weight_decay=0.0)
        context = torch.randn(1, 7, 5)
        sum(weights.addition(key, "v", context).sum() for key in KEYS).backward()
        optimizer.step()
        for key in KEYS:
            moved = weights.deltas()[key]["v"].matrix().square().mean().sqrt()
            assert float(moved / layers[key]["v"].square().mean().sqrt()) == pytest.approx(0.01, rel=0.01)

    def test_the_word_starts_where_it_was_told(self):
        _, weights = self.build(0)
        assert torch.equal(weights.tokens()["l"], weights.starts["l"])


@pytest.mark.parametrize("v_prediction", [False, True])
def test_the_loss_is_that_of_the_networks_own_prediction(v_prediction):
    """Against noise or v computed from their definitions in float64."""
    torch.manual_seed(0)
    x0, denoised, noise = (torch.randn(2, 4, 5, 5, dtype=torch.float64) for _ in range(3))
    sigma = torch.tensor([0.3, 5.0], dtype=torch.float64)
    mask = (torch.rand(2, 5, 5) > 0.5).double()
    s = sigma[:, None, None, None]
    alpha, spread = (1 + s**2).rsqrt(), s * (1 + s**2).rsqrt()
    z = alpha * x0 + spread * noise
    guessed_noise = (z - alpha * denoised) / spread
    if v_prediction:
        error = (alpha * guessed_noise - spread * denoised) - (alpha * noise - spread * x0)
    else:
        error = guessed_noise - noise
    expected = (error.square().mean(1) * mask).sum() / mask.sum()
    loss = masked_error(denoised, x0, mask, prediction_weight(sigma, v_prediction))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_mask_is_averaged_to_its_latent():
    mask = torch.zeros(8, 8)
    mask[:4, :2] = 1
    assert torch.equal(latent_mask(mask, (2, 2)), torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
