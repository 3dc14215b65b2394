"""Fine-tuning PromptNet within the host, on Shapeland's shapes with random weights."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def parts(host):
    """MODEL with a random UNet, a random PromptNet, and the shipped CLIP, vision tower and VAE."""
    from conceptloom.encoders.promptnet import PromptNet, PromptNetConfig
    from conceptloom.host.profusion.promptnet import wrap
    from conceptloom.host.shapeland import load_clip, load_clip_vision, load_model, load_vae
    from conceptloom.shapeland import models

    torch.manual_seed(0)
    config = PromptNetConfig(
        (32,) * 4, (2,) * 4, latent_channels=8, vision_width=128, context_width=128, region=2, region_channels=16
    )
    with torch.inference_mode():
        model = load_model(models.build_unet().state_dict())
        net = wrap(PromptNet(config).eval().requires_grad_(False))
        return model, net, load_clip(), load_clip_vision(), load_vae()


def pictures(count=3, masks=None, captions=("a {} on a navy background",)):
    from conceptloom.training.concepts.pictures import Pictures

    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(64, 64, 3, generator=generator) for _ in range(count)]
    return Pictures(images, masks or [None] * count, list(captions))


def fine_tune(parts, given=None, steps=2, side=64, checkpoints=None, preview_every=0, **recipe):
    from conceptloom.host.profusion.finetuning import fine_tune
    from conceptloom.training.promptnet.finetuning import FineTuning

    recipe = FineTuning(steps=steps, **{"batch_size": 2, "learning_rate": 0.01, **recipe})
    with torch.inference_mode():
        return fine_tune(*parts, given or pictures(), recipe, side, preview_every, checkpoints)


def states_of(parts):
    model, net, clip, vision, vae = parts
    modules = model.model, net.module, clip.cond_stage_model, vision.model, vae.first_stage_model
    return [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]


@pytest.mark.parametrize("rank", [0, 4])
def test_promptnet_and_attention_learn_and_nothing_else(parts, rank, monkeypatch):
    before, vae, modes = states_of(parts), parts[-1], set()
    encode = vae.encode

    def encoded(pictures):
        modes.add(torch.is_inference_mode_enabled())
        return encode(pictures)

    monkeypatch.setattr(vae, "encode", encoded)
    found = fine_tune(parts, rank=rank)
    # The host's parameters that move outside of inference mode never compute again.
    assert modes == {True}
    assert all(
        torch.equal(value, then[key])
        for now, then in zip(states_of(parts), before, strict=True)
        for key, value in now.items()
    )
    own = parts[1].module.state_dict()
    same = [key for key, value in found.promptnet.module.state_dict().items() if torch.equal(value, own[key])]
    assert not same
    # Self- and cross-attention in 16 transformer blocks, three matrices each.
    layers = {key.rsplit(".", 1 if rank == 0 else 2)[0] for key in found.lora if not key.endswith("alpha")}
    assert len(layers) == 16 * 2 * 3
    assert {layer.rsplit(".", 1)[1] for layer in layers} == {"to_q", "to_k", "to_v"}
    assert all(found.lora[key].any() for key in found.lora)
    assert found.report.startswith("PromptNet: 2 steps of 2 pictures in ")
    assert found.loss.shape == (256, 512, 3)


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_trained_is_what_is_sampled(parts, rank, tmp_path):
    """The trainer's estimate is that of the host's own LoRA nodes and a prepared MODEL, with saved files."""
    import comfy.model_management
    import comfy.samplers
    import comfy.sd
    import comfy.utils
    from conceptloom.encoders.promptnet import save
    from conceptloom.host.model import passes
    from conceptloom.host.model.copies import trainable_copies
    from conceptloom.host.profusion import finetuning, promptnet
    from conceptloom.training.promptnet.finetuning import FineTuning
    from safetensors.torch import save_file

    model, net, clip, vision, vae = parts
    caption, image = "a {} on a navy background", pictures().images[0]
    x, sigma = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(2)) * 4, torch.tensor([3.0])
    tokenizer = promptnet.checked_tokenizer(net, clip)
    with torch.inference_mode(False), torch.enable_grad(), trainable_copies(model, clip) as (patcher, text):
        trainer = finetuning._Trainer(patcher, text, tokenizer, net.module, FineTuning(rank=rank))
        for p in trainer.tuned.differences.parameters():
            torch.nn.init.normal_(p, std=0.3)
        for p in trainer.tuned.promptnet.parameters():
            p.data += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        comfy.model_management.load_models_gpu(trainer.patchers)
        with torch.no_grad():
            seen = promptnet.look(net, vision, image)
            reference = trainer.model.process_latent_in(vae.encode(image[None]))
            sampling = trainer.model.model_sampling
            vectors = promptnet.vectors_of(trainer.tuned.promptnet, sampling, reference, seen.tokens[None], x, sigma)
            conds = trainer._conds([caption], vectors, x)
            trained = passes.evaluate(trainer.model, x, sigma, conds, {"cond_or_uncond": [0], "sigmas": sigma})
        tuned, lora = trainer.result()
    save(tuned.module, tmp_path / "net.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    with torch.inference_mode():
        loaded = promptnet.load(str(tmp_path / "net.safetensors"))
        lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
        prepared = promptnet.prepared(model)
        drawing, _ = comfy.sd.load_lora_for_models(prepared, None, lora, 1.0, 0)
        prompt, end = finetuning.with_stand_in(caption, tokenizer)
        positive = promptnet.conditioning(loaded, clip, vae, prompt, [end], [seen])
        drawn = {name: estimate(one, positive, x, sigma) for name, one in (("tuned", drawing), ("base", prepared))}
    far = {name: float((one - trained).norm()) for name, one in drawn.items()}
    # Files are in half precision.
    assert far["tuned"] < 0.01 * far["base"]


def estimate(model, positive, x, sigma):
    """What a MODEL predicts of x at a noise level, in a sampling."""
    import comfy.samplers

    found, guider = [], comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})

    def once(denoise, _x, sigmas, extra_args, **_):
        found.append(denoise(x, sigma, **extra_args))
        return x

    guider.sample(x, torch.zeros_like(x), comfy.samplers.KSAMPLER(once), torch.tensor([float(sigma), 0.0]))
    return found[0]


def test_the_loss_falls(parts):
    """On the same draws before and after, where the UNet alone cannot learn."""
    from conceptloom.host.profusion import finetuning

    seen = []

    def losses(trainer):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            return sum(float(trainer._loss(generator)) for _ in range(4))

    with pytest.MonkeyPatch.context() as patch:
        run = finetuning._Trainer.run

        def measured(trainer, after, folder):
            import comfy.model_management

            comfy.model_management.load_models_gpu(trainer.patchers)
            seen.append(losses(trainer))
            run(trainer, after, folder)
            seen.append(losses(trainer))

        patch.setattr(finetuning._Trainer, "run", measured)
        fine_tune(parts, steps=10)
    assert seen[1] < 0.97 * seen[0]


def test_the_loss_counts_inside_the_masks(parts):
    """What the model makes outside of a mask changes no loss, and inside it does."""
    from conceptloom.host.profusion import finetuning

    half, seen = torch.zeros(64, 64), []
    half[:, :32] = 1
    loss = finetuning.masked_error

    def changed(denoised, x0, masks, weight):
        values = [loss(denoised, x0, masks, weight)]
        for part in (slice(8, None), slice(None, 8)):
            other = denoised.detach().clone()
            other[..., part] += 1
            values.append(loss(other, x0, masks, weight))
        seen.append([float(value.detach()) for value in values])
        return values[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "masked_error", changed)
        fine_tune(parts, pictures(masks=[half] * 3), steps=1)
    assert all(plain == outside != inside for plain, outside, inside in seen) and seen


def test_a_cancelled_one_continues_as_if_it_had_not_been(parts, tmp_path):
    import comfy.model_management
    from comfy.model_management import InterruptProcessingException
    from conceptloom.host.progress import Progress

    after = Progress.after

    def cancel(progress, step, *others):
        after(progress, step, *others)
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    with pytest.MonkeyPatch.context() as patch:
        # As if a minute had passed at each step.
        patch.setattr("time.monotonic", iter(range(0, 10**6, 100)).__next__)
        patch.setattr(Progress, "after", cancel)
        with pytest.raises(InterruptProcessingException):
            fine_tune(parts, steps=3, checkpoints=tmp_path)
    assert not comfy.model_management.in_training
    assert [folder.name.startswith("training-") for folder in tmp_path.iterdir()] == [True]
    continued = fine_tune(parts, steps=3, checkpoints=tmp_path)
    assert continued.report.endswith(", continued at step 2")
    assert not list(tmp_path.iterdir())
    whole = fine_tune(parts, steps=3)
    assert all(torch.equal(value, whole.lora[key]) for key, value in continued.lora.items())
    other = fine_tune(parts, steps=3, seed=1)
    assert not all(torch.equal(value, whole.lora[key]) for key, value in other.lora.items())


def test_previews_and_captions_of_several_lengths(parts, monkeypatch):
    import comfy.utils

    told = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, shown, node_id: told.append((done, shown))
    )
    # Of one, two and three chunks: their states are of one length in a batch.
    captions = ["a {}" + " and a red mug" * times for times in (0, 30, 50)]
    fine_tune(parts, pictures(3, captions=captions), steps=2, preview_every=1, batch_size=8)
    assert [(done, shown and shown[1].size) for done, shown in told] == [(1, None), (2, (256, 256))]


def test_refusals(parts):
    from conceptloom.encoders.promptnet import PromptNet, PromptNetConfig
    from conceptloom.host.profusion.promptnet import wrap

    for side in (32, 72):
        with pytest.raises(ValueError, match=f"size: expected a multiple of 32, at least 64, got {side}"):
            fine_tune(parts, side=side)
    net = wrap(PromptNet(PromptNetConfig((32,) * 4, (2,) * 4, vision_width=128, context_width=128, region=2)))
    with pytest.raises(ValueError, match="^promptnet: expected one for latents of 8 channels, got one for 4"):
        fine_tune((parts[0], net, *parts[2:]))
    late = pictures(captions=("a red mug and " * 18 + "{}",))
    said = r"captions: expected \{\} earlier \(it becomes 4 vectors at this size\), got it 1 too late; shorten the text"
    with pytest.raises(ValueError, match=said):
        fine_tune(parts, late, side=128)
