"""DDIM inversion on models whose denoiser is known in closed form (spec section C4, oracles I1 and I2)."""

import math

import pytest
import torch
from conceptloom.samplers.inversion import (
    EULER,
    MODES,
    PNP,
    Trajectory,
    invert,
    reconstruct,
    relative_error,
    renew,
    rising,
)


def schedule(steps):
    """The host's ddim_uniform on Stable Diffusion's betas, falling to 0; steps shall divide 1000."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    levels = ((1 - alpha_bar) / alpha_bar).sqrt()[1 :: 1000 // steps]
    return torch.cat([levels.flip(0), levels.new_zeros(1)])


class Mixture:
    """Equal Gaussians around `means` (M, D), as a data set whose best denoiser is a formula."""

    def __init__(self, means, spread):
        self.means, self.spread = means, spread

    def __call__(self, x, sigma):
        variance = (sigma**2 + self.spread**2)[:, None]
        weights = torch.softmax(-(torch.cdist(x, self.means) ** 2) / (2 * variance), dim=1)
        return (self.spread**2 * x + sigma[:, None] ** 2 * (weights @ self.means)) / variance

    def draw(self, count, generator):
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[chosen] + self.spread * noise


@pytest.fixture(scope="module")
def world():
    """The mixture and 32 pictures of it."""
    generator = torch.Generator().manual_seed(0)
    mixture = Mixture(torch.randn(8, 16, generator=generator, dtype=torch.float64), 0.25)
    return mixture, mixture.draw(32, generator)


def round_trip(model, x, steps, mode=PNP, refinements=0):
    """Mean relative error of the reconstruction."""
    sigmas = schedule(steps)
    noise, _ = invert(model, x, rising(sigmas), mode, refinements)
    return float(relative_error(reconstruct(model, noise, sigmas), x).mean())


def test_euler_is_the_flipped_schedule_bit_by_bit(world):
    model, x = world
    levels = schedule(20).flip(0)
    levels[0] = 1e-4
    naive = x
    for a, b in zip(levels[:-1], levels[1:], strict=True):
        d = (naive - model(naive, a.expand(len(x)))) / a
        naive = naive + d * (b - a)
    noise, _ = invert(model, x, rising(schedule(20)), EULER)
    assert torch.equal(noise, naive)


def test_pnp_is_the_published_update_of_variance_preserving_latents(world):
    """z_b = sqrt(ab_b) (z_a - sqrt(1 - ab_a) eps) / sqrt(ab_a) + sqrt(1 - ab_b) eps, with eps of z_a at time b."""
    model, x = world
    levels = schedule(20).flip(0)
    alpha_bar = 1 / (1 + levels**2)
    z = x
    for a, b, sigma in zip(alpha_bar[:-1], alpha_bar[1:], levels[1:], strict=True):
        seen = z / b.sqrt()
        eps = (seen - model(seen, sigma.expand(len(x)))) / sigma
        z = b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    noise, _ = invert(model, x, rising(schedule(20)), PNP)
    torch.testing.assert_close(noise * alpha_bar[-1].sqrt(), z, rtol=1e-10, atol=1e-10)


def test_error_of_pnp_halves_when_the_steps_double(world):
    errors = [round_trip(*world, steps) for steps in (50, 100, 200, 500)]
    orders = [math.log(a / b) / math.log(n) for a, b, n in zip(errors[:-1], errors[1:], (2, 2, 2.5), strict=True)]
    assert all(0.85 <= order <= 1.1 for order in orders), (errors, orders)


def test_one_refinement_beats_pnp_five_times_and_more_converge(world):
    pnp, one, three, eight = (round_trip(*world, 50, refinements=k) for k in (0, 1, 3, 8))
    assert one <= 0.2 * pnp, (pnp, one)
    assert eight < three < one and eight < 1e-5, (one, three, eight)


def test_pnp_is_nearer_than_euler(world):
    assert round_trip(*world, 50) < round_trip(*world, 50, EULER)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_sees_no_noise_changes_nothing(mode):
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    for refinements in (0, 3):
        noise, trajectory = invert(lambda x, sigma: x, x, rising(schedule(10)), mode, refinements)
        assert torch.equal(noise, x)
        assert all(torch.equal(kept, x.float()) for kept in trajectory.latents)
        assert torch.equal(reconstruct(lambda x, sigma: x, noise, schedule(10)), x)


def test_linear_models_come_back_exactly_with_many_refinements():
    """eps = A x with a contracting step: the fixed point is solved by the matrix."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 12
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)

    def model(x, sigma):
        return x - sigma[:, None] * (x @ matrix)

    sigmas = torch.tensor([4.0, 2.5, 1.5, 0.7, 0.0], dtype=torch.float64)
    noise, _ = invert(model, x, rising(sigmas), PNP, 60)
    exact = x
    for step in sigmas.flip(0).diff():
        exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - step * matrix, exact, left=False)
    torch.testing.assert_close(noise, exact, rtol=1e-12, atol=1e-12)
    assert float(relative_error(reconstruct(model, noise, sigmas), x).max()) < 1e-13


def growing(rates):
    """eps = rate x, one rate for each picture: refinement diverges where rate times step is above 1."""
    rates = torch.tensor(rates, dtype=torch.float64)[:, None]
    return lambda x, sigma: x - sigma[:, None] * rates * x


