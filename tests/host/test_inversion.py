"""DDIM inversion through the host's own sampling (spec sections C4 and G4, oracle I1)."""

import math
from functools import partial

import pytest
import torch

STEPS, CLOSE_STEPS = 4, 8
"""Enough to see what is computed, and to see the picture come back."""
SCHEDULER = "ddim_uniform"


@pytest.fixture(scope="module")
def models(host, toy_type):
    """Toys of both predictions. A random network is no denoiser and eps of it does not contract, so it is turned down
    until, like a trained one, it changes more slowly than the picture."""
    from comfy.model_base import ModelType

    with torch.inference_mode():
        toys = {name: toy_type(model_type=ModelType[name]) for name in ("EPS", "V_PREDICTION")}
        toys["EPS"].base.diffusion_model.out[-1].weight *= 0.05
    return toys


@pytest.fixture
def toy(request, models):
    """The toy of v-prediction, or the one that `of_both` names, in inference mode as under the host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield models[getattr(request, "param", "V_PREDICTION")]
    torch.set_num_threads(threads)


of_both = pytest.mark.parametrize("toy", ["EPS", "V_PREDICTION"], indirect=True)


def picture(size=(16, 16), batch=1, seed=5):
    """A latent of the VAE's scale."""
    return {"samples": torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed)) / 0.18215}


def invert(toy, latent, **options):
    from conceptloom.host.structure.inversion import invert

    options = {"conditioning": toy.positive, "steps": STEPS, "scheduler": SCHEDULER, "refinements": 1, **options}
    return invert(toy.model, latent, **options)


def host_euler(toy, latent, sigmas):
    """What the host's own euler makes of a latent with nothing added, at cfg 1."""
    import comfy.sample
    import comfy.samplers

    samples, sampler = latent["samples"], comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(
        toy.model,
        torch.zeros_like(samples),
        1.0,
        sampler,
        sigmas,
        toy.positive,
        toy.negative,
        samples,
        disable_pbar=True,
    )


def distance(a, b):
    return float((a - b).norm() / b.norm())


@of_both
def test_euler_is_the_hosts_flipped_sigmas_with_its_euler_bit_by_bit(toy):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import FlipSigmas

    sigmas = comfy.samplers.calculate_sigmas(toy.model.get_model_object("model_sampling"), SCHEDULER, STEPS)
    flipped = FlipSigmas.execute(sigmas)[0]
    found = invert(toy, picture(), mode="euler", refinements=0)
    assert torch.equal(found.noise["samples"], host_euler(toy, picture(), flipped))
    assert torch.equal(found.sigmas, sigmas) and found.source.trajectory.sigmas == tuple(flipped.tolist())


@of_both
def test_reconstruction_is_the_hosts_euler_of_the_noise_bit_by_bit(toy):
    found = invert(toy, picture())
    assert torch.equal(found.reconstruction["samples"], host_euler(toy, found.noise, found.sigmas))


def test_the_hosts_sampler_nodes_give_the_picture_back(toy):
    from comfy_extras import nodes_custom_sampler as sampling

    from nodes import KSamplerAdvanced

    latent = {**picture(), "batch_index": [0], "downscale_ratio_spacial": 8}
    found = invert(toy, latent, steps=CLOSE_STEPS, refinements=6)
    guider = sampling.CFGGuider.execute(toy.model, toy.positive, toy.negative, 1.0)[0]
    by_custom = sampling.SamplerCustomAdvanced.execute(
        sampling.DisableNoise.execute()[0],
        guider,
        sampling.KSamplerSelect.execute("euler")[0],
        found.sigmas,
        found.noise,
    )[0]
    (by_advanced,) = KSamplerAdvanced().sample(
        toy.model, "disable", 0, CLOSE_STEPS, 1.0, "euler", SCHEDULER, toy.positive, toy.negative, found.noise, 0, 1000,
        "disable",
    )  # fmt: skip
    for again in (by_custom, by_advanced):
        assert distance(again["samples"], latent["samples"]) < 0.01
        assert distance(again["samples"], latent["samples"]) == pytest.approx(found.error, rel=1e-3)
    assert found.noise.keys() == {"samples", "batch_index"}
    assert distance(found.noise["samples"], latent["samples"]) > 0.1


def test_refinements_bring_the_picture_closer(toy):
    pnp, one, four = (invert(toy, picture(), steps=CLOSE_STEPS, refinements=k).error for k in (0, 1, 4))
    assert four < one < pnp and four < 0.1 * pnp


