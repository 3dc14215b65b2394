"""A toy with SD 1.5's exact block topology, and the drivers that sample with it as the host does."""

import pytest
import torch


class ToyVAE:
    """Eight by eight pixels make one cell of a latent, a fixed mixture of their mean color."""

    def __init__(self, latent_channels=4):
        self.latent_channels = latent_channels
        self.mix = torch.randn(3, latent_channels, generator=torch.Generator().manual_seed(1))
        self.encoded = []

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        self.encoded.append(tuple(pixels.shape))
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1) * 2 - 1, 8)
        return torch.einsum("bchw,cd->bdhw", small, self.mix)


class ToyCLIP:
    """A text's states are noise seeded by the text; `tokens` sets their number."""

    def __init__(self, width=64, tokens=7):
        self.width, self.tokens = width, tokens

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        seed = sum((i + 1) * ord(c) for i, c in enumerate(text))
        length = self.tokens * (2 if len(text) > 60 else 1)
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, length, self.width, generator=generator)
        return [[context, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


class Toy:
    """A model with random weights, its VAE and CLIP, and a sampling that counts evaluations.

    Attributes:
        steps: of a sampling, unless a test asks for others. Their noise levels are 14.6 and 1.6, at which what happens
            still counts; the second of ComfyUI's "normal" would be next to none.
    """

    steps = 2

    def __init__(self, unet_config=None, family="SD15", base="BaseModel", **kind):
        import comfy.model_base
        import comfy.supported_models
        from conceptloom.evaluation.rigs import SD15_UNET

        config = getattr(comfy.supported_models, family)(
            {
                **SD15_UNET,
                "model_channels": 32,
                "context_dim": 64,
                "dtype": torch.float32,
                **(unet_config or {}),
            }
        )
        config.unet_config.update({"num_heads": 4, "num_head_channels": -1})
        self.surround(getattr(comfy.model_base, base)(config, device="cpu", **kind), ToyVAE())

    @classmethod
    def of(cls, base):
        """A toy around another BaseModel."""
        toy = cls.__new__(cls)
        toy.surround(base, ToyVAE(base.latent_format.latent_channels))
        return toy

    def surround(self, base, vae):
        import comfy.model_patcher

        self.base = base
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in self.base.diffusion_model.named_parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape, generator=generator) * (1.4 / p[0].numel() ** 0.5))
                else:
                    p.fill_(1.0 if name.endswith("weight") else 0.0)
        self.model = comfy.model_patcher.ModelPatcher(self.base, torch.device("cpu"), torch.device("cpu"))
        self.vae, self.clip = vae, ToyCLIP()
        self.positive = self.clip.encode_from_tokens_scheduled("a dog and a hat")
        self.negative = self.clip.encode_from_tokens_scheduled("blurry")
        self.rows = []
        self.base.diffusion_model.register_forward_pre_hook(lambda _, args: self.rows.append(len(args[0])))

    def sample(self, model=None, steps=None, cfg=5.0, seed=3, size=(16, 16), batch=1, sampler="euler", **options):
        """A finished latent; afterwards `self.rows` holds the number of rows of every model call."""
        import comfy.sample

        self.rows.clear()
        latent = torch.zeros(batch, self.vae.latent_channels, *size)
        return comfy.sample.sample(
            self.model if model is None else model,
            comfy.sample.prepare_noise(latent, seed),
            self.steps if steps is None else steps,
            cfg,
            sampler,
            options.pop("scheduler", "sgm_uniform"),
            options.pop("positive", self.positive),
            options.pop("negative", self.negative),
            latent,
            seed=seed,
            disable_pbar=True,
            **options,
        )

    @staticmethod
    def lora(model):
        """The model with a weight change like that of a LoRA, before all layers that see references."""
        model = model.clone()
        key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight"
        shape = model.model.state_dict()[key].shape
        model.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.3,)})
        return model

    def subject(self, seed=0, size=(128, 128), mask="part", **changes):
        """A subject of random colors; its mask covers a quarter of it."""
        from conceptloom.subjects.subject import Subject

        image = torch.rand(*size, 3, generator=torch.Generator().manual_seed(seed))
        if mask == "part":
            mask = torch.zeros(size)
            mask[: size[0] // 2, : size[1] // 2] = 1
        return Subject(image, changes.pop("noun", f"thing{seed}"), mask=mask, **changes)

    def apply(self, *subjects, model=None, **settings):
        """The model with FreeCustom; bank off unless asked for, so that runs count their passes."""
        from conceptloom.host.freecustom.attention import apply
        from conceptloom.host.freecustom.job import MrsaSettings
        from conceptloom.host.model.window import Window

        window = Window(settings.pop("start_percent", 0.0), settings.pop("end_percent", 1.0))
        settings = {"bank_mib": 0, "window": window, **settings}
        return apply(self.model if model is None else model, self.vae, self.clip, subjects, MrsaSettings(**settings))


@pytest.fixture(scope="session")
def toy_type(host):
    """The class, for tests that need another model."""
    return Toy


@pytest.fixture(scope="session")
def toy_shared(toy_type):
    """One toy for the whole session."""
    with torch.inference_mode():
        return toy_type()


@pytest.fixture
def toy(toy_shared):
    """The toy, in inference mode as in the host; on one thread, because with so small a model threads only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield toy_shared
    torch.set_num_threads(threads)


@pytest.fixture
def idle(toy, monkeypatch):
    """The toy's UNet computes nothing, for tests that count how often it is asked."""
    monkeypatch.setattr(toy.base.diffusion_model, "forward", lambda x, *_, **__: x * 0)
