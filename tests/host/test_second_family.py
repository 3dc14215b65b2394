"""FreeCustom on a second family of models: the host's Z-Image transformer, tiny and random, known by one file alone.

What is proven: MRSA's two passes run through the host's own sampler at the sites that `second_family` names, and give
what a naive double-precision computation of joint attention with the references' image tokens as further keys gives;
tokens of text and padding neither see references nor are recorded; other packs' attention keeps computing whatever
needs no bias; nothing stays behind. No file of `host/freecustom` or `attention` names a family for it.

What is not: that pictures of a real model of this kind get better. The formula is the UNet's, without the text guard
and the shifted positions that joint attention needs (specs/dit.md 1.1): a weight here takes from the text what it gives
the references, which `test_text_pays_for_references` measures.
"""

import gc
import itertools
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIZE = (12, 17)  # odd: its last column of tokens is half padding
GRID, TOKENS, PADDED, TEXT = (6, 9), 54, 64, 32
DIM, HEADS, LAYERS, REFINERS = 256, 4, 3, 2
SITES = REFINERS + LAYERS
STEPS = 2


@pytest.fixture(scope="module")
def model_and_family(toy_type):
    import comfy.model_base
    import comfy.supported_models
    from second_family import ZImageFamily

    config = comfy.supported_models.ZImage(
        {
            "image_model": "lumina2",
            "in_channels": 16,
            "dim": DIM,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "n_layers": LAYERS,
            "n_refiner_layers": REFINERS,
            "axes_dims": [16, 24, 24],
            "multiple_of": 64,
            "ffn_dim_multiplier": 1.0,
            "qk_norm": True,
            "cap_feat_dim": 64,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
            "dtype": torch.float32,
        }
    )
    with torch.inference_mode():
        return toy_type.of(comfy.model_base.Lumina2(config, device="cpu")), ZImageFamily()


@pytest.fixture
def toy(model_and_family, monkeypatch):
    """The toy with its family known, in inference mode as under the host."""
    from conceptloom.host.model import families

    toy, family = model_and_family
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    with torch.inference_mode():
        yield toy


@pytest.fixture
def sample(toy):
    def sample(model=None, cfg=1.0, size=SIZE, **options):
        return toy.sample(model, STEPS, cfg, size=size, scheduler="simple", **options)

    return sample


@pytest.fixture
def apply(toy):
    def apply(*subjects, model=None, blocks="all blocks", **settings):
        return toy.apply(*subjects, model=model, blocks=blocks, **settings)

    return apply


def subject(toy, seed=0, size=(96, 136), **changes):
    return toy.subject(seed, size, **changes)


def distance(a, b):
    """The largest difference, as a part of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def attached(toy, handler):
    """The MODEL with a handler (site, call) -> output at all sites."""
    from conceptloom.host.model.families import family_of, network_of
    from conceptloom.host.model.patching import attach

    network = network_of(toy.base)
    sites = family_of(network).sites(network)

    class Run:
        name = "test"

        def begin(self, _sampling):
            return self

        def handlers(self, _evaluation):
            return {site: partial(handler, site) for site in sites}

        def finish(self, _samples):
            pass

        def close(self):
            pass

    return attach(toy.model, "test", Run())


class TestUntouched:
    """Oracle D1: bit for bit the host's picture."""

    @pytest.mark.parametrize("cfg", [1.0, 4.0])
    def test_every_site_is_reached_and_left_as_it_is(self, toy, sample, cfg):
        seen = []

        def leave(site, call):
            beside = TEXT if site.key.startswith("layers") else 0
            assert (call.heads, call.grid, call.picture) == (HEADS, GRID, slice(beside, beside + TOKENS))
            assert call.q.shape == call.k.shape == call.v.shape == (1 + (cfg > 1), beside + PADDED, DIM)
            seen.append(site.index)
            return call.unpatched()

        plain = sample(cfg=cfg)
        assert torch.equal(sample(attached(toy, leave), cfg), plain)
        assert seen == [*range(SITES)] * STEPS

    def test_nothing_to_see_gives_the_hosts_bits(self, toy, apply, sample):
        plain = sample()
        for model in (apply(), apply(subject(toy, weight=0.0)), apply(subject(toy), start_percent=1.0)):
            assert torch.equal(sample(model), plain)
            assert toy.rows == [1] * STEPS

    def test_it_leaves_no_trace(self, toy, apply, sample):
        plain, before = sample(), (repr(toy.model.model_options), dict(toy.model.wrappers), dict(toy.model.attachments))
        model = apply(subject(toy))
        drawn = sample(model)
        assert distance(drawn, plain) > 1e-2
        assert torch.equal(sample(model), drawn)
        assert torch.equal(sample(), plain)
        assert (repr(toy.model.model_options), toy.model.wrappers, toy.model.attachments) == before
        gc.collect()
        network = toy.base.diffusion_model
        assert not any(m._forward_hooks for m in network.modules())


