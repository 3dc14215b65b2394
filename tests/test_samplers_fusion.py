"""Fusion sampling against the published form of its equations, and against laws that can be written down."""

from itertools import pairwise

import pytest
import torch
from conceptloom.samplers.fusion import (
    FOLLOWING,
    FUSION,
    REFINEMENT,
    STAGE,
    Fusion,
    Levels,
    combine,
    renew,
    sample_fusion,
    shares,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)
SIGMA = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()
LOWEST = Levels(lowest=float(SIGMA[0]))
TIMES = list(range(981, 0, -20))
"""Of ddim_uniform with 50 steps."""


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=0.0, noise_sampler=None):
    """DDIM, with the same split of the variance as k-diffusion's."""
    sigma, following = sigmas
    denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
    if callback is not None:
        callback({"i": 0, "denoised": denoised})
    up = eta * (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()
    down = (following**2 - up**2).sqrt()
    x = denoised + down / sigma * (x - denoised)
    return x + up * noise_sampler(sigma, following) if eta else x


def published_fusion(z, eps, noise, ab, ab_next, eta):
    """One fusion step in the published variables: DDIM down with eta, and the noise back up, in one."""
    s2 = eta**2 * (1 - ab_next) / (1 - ab) * (1 - ab / ab_next)
    mean = z - s2 * (1 - ab).sqrt() / (1 - ab_next) * eps
    return mean + s2.sqrt() * ((1 - ab) * (2 - 2 * ab_next - s2)).sqrt() / (1 - ab_next) * noise


class TestOneStep:
    @pytest.mark.parametrize(
        ("t", "following", "expected"),
        [(981, 961, 0.208052), (501, 481, 0.124548), (21, 1, 0.914707), (1, None, 0.501592)],
    )
    def test_it_is_the_published_step(self, t, following, expected):
        torch.manual_seed(0)
        x, eps, noise = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)
        ab, ab_next = ALPHA_BAR[t], ALPHA_BAR[0 if following is None else following]
        sigma, sigma_next = SIGMA[t], torch.zeros(()).double() if following is None else SIGMA[following]
        for eta in (0.5, 1.0):
            ours = renew(x, x - sigma * eps, noise, LOWEST, sigma, sigma_next, eta)
            theirs = published_fusion(x * ab.sqrt(), eps, noise, ab, ab_next, eta) / ab.sqrt()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        assert 1 - float(LOWEST.kept(sigma, sigma_next, 1.0)) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(("v", "sigma", "kappa", "variance"), [(0.25, 1.0, 0.9, 1.248), (0.25, 0.2, 0.5, 0.281379)])
    def test_law_of_a_gaussian(self, v, sigma, kappa, variance):
        """After a step with the exact denoiser of N(mu, v), latents of the right law have mean mu and this variance; of
        latents of another mean the error is smaller by rho sigma^2 / (v + sigma^2)."""
        n, mu = 400_000, 1.5
        generator = torch.Generator().manual_seed(1)
        x = mu + (v + sigma**2) ** 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        denoised = mu + v / (v + sigma**2) * (x - mu)
        following = torch.tensor(sigma * kappa**0.5, dtype=torch.float64)
        x = renew(x, denoised, torch.randn(n, generator=generator).double(), Levels(), torch.tensor(sigma), following)
        rho = 1 - kappa
        law = v + sigma**2 - sigma**2 * v * rho**2 / (v + sigma**2)
        assert law == pytest.approx(variance, abs=1e-6)
        assert float(x.mean()) == pytest.approx(mu, abs=5 * (law / n) ** 0.5)
        assert float(x.var()) == pytest.approx(law, rel=5 * (2 / n) ** 0.5)
        off = torch.tensor([mu + 0.7], dtype=torch.float64)
        denoised = mu + v / (v + sigma**2) * (off - mu)
        moved = renew(
            off, denoised, torch.zeros(1).double(), Levels(), torch.tensor(sigma, dtype=torch.float64), following
        )
        assert float(moved - mu) == pytest.approx(0.7 * (1 - rho * sigma**2 / (v + sigma**2)), abs=1e-9)

    def test_flow_is_the_same_process_in_other_variables(self):
        """With sigma' = sigma / (1 + sigma) a flow's latent is the other one divided by 1 + sigma."""
        torch.manual_seed(0)
        x, denoised, noise = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)
        sigma, following = SIGMA[601], SIGMA[581]
        expected = renew(x, denoised, noise, Levels(), sigma, following, 0.7) / (1 + sigma)
        flow = renew(
            x / (1 + sigma), denoised, noise, Levels(flow=True), sigma / (1 + sigma), following / (1 + following), 0.7
        )
        torch.testing.assert_close(flow, expected, rtol=0, atol=1e-13)
        scaled = renew(x, denoised, noise, Levels(True, noise_scale=3.0), torch.tensor(1.0), torch.tensor(0.9))
        # At the beginning of a flow there is no picture, so all of the noise is renewed.
        torch.testing.assert_close(scaled, noise * 3, rtol=0, atol=1e-13)

    def test_outside_of_its_share_nothing_happens(self):
        torch.manual_seed(0)
        x, denoised, noise = torch.randn(3, 2, 4, 6, 6)
        share = torch.zeros(1, 1, 6, 6)
        share[..., 3:] = 1
        args = (x, denoised, noise, LOWEST, SIGMA[501].float(), SIGMA[481].float(), 1.0)
        made = renew(*args, share)
        assert torch.equal(made[..., :3], x[..., :3])
        assert torch.equal(made[..., 3:], renew(*args)[..., 3:])

    def test_no_noise_level_is_left_behind_at_a_soft_edge(self):
        """Of pure noise whose estimate is 0 the variance stays, whatever the share."""
        generator = torch.Generator().manual_seed(0)
        x, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
        made = renew(x * 5, torch.zeros_like(x), noise, Levels(), torch.tensor(5.0), torch.tensor(3.0), 1.0, 0.4)
        assert float(made.var()) == pytest.approx(25, rel=0.01)


