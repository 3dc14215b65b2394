"""The prior against diffusers' own, its sampler against diffusers' scheduler and a law that is known."""

import pytest
import torch
from conceptloom.encoders.caption_prior import CaptionPrior, PriorConfig, spaced, text_mask
from conceptloom.samplers.prior import cosine_alphas, sample_prior

CONFIG = PriorConfig(24, 32, 4, 2, 9)


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(9)[None] <= torch.tensor([[3], [8], [5]])
    return (
        torch.randn(n, 24, generator=generator).double(),
        torch.tensor([999, 500, 0]),
        torch.randn(n, 24, generator=generator).double(),
        torch.randn(n, 9, 24, generator=generator).double(),
        mask,
    )


def test_it_is_diffusers_prior_under_its_names():
    pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")
    from diffusers import PriorTransformer

    torch.manual_seed(0)
    theirs = PriorTransformer(4, 8, 2, 24, num_embeddings=9).double().eval().requires_grad_(False)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = CaptionPrior.from_state(theirs.state_dict(), heads=4).double()
    assert ours.config == CONFIG
    noisy, t, sentence, states, mask = inputs()
    expected = theirs(noisy, t, sentence, states, mask).predicted_image_embedding
    torch.testing.assert_close(ours(noisy, t, sentence, states, mask), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.unscaled(noisy), theirs.post_process_latents(noisy))
    torch.testing.assert_close(ours.scaled(ours.unscaled(noisy)), noisy)


def test_the_published_size():
    with torch.device("meta"):
        net = CaptionPrior()
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1.02e9, rel=0.01)
    assert net.state_dict()["transformer_blocks.19.ff.net.0.proj.weight"].shape == (8192, 2048)


def test_tokens_after_the_end_do_not_count():
    torch.manual_seed(0)
    net = CaptionPrior(CONFIG).double().eval()
    noisy, t, sentence, states, mask = inputs()
    other = torch.where(mask[..., None], states, torch.randn_like(states))
    torch.testing.assert_close(net(noisy, t, sentence, other, mask), net(noisy, t, sentence, states, mask))
    tokens = torch.tensor([[7, 1, 2, 0, 0], [7, 0, 0, 0, 0], [7, 1, 2, 3, 0]])
    assert text_mask(tokens, 0).sum(1).tolist() == [4, 2, 5]


def test_the_sampler_is_diffusers_scheduler():
    pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")
    from diffusers import UnCLIPScheduler

    scheduler = UnCLIPScheduler(clip_sample_range=5.0, prediction_type="sample")
    torch.testing.assert_close(cosine_alphas().float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.tolist() == list(spaced(7))

    def predict(x, t):
        return torch.tanh(x) * (1 - t / 2000)

    found = sample_prior(predict, (2, 5), spaced(7), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, generator=generator)
    steps = scheduler.timesteps.tolist()
    for i, t in enumerate(steps):
        before = steps[i + 1] if i + 1 < len(steps) else None
        x = scheduler.step(predict(x, t), t, x, before, generator=generator).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_it_draws_from_a_law_that_is_known():
    """With the exact prediction for N(m, s^2), samples have that mean and deviation."""
    mean, deviation, alphas = 0.7, 0.5, cosine_alphas()

    def predict(x, t):
        level = float(alphas[t])
        gain = level**0.5 * deviation**2 / (level * deviation**2 + 1 - level)
        return mean + gain * (x - level**0.5 * mean)

    found = sample_prior(predict, (4000, 4), spaced(60), torch.Generator().manual_seed(0))
    assert float(found.mean()) == pytest.approx(mean, abs=0.02)
    assert float(found.std()) == pytest.approx(deviation, abs=0.03)


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="^file: expected the weights of a prior, got a file without 'proj_in.weight'"):
        CaptionPrior.from_state({"a": torch.ones(1)})
    state = CaptionPrior(CONFIG).state_dict()
    with pytest.raises(ValueError, match="got 1 for norm_in.weight, where it has nothing"):
        CaptionPrior.from_state({**state, "norm_in.weight": torch.ones(1)}, heads=4)