class TestFormula:
    """Keys appended by hand at every site, so that what MRSA's formula must give is known exactly."""

    @staticmethod
    def appending(weight, of_picture=True):
        """A handler that lets the picture's queries see copies of the picture's own keys, or of all, once more."""
        from conceptloom.attention import mrsa

        def handler(_site, call):
            (k, v), shown = (x[0] for x in (call.k, call.v)), call.picture if of_picture else slice(None)
            keys, values, n_own = k[shown], v[shown], len(k)
            visible = torch.zeros(1, call.q.shape[1], dtype=torch.bool)
            visible[:, call.picture] = True
            groups = mrsa.query_groups(visible, torch.zeros(len(keys), dtype=torch.long), n_own)
            bias = torch.cat([torch.zeros(n_own), torch.full((len(keys),), weight)]).view(1, 1, 1, -1)
            return mrsa.multi_reference_attention(call.attend, call.q, call.k, call.v, keys, values, bias, groups)

        return handler

    @pytest.mark.parametrize("weight", [-2.0, 0.0, 3.0])
    def test_all_own_keys_once_more_change_nothing(self, toy, sample, weight):
        """Oracle D2."""
        drawn = sample(attached(toy, self.appending(weight, of_picture=False)))
        assert distance(drawn, sample()) < 1e-5

    def test_a_weight_of_minus_infinity_is_absence(self, toy, sample):
        """Oracle D5."""
        assert distance(sample(attached(toy, self.appending(-1e4))), sample()) < 1e-5

    @pytest.mark.parametrize("weight", [0.0, 3.0])
    def test_text_pays_for_references(self, toy, sample, weight):
        """Oracles D3 and D4 without the guard: the picture's own keys once more at weight w are the same keys with
        ln(1 + e^w) on their logits, which takes from text and padding and is not the plain picture."""

        def lifted(_site, call):
            bias = torch.zeros(1, 1, call.q.shape[1], call.k.shape[1])
            bias[:, :, call.picture, call.picture] = math.log1p(math.exp(weight))
            return call.attend(call.q, call.k, call.v, bias)

        drawn = sample(attached(toy, self.appending(weight)))
        assert distance(drawn, sample(attached(toy, lifted))) < 1e-5
        assert distance(drawn, sample()) > 1e-2