def toy(x, sigma, model_options, seed=None):
    """Any smooth denoiser, that sees the stage."""
    shift = 0.3 if model_options[STAGE] == FUSION else -0.2
    return torch.tanh(x / (1 + sigma.reshape(-1, 1) ** 2).sqrt() + shift)


class TestRun:
    @pytest.mark.parametrize("repeats", [0, 1, 2])
    @pytest.mark.parametrize("fusion_eta", [0.5, 1.0])
    @pytest.mark.parametrize("eta", [0.0, 0.7])
    def test_it_is_the_published_loop(self, repeats, fusion_eta, eta):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        noises = torch.randn(200, 3, 8, generator=generator, dtype=torch.float64)
        draws, ours = iter(noises), None
        sigmas = torch.stack([*SIGMA[TIMES], SIGMA[0]])

        def noise_sampler(_sigma, _following):
            return next(draws)

        ours = sample_fusion(
            toy,
            start * sigmas[0],
            sigmas,
            {"model_options": {}},
            disable=True,
            base=euler,
            base_options={"eta": eta, "noise_sampler": noise_sampler},
            fusion=Fusion(repeats, fusion_eta),
            levels=LOWEST,
            noise_sampler=noise_sampler,
        )
        z, draws = start * sigmas[0] * ALPHA_BAR[981].sqrt(), iter(noises)
        for t, following in pairwise([*TIMES, 0]):
            ab, ab_next, rows = ALPHA_BAR[t], ALPHA_BAR[following], SIGMA[t] * torch.ones(3).double()

            def eps(z, stage, ab=ab, rows=rows):
                return (z - ab.sqrt() * toy(z / ab.sqrt(), rows, {STAGE: stage})) / (1 - ab).sqrt()

            for _ in range(repeats):
                z = published_fusion(z, eps(z, FUSION), next(draws), ab, ab_next, fusion_eta)
            predicted = eps(z, REFINEMENT)
            s2 = eta**2 * (1 - ab_next) / (1 - ab) * (1 - ab / ab_next)
            z0 = (z - (1 - ab).sqrt() * predicted) / ab.sqrt()
            z = ab_next.sqrt() * z0 + (1 - ab_next - s2).sqrt() * predicted
            if eta:
                z = z + s2.sqrt() * next(draws)
        torch.testing.assert_close(ours, z / ALPHA_BAR[0].sqrt(), rtol=0, atol=1e-12)

    def test_without_fusion_it_is_the_base_sampler(self):
        start = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
        sigmas = torch.tensor([5.0, 2.0, 0.5, 0.0])
        plain = start
        for step in pairwise(sigmas):
            plain = euler(toy, plain, torch.stack(step), {"model_options": {STAGE: REFINEMENT}})
        for fusion in (Fusion(0), Fusion(2, 0.0), Fusion(1, 1.0, highest=0.4), Fusion(1, 1.0, lowest=6.0)):
            made = run(toy, start, sigmas, fusion)
            assert torch.equal(made, plain), fusion
        assert torch.equal(run(toy, start, sigmas, Fusion(), share=lambda _x, _sigma: 0.0), plain)

    def test_stages_alternate_within_their_levels_and_each_step_is_told_once(self):
        seen, told = [], []

        def model(x, sigma, model_options, seed):
            seen.append(
                (float(sigma[0]), model_options[STAGE], model_options.get(FOLLOWING), model_options["kept"], seed)
            )
            return x * 0

        sigmas = torch.tensor([5.0, 2.0, 0.5, 0.0])
        args = {"model_options": {"kept": 1}, "seed": 7}
        run(model, torch.ones(2, 8), sigmas, Fusion(2, 1.0, 2.0, 1.0), args, lambda facts: told.append(facts["i"]))
        refined = [(sigma, REFINEMENT, None, 1, 7) for sigma in (5.0, 2.0, 0.5)]
        fused = [(2.0, FUSION, following, 1, 7) for following in (FUSION, REFINEMENT)]
        assert seen == [refined[0], *fused, *refined[1:]]
        assert told == [0, 1, 2] and args == {"model_options": {"kept": 1}, "seed": 7}


