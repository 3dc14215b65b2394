"""The host runs the same numbers as the models that were trained: UNet block by block, towers, autoencoder."""

import pytest
import torch

TABLE = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def loading(host):
    from conceptloom.host import shapeland

    return shapeland


def halved(module):
    """`module` in evaluation mode with weights that fp16 holds exactly, as shipped files do."""
    module.eval()
    module.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    )
    return module


def outputs_of(modules):
    """Hooks that keep each module's output tensor, in order; returns the list they fill."""
    kept = [None] * len(modules)
    for i, module in enumerate(modules):

        def keep(_, __, out, i=i):
            kept[i] = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)

        module.register_forward_hook(keep)
    return kept


def diffusers_blocks(unet):
    """Modules whose outputs are those of the host's input blocks, middle block and output blocks, in that order."""
    modules = [unet.conv_in]
    for block in unet.down_blocks:
        layers = getattr(block, "attentions", block.resnets)
        modules += [*layers, *(block.downsamplers or [])]
    modules.append(unet.mid_block)
    for block in unet.up_blocks:
        layers = list(getattr(block, "attentions", block.resnets))
        if block.upsamplers:
            layers[-1] = block.upsamplers[0]
        modules += layers
    return modules


def test_unet_is_the_same_block_by_block(loading):
    from conceptloom.shapeland import models

    torch.manual_seed(0)
    ours = models.build_unet().eval()
    theirs = loading.load_model(ours.state_dict()).model.diffusion_model
    mine = outputs_of(diffusers_blocks(ours))
    # The host calls a block's layers one by one, so the output of a block is that of its last layer.
    hosts = outputs_of([block[-1] for block in (*theirs.input_blocks, theirs.middle_block, *theirs.output_blocks)])
    assert len(mine) == len(hosts) == 12 + 1 + 12
    x, t, context = torch.randn(2, 8, 16, 16), torch.tensor([10, 900]), torch.randn(2, models.TOKENS, models.WIDTH)
    out, expected = theirs(x, t, context, transformer_options={}), ours(x, t, context).sample
    for i, (a, b) in enumerate(zip(mine, hosts, strict=True)):
        assert torch.allclose(a, b, atol=1e-5 * max(1, float(a.abs().max()))), f"block {i}"
    assert torch.allclose(out, expected, atol=1e-5)


def test_unet_predicts_v_on_stable_diffusions_schedule(loading):
    from conceptloom.shapeland import models
    from diffusers import DDIMScheduler

    model = loading.load_model(models.build_unet().state_dict()).model
    alphas = DDIMScheduler(**models.SCHEDULE).alphas_cumprod
    assert torch.allclose(model.model_sampling.sigmas, ((1 - alphas) / alphas) ** 0.5, rtol=1e-4)
    t = 321
    sigma = model.model_sampling.sigmas[t].reshape(1)
    x0, noise = torch.randn(1, 8, 16, 16), torch.randn(1, 8, 16, 16)
    a, s = alphas[t] ** 0.5, (1 - alphas[t]) ** 0.5
    denoised = model.model_sampling.calculate_denoised(sigma, a * noise - s * x0, x0 + sigma * noise)
    assert torch.allclose(denoised, x0, atol=1e-4)


def test_the_hosts_sampler_runs_the_unet(loading):
    import comfy.sample
    from conceptloom.shapeland import models

    torch.manual_seed(0)
    patcher = loading.load_model(models.build_unet().state_dict())
    conditioning = [[torch.randn(1, models.TOKENS, models.WIDTH), {}]]
    # A stock Empty Latent Image counts in eighths of the picture and four channels; the host fits it to the model.
    latent = comfy.sample.fix_empty_latent_channels(patcher, torch.zeros(1, 4, 8, 8), 8)
    assert latent.shape == (1, 8, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 0)
    out = comfy.sample.sample(patcher, noise, 2, 4.0, "euler", "normal", conditioning, conditioning, latent, seed=0)
    assert out.shape == latent.shape and torch.isfinite(out).all()


def test_text_tower_is_the_same_behind_the_hosts_tokenizer(loading):
    from conceptloom.shapeland import models

    torch.manual_seed(0)
    ours = halved(models.build_text())
    clip = loading.load_clip(ours.state_dict())
    tokens = clip.tokenize("a red striped star and two balls on a mint background")
    states, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    ids = torch.tensor([[token for token, _ in tokens["l"][0]]])
    expected = ours(ids)
    assert states.shape == (1, models.TOKENS, models.WIDTH)
    assert torch.allclose(states, expected.last_hidden_state, atol=1e-5)
    at_end = expected.last_hidden_state[0, ids[0].tolist().index(models.END)]
    assert torch.allclose(pooled[0], at_end, atol=1e-5)


def test_vision_tower_is_the_same(loading):
    from conceptloom.encoders.clip_pixels import normalize
    from conceptloom.shapeland import models

    torch.manual_seed(0)
    ours = halved(models.build_vision())
    image = torch.randint(0, 256, (2, 64, 64, 3)) / 255
    encoded = loading.load_clip_vision(ours.state_dict()).encode_image(image)
    expected = ours(normalize(image.movedim(-1, 1)))
    assert torch.allclose(encoded.image_embeds, expected.image_embeds, atol=1e-5)
    assert torch.allclose(encoded.last_hidden_state, expected.last_hidden_state, atol=1e-5)


def test_vae_encodes_and_decodes_as_trained(loading):
    from conceptloom.shapeland.autoencoder import Autoencoder

    torch.manual_seed(0)
    ours = Autoencoder().eval()
    ours.mean.normal_()
    ours.std.uniform_(0.5, 2)
    vae = loading.load_vae(ours.state_dict())
    image = torch.rand(2, 64, 48, 3)
    latents = vae.encode(image)
    assert latents.shape == (2, 8, 16, 12)
    assert torch.allclose(latents, ours.encode(image.movedim(-1, 1) * 2 - 1), atol=1e-5)
    decoded = ((ours.decode(latents) + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(vae.decode(latents), decoded, atol=1e-5)


def test_absent_weights_get_one_sentence(loading, tmp_path, monkeypatch):
    from conceptloom.shapeland import models

    monkeypatch.setitem(models.FILES, "unet", tmp_path / "unet.safetensors")
    with pytest.raises(FileNotFoundError, match="clone the repository") as error:
        loading.load_model()
    assert "\n" not in str(error.value)
    monkeypatch.setitem(models.FILES, "vision", tmp_path / "vision.safetensors")
    with pytest.raises(FileNotFoundError, match="training.shapeland clip"):
        loading.load_clip_vision()


def test_text_file_restores_the_whole_table(loading, tmp_path):
    from conceptloom.shapeland import models

    torch.manual_seed(0)
    state = halved(models.build_text()).state_dict()
    ids = torch.tensor([models.END, 736, 1565, models.START])
    compact = {**state, TABLE: state[TABLE][ids], "token_ids": ids.int()}
    path = models.save("text", compact, tmp_path / "text.safetensors")
    assert path.stat().st_size < 3_000_000
    restored = models.load("text", path)
    assert torch.equal(restored[TABLE][ids], state[TABLE][ids])
    assert torch.allclose(restored[TABLE][5], state[TABLE][ids].mean(0), atol=1e-3)
    assert all(torch.equal(restored[k], v) for k, v in state.items() if k != TABLE)