class Naive:
    """The two passes from their equations, in double precision, with no code of ours but the noise and the masks."""

    def __init__(self, toy, subjects, formula="official"):
        self.toy, self.subjects, self.formula = toy, subjects, formula

    def forward(self, x, sigma, contexts, attend):
        """Denoised latents; `attend` gets (number of the call, q, k, v) with heads, in double precision."""
        calls = itertools.count()

        def override(_kernel, q, k, v, _heads, *_args, **_kwargs):
            out = attend(next(calls), *(y.double() for y in (q, k, v)))
            return out.transpose(1, 2).flatten(2).to(q.dtype)

        options = {"optimized_attention_override": override}
        context = torch.cat(contexts)
        return self.toy.base._apply_model(
            x, sigma.repeat(len(x)), None, context, None, options, num_tokens=context.shape[1]
        )

    def reference(self, i, sigma, step, context):
        """Keys and values of the image tokens of one reference by call, (heads, tokens, D) each."""
        from conceptloom.host.freecustom.references import reference_noise

        one = self.subjects[i]
        z0 = self.toy.base.process_latent_in(self.toy.vae.encode(one.image[None]))
        h, w = (-(-side // 2) for side in z0.shape[-2:])
        kept = {}

        def attend(call, q, k, v):
            start = k.shape[2] - -(-h * w // 32) * 32
            kept[call] = k[0, :, start : start + h * w], v[0, :, start : start + h * w]
            return softmax(q, k) @ v

        noise = reference_noise(0, step, i, z0.shape[1:])
        self.forward(sigma * noise + (1 - sigma) * z0, sigma, [context], attend)
        rows, columns = (torch.arange(n) * one.mask.shape[d] // n for d, n in enumerate((h, w)))
        mask = one.mask[rows[:, None], columns].flatten() > 0.5
        return kept, mask

    def picture(self, sigmas, x, cfg, style_fidelity):
        for step, (sigma, then) in enumerate(itertools.pairwise(sigmas)):
            prompts = [self.toy.clip.encode_from_tokens_scheduled(one.prompt)[0][0] for one in self.subjects]
            negative, positive = self.toy.negative[0][0], self.toy.positive[0][0]
            seen = [[self.reference(i, sigma, step, prompt) for i, prompt in enumerate(prompts)]]
            sides, contexts = [1.0], [positive]
            if cfg != 1:
                seen.append([self.reference(i, sigma, step, negative) for i in range(len(self.subjects))])
                sides, contexts = [1.0, 1.0 - style_fidelity], [positive, negative]

            def attend(call, q, k, v, seen=seen, sides=sides):
                out = softmax(q, k) @ v
                if call < REFINERS:
                    return out
                own = slice(k.shape[2] - PADDED, k.shape[2] - PADDED + TOKENS)
                for row, share in enumerate(sides):
                    mixed = self.mixed(call, q[row, :, own], k[row], v[row], seen[row])
                    out[row, :, own] = share * mixed + (1 - share) * out[row, :, own]
                return out

            denoised = self.forward(x.expand(len(sides), -1, -1, -1), sigma, contexts, attend)
            guided = denoised[:1] if cfg == 1 else denoised[1:] + cfg * (denoised[:1] - denoised[1:])
            x = x + (x - guided) / sigma * (then - sigma)
        return self.toy.base.process_latent_out(x)

    def mixed(self, call, q, k, v, seen):
        """Joint attention of the picture's queries (heads, tokens, D) over [own, references]."""
        keys, values, biases = [k], [v], [torch.zeros(len(q[0]), k.shape[1]).double()]
        for one, (kept, mask) in zip(self.subjects, seen, strict=True):
            key, value = kept[call]
            bias = torch.full((len(q[0]), len(mask)), math.log(TOKENS / len(mask))).double()
            if self.formula == "official":
                bias = torch.where(mask, bias + one.weight, -math.inf)
            else:
                key = key * torch.where(mask, one.weight, 0.0).double()[:, None]
            if one.target_mask is not None:
                h, w = GRID
                rows, columns = (torch.arange(n) * one.target_mask.shape[d] // n for d, n in enumerate((h, w)))
                bias[one.target_mask[rows[:, None], columns].flatten() < 0.5] = -math.inf
            keys.append(key)
            values.append(value)
            biases.append(bias)
        return softmax(q, torch.cat(keys, 1), torch.cat(biases, 1)) @ torch.cat(values, 1)


def softmax(q, k, bias=0.0):
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)


def left_half(size=(96, 136)):
    mask = torch.zeros(size)
    mask[:, : size[1] // 2] = 1
    return mask


CASES = {
    "one": ([{}], {}, {"cfg": 1.0}),
    "of two shapes, one of two chunks of text": (
        [{}, {"size": (128, 96), "weight": 2.0, "noun": f"thing of a {'long ' * 12}name"}],
        {},
        {"cfg": 1.0},
    ),
    "in a region": ([{"target_mask": left_half()}, {"weight": 2.0}], {}, {"cfg": 1.0}),
    "guided": ([{"weight": 2.0}], {}, {"cfg": 4.0}),
    "seen by both sides": ([{}], {"style_fidelity": 0.4}, {"cfg": 4.0}),
    "the paper's formula": ([{"weight": 1.5}], {"formula": "paper"}, {"cfg": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_passes_equal_joint_attention_with_further_keys(toy, apply, sample, case):
    """The formula against double precision, through the whole sampling. References keep their shape: (128, 96) is as
    large as the picture but not of its proportions, so its tokens are others in number."""
    import comfy.sample
    import comfy.samplers

    changes, settings, sampling = CASES[case]
    subjects = [subject(toy, i, **change) for i, change in enumerate(changes)]
    drawn = sample(apply(*subjects, **settings), **sampling)
    sigmas = comfy.samplers.calculate_sigmas(toy.base.model_sampling, "simple", STEPS)
    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, *SIZE), 3)
    x = sigmas[0] * noise
    naive = Naive(toy, subjects, settings.get("formula", "official"))
    expected = naive.picture(sigmas, x, sampling["cfg"], settings.get("style_fidelity", 1.0))
    assert distance(drawn, expected) < 1e-5
    assert distance(sample(**sampling), expected) > 1e-2


class TestOthers:
    def test_another_packs_attention_computes_what_needs_no_bias(self, toy, apply, sample):
        """Both passes call it: the picture's for text and padding, the reference's for all up to the last site."""
        calls = []

        def kernel(func, *args, **kwargs):
            calls.append(args[0].shape)
            return func(*args, **kwargs)

        def overridden(model):
            model = model.clone()
            model.model_options["transformer_options"] = {"optimized_attention_override": kernel}
            return model

        plain, drawn = sample(), sample(apply(subject(toy)))
        assert torch.equal(sample(overridden(toy.model)), plain)
        assert len(calls) == STEPS * (REFINERS + SITES)
        for model in (apply(subject(toy), model=overridden(toy.model)), overridden(apply(subject(toy)))):
            calls.clear()
            assert torch.equal(sample(model), drawn)
            assert len(calls) == STEPS * (REFINERS + SITES + REFINERS + SITES - 1)

    def test_shares_are_of_the_picture_s_queries(self, toy, apply, sample):
        from conceptloom.host.freecustom.attention import record_shares

        model, record = record_shares(apply(subject(toy), subject(toy, 1)), "all", "all")
        maps = record.find(sample(model))
        assert maps.shape == (1, 3, *SIZE)
        assert torch.allclose(maps.sum(1), torch.ones(1, *SIZE), atol=1e-5)
        assert float(maps[:, 1:].amin()) > 1e-3

    def test_the_bank_keeps_what_was_recorded(self, toy, apply, sample):
        model = apply(subject(toy), bank_mib=8)
        first = sample(model)
        assert toy.rows == [1] * 2 * STEPS
        assert torch.equal(sample(model), first)
        assert toy.rows == [1] * STEPS


class TestRefusals:
    UNETS = "SD 1.x, SD 2.x, SDXL and Shapeland"

    def test_a_preset_that_it_does_not_have_gets_its_sentence(self, toy, apply):
        with pytest.raises(
            ValueError, match="blocks: expected all blocks or numbers from 0 to 4 for this model, got last"
        ):
            apply(subject(toy), blocks="last two decoder stages")

    @pytest.mark.parametrize("system", ["fusion", "plug and play", "load concept", "train concept", "fastcomposer"])
    def test_systems_that_need_other_sites_refuse_it_by_name(self, toy, system):
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.fastcomposer import files
        from conceptloom.host.model.copies import trainable_copies
        from conceptloom.host.structure import plugandplay
        from conceptloom.host.weaver import concepts, fusion

        concept = Concept("dog", {"middle.0.0": {"k": Delta((torch.ones(2, 4),))}})
        prompted, partition = fusion.PromptedConcept(concept, toy.positive), torch.stack([torch.ones(8, 8)] * 2)
        copied = toy.model.clone()
        copied.cached_patcher_init = ()
        clip = type("CLIP", (), {"patcher": copied})
        calls = {
            "fusion": lambda: fusion.apply(toy.model, toy.positive, [prompted], partition, fusion.FusionSettings()),
            "plug and play": lambda: plugandplay.apply(toy.model, None, plugandplay.InjectionSettings()),
            "load concept": lambda: concepts.load_concept(
                toy.model, {"lora_unet_x_attn2_to_k.lora_up.weight": torch.ones(2, 1)}
            ),
            "train concept": lambda: trainable_copies(copied, clip).__enter__(),
            "fastcomposer": lambda: files._with_lora(toy.model, {"x.lora_up.weight": torch.ones(2, 1)}),
        }
        with pytest.raises(ValueError, match=f"^model: expected one of the families {self.UNETS}, got Z-Image$"):
            calls[system]()

    def test_unknown_as_installed_it_is_refused_by_its_class(self, model_and_family):
        toy, _ = model_and_family
        with pytest.raises(ValueError, match=f"^model: expected one of the families {self.UNETS}, got NextDiT$"):
            toy.apply(toy.subject())


def test_only_families_know_a_family():
    """Names of a model's parts and of the host's slots for them stand in families' own files alone."""
    known = re.compile(
        r"UNetModel|NextDiT|Z-Image|lumina|attn[12]\b|_blocks?\.\d|transformer_blocks|block_type|site\.key\["
    )
    for folder in ("host/freecustom", "host/structure", "host/weaver", "host/model", "attention"):
        for file in sorted((ROOT / folder).glob("*.py")):
            found = known.search(file.read_text(encoding="utf-8"))
            assert found is None, f"{file}: {found[0]}"
