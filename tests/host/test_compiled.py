"""Models that a node has compiled: every system draws with them what it draws without, whatever was sampled before."""

import pytest
import torch

STEPS = 2
# As few layers as a decoder stage of two blocks with attention needs: tracing a UNet takes long.
SMALL = {
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [0],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": -2,
}
BLOCK = "diffusion_model.output_blocks.1.1.transformer_blocks.0"
LAYER = "output_blocks.1.1.transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def small(toy_type):
    """The model, after a plain sampling of it in which a block was compiled: tracing all of it would take ten times as
    long and find the same."""
    from comfy.ldm.modules import attention

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        # The host's choice for a CPU asks for free memory, where compiled code breaks off.
        patch.setattr(attention, "optimized_attention", attention.attention_pytorch)
        torch._dynamo.reset()
        toy = toy_type(SMALL)
        toy.plain = toy.sample(steps=STEPS)
        before = graphs()
        assert equal(toy.sample(block(toy.model), steps=STEPS), toy.plain)
        assert graphs() == before + 1
        yield toy
        torch._dynamo.reset()


@pytest.fixture
def toy(small):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield small
    torch.set_num_threads(threads)


def graphs():
    """How many were compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def equal(drawn, expected):
    return float((drawn - expected).abs().max() / expected.std()) < 1e-5


def eager(graph, inputs):
    """A backend that needs no compiler; the one that PyTorch knows by this name imports all others too."""
    return graph.forward


def refusing(graph, inputs):
    """A backend for what must not be compiled."""
    raise AssertionError("compiled")


def host_node(model, backend=refusing, key="diffusion_model"):
    """What TorchCompileModel does, with another backend."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model = model.clone(disable_dynamic=True)
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=model, backend=backend, options=options, keys=[key])
    return model


def block(model):
    """What TorchCompileModel does, with a block alone."""
    return host_node(model, eager, BLOCK)


def object_patch(model):
    """What nodes of other packs do."""
    model = model.clone()
    model.add_object_patch(
        "diffusion_model", torch.compile(model.get_model_object("diffusion_model"), backend=refusing)
    )
    return model


def partition():
    masks = torch.zeros(2, 16, 16)
    masks[0, :, :8] = masks[1, :, 8:] = 1
    return masks


def concept(toy, with_lora):
    """One with differences of keys and values, and with a LoRA of a layer outside of cross-attention if asked for."""
    from conceptloom.encoders.adapter_names import Named
    from conceptloom.encoders.adapters import Adapter
    from conceptloom.encoders.concepts import Concept, Delta
    from conceptloom.host.model.families.unet import UNetFamily
    from conceptloom.host.model.sites import CROSS
    from conceptloom.host.weaver.fusion import PromptedConcept

    unet, generator = toy.base.diffusion_model, torch.Generator().manual_seed(11)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    deltas = {}
    family = UNetFamily()
    for site in family.sites(unet):
        if site.kind == CROSS:
            shape = unet.get_submodule(family.layer(site.key, "k")).weight.shape
            deltas[site.key] = {part: Delta((random(*shape),)) for part in "kv"}
    others = {}
    if with_lora:
        rows, columns = unet.get_submodule(LAYER).weight.shape
        factors = {"up": random(rows, 4), "down": random(4, columns)}
        others[f"diffusion_model.{LAYER}.weight"] = Adapter({part: Named(part, x) for part, x in factors.items()})
    known = Concept("thing", deltas, others=others, class_word="thing")
    return PromptedConcept(known, toy.clip.encode_from_tokens_scheduled("a thing"))


def fusion(toy, model, with_lora=False, **settings):
    from conceptloom.host.weaver.fusion import FusionSettings, apply
    from conceptloom.subjects.partition import Partition

    model, positive = apply(
        model, toy.positive, [concept(toy, with_lora)], Partition(partition()), FusionSettings(**settings)
    )
    return model, {"positive": positive}


def fusion_with_a_lora(toy, model):
    return fusion(toy, model, with_lora=True)


def fusion_of_scores(toy, model):
    return fusion(toy, model, mode="scores")


def freecustom(toy, model):
    return toy.apply(toy.subject(), toy.subject(1), model=model, blocks="all blocks"), {}


def recorded_shares(toy, model):
    from conceptloom.host.freecustom.attention import record_shares

    model, toy.record = record_shares(freecustom(toy, model)[0], "all", "all")
    return model, {}