def test_what_later_systems_get(toy):
    latent = picture()
    found = invert(toy, latent)
    trajectory = found.source.trajectory
    assert trajectory.latents.shape == (STEPS + 1, 1, 4, 16, 16) and trajectory.latents.dtype == torch.float32
    assert trajectory.latents.device.type == "cpu"
    assert trajectory.sigmas == tuple(found.sigmas.flip(0).tolist())
    assert torch.equal(trajectory.latents[0], toy.base.process_latent_in(latent["samples"]))
    torch.testing.assert_close(trajectory.latents[-1], toy.base.process_latent_in(found.noise["samples"]))
    assert found.source.conditioning is toy.positive and found.source.error == found.error


def test_each_evaluation_has_one_row_and_progress_counts_both_ways(toy):
    seen = []
    toy.rows.clear()
    invert(toy, picture(), refinements=2, callback=lambda step, x0, x, total: seen.append((step, x0.shape, total)))
    assert toy.rows == [1] * len(toy.rows) and len(toy.rows) <= STEPS * 4
    assert seen == [(i, (1, 4, 16, 16), 2 * STEPS) for i in range(2 * STEPS)]


def test_pictures_of_a_batch_are_inverted_as_if_alone(toy):
    size = (13, 9)
    latents = picture(size, 2)
    context = torch.cat([toy.positive[0][0], toy.negative[0][0]])
    both = invert(toy, latents, conditioning=[[context, {}]])
    errors = []
    for i in (0, 1):
        alone = invert(toy, {"samples": latents["samples"][i : i + 1]}, conditioning=[[context[i : i + 1], {}]])
        assert distance(both.noise["samples"][i : i + 1], alone.noise["samples"]) < 1e-4
        errors.append(alone.error)
    assert both.error == pytest.approx(max(errors), rel=1e-2)
    assert both.source.trajectory.latents.shape == (STEPS + 1, 2, 4, *size)


def state_of(model):
    return repr(model.model_options), dict(model.wrappers), dict(model.attachments), dict(model.object_patches)


def test_the_model_is_untouched_and_interruption_leaves_nothing(toy):
    from comfy.model_management import InterruptProcessingException

    plain, before = toy.sample(), state_of(toy.model)
    weights = [p.clone() for p in toy.base.parameters()]
    first = invert(toy, picture())

    def interrupt_after(last, step, x0, x, total):
        if step == last:
            raise InterruptProcessingException()

    for last in (2, STEPS + 2):  # while it inverts, and while it samples again
        with pytest.raises(InterruptProcessingException):
            invert(toy, picture(), callback=partial(interrupt_after, last))
    again = invert(toy, picture())
    assert torch.equal(first.noise["samples"], again.noise["samples"]) and first.error == again.error
    assert state_of(toy.model) == before and torch.equal(toy.sample(), plain)
    assert all(torch.equal(p, w) for p, w in zip(toy.base.parameters(), weights, strict=True))


def test_the_input_latent_is_not_written_to(toy):
    latent = picture()
    invert(toy, latent)
    assert torch.equal(latent["samples"], picture()["samples"]) and latent.keys() == {"samples"}


NAN, HALF_EMPTY = picture()["samples"], picture(batch=2)["samples"]
NAN[0, 0, 0, 0] = math.nan
HALF_EMPTY[1] = 0

BAD_INPUTS = [
    ({"latent": {"samples": torch.zeros(1, 4, 16, 16)}}, "latent: expected an encoded or sampled picture, got an"),
    ({"latent": {"samples": HALF_EMPTY}}, "latent: expected an encoded or sampled picture, got an empty latent"),
    ({"latent": {"samples": NAN}}, "latent: expected finite values"),
    ({"latent": {"samples": torch.ones(1, 16, 8, 8)}}, "latent: expected 4 channels for this model, got 16"),
    ({"latent": {"samples": torch.ones(1, 4, 3, 8, 8)}}, "latent: expected pictures, got a video"),
    ({"latent": {**picture(), "noise_mask": torch.ones(1, 1, 16, 16)}}, "latent: expected one without a noise mask"),
    ({"conditioning": []}, "conditioning: expected one prompt for the whole picture and all steps, got an empty one"),
    ({"conditioning": [[None, {}]] * 2}, "all steps, got 2 that are combined or follow each other"),
    ({"conditioning": [[torch.ones(1, 7, 64), {"area": (8, 8, 0, 0)}]]}, "and all steps, got one with an area"),
    ({"conditioning": [[torch.ones(1, 7, 64), {"mask": torch.ones(1, 8, 8)}]]}, "and all steps, got one with a mask"),
    ({"conditioning": [[torch.ones(1, 7, 64), {"end_percent": 0.5}]]}, "got one with a part of the schedule"),
    ({"conditioning": [[torch.ones(3, 7, 64), {}]]}, "one prompt or as many as pictures (1), got 3"),
    ({"mode": "heun"}, "mode: expected one of pnp, euler, got 'heun'"),
    ({"refinements": -1}, "refinements: expected 0 or more, got -1"),
    (
        {"scheduler": "simple", "steps": 2000},
        "sigmas: expected at least two noise levels, each lower than the one before",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD_INPUTS)
def test_bad_input_gets_its_sentence_before_anything_is_computed(toy, changes, sentence):
    toy.rows.clear()
    with pytest.raises(ValueError) as caught:
        invert(toy, changes.pop("latent", picture()), **changes)
    assert sentence in str(caught.value) and not toy.rows


def test_models_of_another_kind_get_their_sentence(toy, monkeypatch):
    import comfy.model_sampling
    from conceptloom.host.structure.inversion import invert as run

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flow = toy.model.clone()
    flow.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="model: expected one of noise or v prediction"):
        run(flow, picture(), toy.positive, STEPS, SCHEDULER)
    monkeypatch.setitem(toy.base.model_config.unet_config, "in_channels", 9)
    with pytest.raises(ValueError, match="model: expected one that sees 4 channels, the picture alone, got one of 9"):
        run(toy.model, picture(), toy.positive, STEPS, SCHEDULER)