def run(model, x, sigmas, fusion, extra_args=None, callback=None, **options):
    """sample_fusion with the base above and seeded noise."""
    generator = torch.Generator().manual_seed(3)
    return sample_fusion(
        model,
        x,
        sigmas,
        extra_args or {"model_options": {}},
        callback,
        True,
        base=euler,
        fusion=fusion,
        levels=LOWEST,
        noise_sampler=lambda _sigma, _following: torch.randn(x.shape, generator=generator, dtype=x.dtype),
        **options,
    )


class TestLaws:
    """With conditions that are Gaussians or mixtures of them, denoisers are exact, and so is what must come out."""

    @pytest.mark.parametrize(
        ("g", "s_j", "s_c", "eta", "repeats", "mu_c", "mean", "std"),
        [
            (7, 7, 5, 1.0, 1, -0.5, 6.067256, 0.447705),
            (7, 7, 5, 0.0, 1, -0.5, 4.337051, 0.475102),
            (3, 2, 2, 1.0, 2, -0.5, 2.511905, 0.431747),
            (3, 2, 2, 0.5, 1, -0.5, 1.594045, 0.475677),
            (1, 1, 0, 1.0, 0, 1.0, 0.963789, 0.475102),
            (1, 1, 0, 1.0, 1, 1.0, 0.999947, 0.447705),
        ],
    )
    def test_chain_of_gaussians(self, g, s_j, s_c, eta, repeats, mu_c, mean, std):
        """One step maps N(M, V) to a Gaussian; means and standard deviations after 50 steps."""
        v, mu_u, mu_j = 0.25, 0.0, 1.0

        def model(x, sigma, model_options, seed=None):
            one, two, three = (
                (mu * sigma[:, None] ** 2 + v * x) / (v + sigma[:, None] ** 2) for mu in (mu_u, mu_j, mu_c)
            )
            if model_options[STAGE] == FUSION:
                mixed, scale = two, g
            else:
                mixed, scale = combine([two, three], [s_j, s_c], one)
            return one + scale * (mixed - one)

        sigmas = torch.cat([SIGMA[TIMES], torch.zeros(1).double()])
        # Every step is affine: a row without noise has the mean, and what a unit of each noise adds is its share.
        draws = 1 + 50 * repeats
        units = iter(torch.eye(draws + 1, dtype=torch.float64)[1:, :, None])
        made = sample_fusion(
            model,
            sigmas[0] * next(units),
            sigmas,
            {"model_options": {}},
            base=euler,
            fusion=Fusion(repeats, eta),
            levels=LOWEST,
            noise_sampler=lambda _sigma, _following: next(units),
        )[:, 0]
        assert float(made[0]) == pytest.approx(mean, abs=2e-6)
        assert float((made[1:] - made[0]).norm()) == pytest.approx(std, abs=2e-6)

    @pytest.mark.parametrize(
        ("s", "g", "gamma", "repeats", "eta", "fraction", "mean", "std"),
        [
            ((4, 0), 3, 0.6, 0, 1.0, 0.509, None, None),
            ((2, 2), 3, 0.6, 0, 1.0, 0.991, (2.33, 2.43), 0.15),
            ((2, 2), 3, 0.6, 1, 1.0, 0.9996, (2.02, 2.02), 0.25),
            ((2, 2), 3, 0.6, 2, 1.0, 0.998, (2.00, 2.00), 0.25),
            ((2, 2), 3, 0.6, 1, 0.5, 0.996, (2.17, 2.18), None),
            ((1, 1), 1, 0.6, 0, 1.0, 0.9986, None, None),
            ((1, 1), 1, 0.6, 1, 1.0, 0.66, None, None),
        ],
    )
    def test_mixture_in_which_subject_and_style_depend_on_each_other(
        self, s, g, gamma, repeats, eta, fraction, mean, std
    ):
        """The joint prompt ignores the style; composing it with the text finds the one cluster that has both, and
        fusion takes back what guidance overshoots. With scales of 1 fusion loses it: weak guidance is no preset."""
        centers = torch.tensor([(-2.0, -2), (2, -2), (-2, 2), (2, 2)], dtype=torch.float64)
        joint, text = torch.tensor([[0, 0.8, 0, 0.2], [0, 0, 0.975, 0.025]], dtype=torch.float64)
        weights = {
            "u": torch.tensor([0.85, 0.05, 0.0975, 0.0025], dtype=torch.float64),
            "j": joint,
            "c": text,
            "weak": gamma * joint + (1 - gamma) * text,
        }

        def denoised(x, sigma, name):
            variance = 0.09 + sigma[0] ** 2
            likely = weights[name].log() - (x[:, None] - centers).square().sum(-1) / (2 * variance)
            posterior = likely.softmax(1)
            return (posterior @ centers * sigma[0] ** 2 + 0.09 * x) / variance

        def model(x, sigma, model_options, seed=None):
            negative = denoised(x, sigma, "u")
            if model_options[STAGE] == FUSION:
                return negative + g * (denoised(x, sigma, "weak") - negative)
            mixed, scale = combine([denoised(x, sigma, "j"), denoised(x, sigma, "c")], s, negative)
            return negative + scale * (mixed - negative)

        sigmas = torch.cat([SIGMA[TIMES], torch.zeros(1).double()])
        x = sigmas[0] * torch.randn(6000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        made = run(model, x, sigmas, Fusion(repeats, eta))
        there = (made - centers[3]).norm(dim=1) < 1
        chance = (fraction * (1 - fraction) / len(x)) ** 0.5
        assert float(there.double().mean()) == pytest.approx(fraction, abs=max(0.01, 3 * chance))
        assert mean is None or made[there].mean(0).tolist() == pytest.approx(mean, abs=0.04)
        assert std is None or float(made[there].std(0).mean()) == pytest.approx(std, abs=0.03)


class TestCombine:
    def test_it_is_the_sum_of_differences(self):
        torch.manual_seed(0)
        a, b, c, negative = torch.randn(4, 2, 4, 6, 6, dtype=torch.float64)
        region = torch.rand(2, 1, 6, 6, dtype=torch.float64) * 3
        expected = negative + 2.5 * (a - negative) + region * (b - negative) + 0.5 * (c - negative)
        mixed, scale = combine([a, b, c], [2.5, region, 0.5], negative)
        torch.testing.assert_close(negative + scale * (mixed - negative), expected)
        assert scale == pytest.approx(float(region.max()) + 3)

    def test_one_alone_is_itself(self):
        a, negative = torch.randn(2, 1, 4, 6, 6)
        mixed, scale = combine([a], [3.0], negative)
        assert mixed is a and scale == 3.0

    def test_without_a_negative_it_is_the_weighted_sum(self):
        a, b = torch.randn(2, 1, 4, 6, 6)
        mixed, _ = combine([a, b], [0.25, 0.75], None)
        torch.testing.assert_close(mixed, 0.25 * a + 0.75 * b)

    def test_shares_sum_to_one_where_there_is_a_subject(self):
        assert shares([3.0, 1.0]) == [0.75, 0.25]
        left, right = torch.zeros(2, 1, 1, 2, 4)
        left[..., :2], right[..., 1:3] = 1, 3
        one, two = shares([left, right])
        assert one[0, 0, 0].tolist() == [1, 0.25, 0, 0] and two[0, 0, 0].tolist() == [0, 0.75, 1, 0]


@pytest.mark.parametrize(("values", "message"), [((-1, 1.0), "fusion_steps: expected 0 or more"), ((1, 1.5), "eta: ")])
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Fusion(*values)