def plug_and_play(toy, model):
    from conceptloom.host.structure.inversion import SourceTrajectory
    from conceptloom.host.structure.plugandplay import InjectionSettings, apply
    from conceptloom.samplers.inversion import Trajectory

    levels = (0.0, 1.0, 4.0, 15.0)
    latents = torch.randn(len(levels), 1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    source = SourceTrajectory(Trajectory(levels, latents), toy.clip.encode_from_tokens_scheduled("the source"), 0.0)
    return apply(model, source, InjectionSettings(residual_until=1.0, attention_until=1.0)), {}


def delayed(toy, model):
    from conceptloom.host.fastcomposer.delay import Delay, delayed, prepared

    late = toy.clip.encode_from_tokens_scheduled("a dog and a cat")
    return prepared(model), {"positive": delayed(toy.positive, late, Delay(0.5, None, 0, "steps"))}


def composed(toy, model):
    """Maps alone: tokens make the text longer, which is compiled anew."""
    from conceptloom.compositions.composition import SKETCH, Composition, Part
    from conceptloom.encoders.composer_adapter import ComposerAdapter, ComposerAdapterConfig
    from conceptloom.host.composer.adapter import encode, prepared, wrap
    from conceptloom.host.model.families import family_of

    unet = toy.base.diffusion_model
    levels = tuple(channels for _, channels in family_of(unet).levels(unet))
    config = ComposerAdapterConfig(levels=levels, context_width=64, local_width=8, body=tuple(8 for _ in levels))
    torch.manual_seed(0)
    adapter = ComposerAdapter(config).eval().requires_grad_(False)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    sketch = (torch.rand(128, 128) > 0.9).float()
    positive = encode(wrap(adapter), toy.clip, Composition((128, 128), {SKETCH: Part(sketch)}), toy.positive)
    return prepared(model), {"positive": positive}


SYSTEMS = [freecustom, recorded_shares, fusion, fusion_with_a_lora, fusion_of_scores, plug_and_play]


def drawn(toy, system, before=lambda model: model, after=lambda model: model):
    """The picture of a system, with a node before it and one after it."""
    model, conds = system(toy, before(toy.model))
    return toy.sample(after(model), steps=STEPS, **conds)


@pytest.mark.parametrize("system", [*SYSTEMS, delayed, composed])
def test_in_both_orders_it_is_the_picture_of_the_uncompiled_model(toy, system):
    expected, before = drawn(toy, system), graphs()
    assert not equal(expected, toy.plain)
    assert equal(drawn(toy, system, after=block), expected)
    assert equal(drawn(toy, system, before=block), expected)
    assert equal(toy.sample(block(toy.model), steps=STEPS), toy.plain)
    assert graphs() == before


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("node", [host_node, object_patch])
def test_nothing_is_compiled_while_it_acts(toy, system, node):
    """So its handlers stay in no code that a plain sampling would use later."""
    expected = drawn(toy, system)
    assert equal(drawn(toy, system, after=node), expected)
    assert equal(drawn(toy, system, before=node), expected)


def test_systems_together(toy):
    def all_three(toy, model):
        model, conds = fusion_with_a_lora(toy, model)
        return plug_and_play(toy, freecustom(toy, model)[0])[0], conds

    expected = drawn(toy, all_three)
    assert equal(drawn(toy, all_three, before=block, after=host_node), expected)


def test_shares_are_those_of_the_uncompiled_model(toy):
    shares = []
    for after in (lambda model: model, block):
        picture = drawn(toy, recorded_shares, after=after)
        shares.append(toy.record.find(picture))
    assert torch.allclose(*shares, atol=1e-3)


def test_an_inversion_is_that_of_the_uncompiled_model(toy):
    from conceptloom.host.structure.inversion import invert

    # Two pictures are as many rows as a picture and its negative: no second trace.
    latent = {"samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5)) / 0.18215}
    plain, compiled = (
        invert(model, latent, toy.positive, steps=3, scheduler="ddim_uniform")
        for model in (toy.model, block(toy.model))
    )
    assert equal(compiled.noise["samples"], plain.noise["samples"])
    assert equal(compiled.source.trajectory.latents, plain.source.trajectory.latents)
    assert abs(compiled.error - plain.error) < 1e-3


def test_what_a_system_does_not_touch_is_compiled(toy):
    """A system that is off opens no run, and one that fails leaves nothing behind."""
    from conceptloom.host.model.patching import attach

    class Broken:
        name = "Broken"

        def begin(self, sampling):
            return self

        def handlers(self, evaluation):
            raise ValueError("broken")

        def close(self):
            pass

    with pytest.raises(ValueError, match="broken"):
        toy.sample(host_node(attach(toy.model, "broken", Broken())), steps=STEPS)
    with pytest.raises(Exception, match="compiled"):
        toy.sample(host_node(toy.apply(toy.subject(weight=0.0)), key=BLOCK), steps=STEPS)


def test_weights_are_read_where_a_compiled_module_is_left_in_the_model(toy):
    from conceptloom.host.weaver.weights import Weights

    before = Weights.of(toy.model)
    with torch.compiler.set_stance("force_eager"):
        toy.sample(object_patch(toy.model), steps=1)
    assert any("_orig_mod" in name for name in toy.model.model_state_dict())
    after = Weights.of(toy.model)
    assert after.layers == before.layers and after.fingerprint() == before.fingerprint()


@pytest.mark.parametrize(
    ("system", "name"),
    [
        (freecustom, "Multi-Reference Self-Attention (FreeCustom)"),
        (fusion, "Multi-Concept Fusion (Concept Weaver)"),
        (plug_and_play, "Plug-and-Play Injection"),
    ],
)
def test_where_pytorch_is_too_old_it_is_said(toy, system, name, monkeypatch):
    expected = drawn(toy, system)
    monkeypatch.delattr(torch.compiler, "set_stance")
    assert torch.equal(drawn(toy, system), expected)
    for place in ("before", "after"):
        with pytest.raises(ValueError) as caught:
            drawn(toy, system, **{place: host_node})
        assert str(caught.value) == (
            f"{name}: model: expected one that is not compiled, got one from TorchCompileModel; remove that node, or "
            "update PyTorch to 2.6 or newer"
        )