def test_the_node(toy, caplog):
    from conceptloom.nodes.inversion import NODES

    node, _ = NODES
    widgets = {i.id: i.default for i in node.GET_SCHEMA().inputs if hasattr(i, "default")}
    assert widgets["steps"] == 50 and widgets["scheduler"] == SCHEDULER and widgets["mode"] == "pnp"
    inputs = {"model": toy.model, "latent": picture(), "conditioning": toy.positive, **widgets}
    inputs["steps"] = CLOSE_STEPS
    noise, source, sigmas, reconstruction, error = node.execute(**inputs).args
    assert noise["samples"].shape == reconstruction["samples"].shape == (1, 4, 16, 16)
    assert len(sigmas) == CLOSE_STEPS + 1 and source.error == error < 0.15 and not caplog.records
    error = node.execute(**{**inputs, "steps": 4, "mode": "euler", "refinements": 0}).args[-1]
    assert error > 0.15 and "sampled again, the picture comes out" in caplog.text
    with pytest.raises(ValueError, match="DDIM Inversion: latent: expected an encoded or sampled picture"):
        node.execute(**{**inputs, "latent": {"samples": torch.zeros(1, 4, 16, 16)}})


def test_noise_is_renewed_where_concepts_are():
    """Fresh noise is not what the seed may have made the template of; without a concept or at strength 0 nothing
    changes, bit by bit."""
    import comfy.sample
    from conceptloom.host.structure.inversion import renew
    from conceptloom.nodes.inversion import RenewNoise
    from conceptloom.subjects.partition import Partition

    noise = picture(batch=2)
    partition = torch.zeros(2, 64, 64)
    partition[0, :, 32:], partition[1, :, :32] = 1, 1
    found = renew(noise, partition, 7, 1.0)
    fresh = comfy.sample.prepare_noise(noise["samples"], 7)
    strength = noise["samples"].square().mean((1, 2, 3), keepdim=True).sqrt()
    assert torch.equal(found["samples"][..., :8], noise["samples"][..., :8])
    assert torch.allclose(found["samples"][..., 8:], (strength * fresh)[..., 8:])
    others = [RenewNoise.execute(noise, Partition(partition), seed, 1.0).args[0]["samples"] for seed in (7, 7, 8)]
    assert torch.equal(others[0], others[1]) and not torch.equal(others[0], others[2])
    likeness = torch.nn.functional.cosine_similarity(others[0][..., 8:].flatten(), fresh[..., 8:].flatten(), 0)
    assert abs(likeness) < 0.2
    nowhere = torch.stack([torch.zeros(64, 64), torch.ones(64, 64)])
    for where, seed, share in ((nowhere, 7, 1.0), (partition, 7, 0.0)):
        assert torch.equal(
            RenewNoise.execute(noise, Partition(where), seed, share).args[0]["samples"], noise["samples"]
        )
    wide = torch.stack([torch.ones(64, 128), torch.zeros(64, 128)])
    for (given, where), sentence in (
        ((noise, wide), "Renew Noise: partition: expected the shape of the latent"),
        (({"samples": torch.ones(1, 4, 3, 8, 8)}, partition), "Renew Noise: noise: expected that of pictures"),
    ):
        with pytest.raises(ValueError, match=sentence):
            RenewNoise.execute(given, Partition(where), 0, 1.0)