def test_refinements_that_grow_are_taken_back_picture_by_picture():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    levels = torch.tensor([0.0, 2.0], dtype=torch.float64)
    calls = []

    def model(x, sigma):
        calls.append(len(x))
        return growing([0.1, 0.9])(x, sigma)

    plain, _ = invert(model, x, levels, PNP)
    calls.clear()
    refined, _ = invert(model, x, levels, PNP, 30)
    assert torch.equal(refined[1], plain[1])
    torch.testing.assert_close(refined[0], x[0] / (1 - 0.2), rtol=1e-12, atol=0)
    for i, rate in enumerate((0.1, 0.9)):
        alone, _ = invert(growing([rate]), x[i : i + 1], levels, PNP, 30)
        assert torch.equal(alone[0], refined[i])
    calls.clear()
    invert(lambda x, sigma: (calls.append(1), growing([0.9])(x, sigma))[1], x[1:], levels, PNP, 30)
    assert len(calls) == 3  # the step itself, and the two evaluations that show the growth


def test_a_refinement_that_is_not_finite_is_taken_back():
    evaluations = []

    def model(x, sigma):
        evaluations.append(x)
        return x * (float("nan") if len(evaluations) == 2 else 0.5)

    noise, _ = invert(model, torch.ones(1, 3), torch.tensor([0.5, 1.0]), EULER, 4)
    assert torch.equal(noise, torch.full((1, 3), 1.5)) and len(evaluations) == 2


def test_steps_are_reported_as_they_end(world):
    model, x = world
    seen = []
    noise, trajectory = invert(model, x, rising(schedule(4)), refinements=1, report=lambda *step: seen.append(step))
    assert [i for i, *_ in seen] == [0, 1, 2, 3]
    assert [float(sigma) for *_, sigma, _ in seen] == list(trajectory.sigmas[1:])
    assert torch.equal(seen[-1][1], noise) and seen[0][3].shape == x.shape


def test_trajectory_holds_all_levels_and_straight_lines_between(world):
    model, x = world
    noise, trajectory = invert(model, x, rising(schedule(10)), EULER)
    assert trajectory.latents.dtype == torch.float32 and trajectory.latents.shape == (11, *x.shape)
    assert trajectory.sigmas[0] == 1e-4 and trajectory.sigmas[1:] == tuple(schedule(10).flip(0).tolist()[1:])
    for sigma, latents in zip(trajectory.sigmas, trajectory.latents, strict=True):
        assert torch.equal(trajectory.at(sigma), latents)
    assert torch.equal(trajectory.latents[0], x.float()) and torch.equal(trajectory.latents[-1], noise.float())
    low, high = trajectory.sigmas[4:6]
    middle = 0.75 * trajectory.latents[4] + 0.25 * trajectory.latents[5]
    torch.testing.assert_close(trajectory.at(0.75 * low + 0.25 * high), middle)
    # Half an Euler step from level 4 is on that line too.
    start = trajectory.latents[4].double()
    eps = (start - model(start, torch.full((len(x),), low, dtype=torch.float64))) / low
    torch.testing.assert_close(trajectory.at((low + high) / 2), (start + eps * (high - low) / 2).float())
    assert torch.equal(trajectory.at(0.0), trajectory.latents[0])
    assert torch.equal(trajectory.at(1e9), trajectory.latents[-1])


@pytest.mark.parametrize(
    "sigmas", [[1.0], [1.0, 2.0], [2.0, 1.0, 1.0], [1.0, -1.0], [float("nan"), 0.0], [float("inf"), 0.0], [[2.0, 1.0]]]
)
def test_schedules_that_do_not_fall_get_their_sentence(sigmas):
    with pytest.raises(ValueError, match="sigmas: expected at least two noise levels, each lower than the one before"):
        rising(torch.tensor(sigmas))


def test_other_bad_input_gets_its_sentence():
    x, levels = torch.ones(1, 3), torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="mode: expected one of pnp, euler, got 'heun'"):
        invert(lambda x, sigma: x, x, levels, "heun")
    with pytest.raises(ValueError, match="refinements: expected 0 or more, got -1"):
        invert(lambda x, sigma: x, x, levels, PNP, -1)
    with pytest.raises(ValueError, match="expected one noise level for each of the latents, got 1 for 2"):
        Trajectory((1.0,), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="expected rising noise levels"):
        Trajectory((1.0, 0.5), torch.zeros(2, 1, 3))


def test_renewed_noise_is_as_strong_and_forgets_what_its_share_says():
    generator = torch.Generator().manual_seed(5)
    noise = 14.6 * torch.randn(2, 4, 64, 64, generator=generator)
    noise[1] *= 3
    fresh = torch.randn(2, 4, 64, 64, generator=generator)
    share = torch.zeros(64, 64)
    share[:, 16:32], share[:, 32:] = 0.25, 1.0
    found = renew(noise, fresh, share)
    assert torch.equal(found[..., :16], noise[..., :16])
    strength = noise.square().mean((1, 2, 3)).sqrt()
    for picture, wanted in zip(found, strength, strict=True):
        for part in (picture[..., 16:32], picture[..., 32:]):
            assert part.square().mean().sqrt() == pytest.approx(float(wanted), rel=0.03)

    def likeness(a, b):
        return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))

    assert likeness(found[..., 16:32], noise[..., 16:32]) == pytest.approx(0.75**0.5, abs=0.03)
    assert likeness(found[..., 32:], noise[..., 32:]) == pytest.approx(0, abs=0.03)
    assert torch.allclose(found[0, ..., 32:], fresh[0, ..., 32:] * strength[0], rtol=1e-5)
