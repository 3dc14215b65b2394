"""Multi-concept fusion on the host, against modules that compute the paper's equation in full."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conceptloom.subjects.partition import Partition, layer_masks
from other_packs import NegPip, controlled, negpip, reference_control

WIDTH = 64


def close(drawn, expected):
    """Equal up to the rounding of single precision; the toy's latents are in the hundreds."""
    return float((drawn - expected).norm() / expected.norm()) < 2e-5


class Bank:
    """Concepts with random differences at all layers of the toy, their prompts, and a partition."""

    def __init__(self, toy, count, size=(16, 16), strength=1.0):
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.model.families.unet import UNetFamily
        from conceptloom.host.model.sites import CROSS
        from conceptloom.host.weaver.fusion import PromptedConcept
        from conceptloom.subjects.partition import assemble

        generator = torch.Generator().manual_seed(11)
        self.layers = {
            site.key: toy.base.diffusion_model.get_submodule(self.name(site.key))
            for site in UNetFamily().sites(toy.base.diffusion_model)
            if site.kind == CROSS
        }
        self.concepts = []
        for i in range(count):
            deltas = {
                key: {p: Delta((torch.randn(layer.to_k.weight.shape, generator=generator) * 0.1,)) for p in "kv"}
                for key, layer in self.layers.items()
            }
            concept = Concept(f"concept{i}", deltas, class_word=f"thing{i}", strength=strength)
            text = (
                f"concept {i}"
                if i % 2
                else f"a text of two chunks about concept number {i}, for it is rather a long one"
            )
            self.concepts.append(PromptedConcept(concept, toy.clip.encode_from_tokens_scheduled(text)))
        h, w = size[0] * 8, size[1] * 8
        masks = torch.zeros(count, h, w)
        for i in range(count):
            masks[i, h // 4 : 3 * h // 4, i * w // count : (i + 1) * w // count - w // 16] = 1
        self.partition = assemble(list(masks), dilation=0.02, feather=0.05)

    @staticmethod
    def name(key):
        block, number, depth = key.split(".")
        place = {"input": f"input_blocks.{number}.1", "middle": "middle_block.1", "output": f"output_blocks.{number}.1"}
        return f"{place[block]}.transformer_blocks.{depth}.attn2"


def fused(toy, bank, model=None, background=None, **settings):
    from conceptloom.host.model.window import Window
    from conceptloom.host.weaver.fusion import FusionSettings, apply

    window = Window(settings.pop("start_percent", 0.0), settings.pop("end_percent", 1.0))
    model, divided = toy.model if model is None else model, Partition(bank.partition)
    return apply(model, toy.positive, bank.concepts, divided, FusionSettings(window=window, **settings), background)[0]


def comfy_levels(toy, steps):
    """The schedule of the toy's sampling."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(toy.base.model_sampling, "sgm_uniform", steps)


def full_attention(q, k, v):
    """Of the toy's four heads."""
    heads = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def naive(toy, bank, monkeypatch, suppression, block="", between=(0.0, math.inf), cap=math.inf):
    """Every cross-attention of the toy computes h_fuse from full attentions with whole weights.

    Args:
        block: only layers of this part of the model.
        between: only noise levels from the first to the second.
        cap: the most by which suppression lengthens a token.
    """
    for key, layer in bank.layers.items():
        if not key.startswith(block):
            continue

        def forward(x, context=None, value=None, mask=None, transformer_options=None, key=key, layer=layer):
            q, base = layer.to_q(x), full_attention(layer.to_q(x), layer.to_k(context), layer.to_v(context))
            grid = transformer_options["activations_shape"][-2:]
            masks = layer_masks(bank.partition, tuple(grid)).flatten(1)
            out, n = base.clone(), len(x) // len(transformer_options["cond_or_uncond"])
            for i, side in enumerate(transformer_options["cond_or_uncond"]):
                if side == 1 or not between[0] <= float(transformer_options["sigmas"][0]) <= between[1]:
                    continue
                rows = slice(i * n, (i + 1) * n)
                mixed = masks[-1, :, None] * base[rows]
                for prompted, share in zip(bank.concepts, masks, strict=False):
                    p = prompted.conditioning[0][0].expand(n, -1, -1)
                    k, v = (
                        p @ (linear.weight + prompted.concept.deltas[key][part].matrix()).T
                        for part, linear in (("k", layer.to_k), ("v", layer.to_v))
                    )
                    mixed = mixed + share[:, None] * full_attention(q[rows], k, v)
                fused = (1 + suppression) * mixed - suppression * base[rows]
                longer = (fused.abs().sum(-1) / mixed.abs().sum(-1))[..., None]
                out[rows] = torch.where(longer > cap, fused * cap / longer, fused)
            return layer.to_out(out)

        monkeypatch.setattr(layer, "forward", forward)


class TestHooks:
    """Conditionings with hooks are taken for what the hooks do: wrap, or change weights as a LoRA on the model does."""

    WEIGHT = "diffusion_model.output_blocks.6.1.transformer_blocks.0.attn2.to_v.weight"

    def hooked(self, toy, difference, keyframes=()):
        """The positive with a hook that adds a difference to one weight, by `keyframes` (start_percent, strength)."""
        import comfy.hooks

        hook = comfy.hooks.WeightHook()
        hook.need_weight_init, hook.weights = False, {self.WEIGHT: ("diff", (difference,))}
        for start, strength in keyframes:
            hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength, start))
        group = comfy.hooks.HookGroup()
        group.add(hook)
        return [[states, {**extras, "hooks": group}] for states, extras in toy.positive]

    def merged(self, toy, difference):
        model = toy.model.clone()
        model.add_patches({self.WEIGHT: ("diff", (difference,))})
        return model

    @pytest.fixture
    def difference(self, toy):
        shape = toy.model.model.state_dict()[self.WEIGHT].shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.3

    def test_a_hook_that_changes_weights_is_the_lora_on_the_model(self, toy, difference):
        bank = Bank(toy, 2)
        drawn = toy.sample(fused(toy, bank), cfg=1.0, positive=self.hooked(toy, difference))
        assert close(drawn, toy.sample(fused(toy, bank, model=self.merged(toy, difference)), cfg=1.0))
        assert not close(drawn, toy.sample(fused(toy, bank), cfg=1.0))

    def test_its_strength_may_follow_a_schedule(self, toy, difference):
        """Two steps without it and then two with it equal two samplings, each with a model of its own."""
        import comfy.sample

        bank, steps = Bank(toy, 2), 4
        middle = float(comfy_levels(toy, steps)[2])
        percent = next(
            p / 1000 for p in range(1000) if toy.base.model_sampling.percent_to_sigma(p / 1000) < middle * 1.05
        )
        positive = self.hooked(toy, difference, [(0.0, 0.0), (percent, 1.0)])
        drawn = toy.sample(fused(toy, bank), steps=steps, cfg=1.0, positive=positive)
        half = toy.sample(fused(toy, bank), steps=steps, cfg=1.0, last_step=2, force_full_denoise=False)
        late = fused(toy, bank, model=self.merged(toy, difference))
        expected = comfy.sample.sample(
            late, torch.zeros_like(half), steps, 1.0, "euler", "sgm_uniform", toy.positive, toy.negative, half,
            start_step=2, disable_pbar=True, disable_noise=True,
        )  # fmt: skip
        assert close(drawn, expected)
        assert not close(drawn, toy.sample(fused(toy, bank), steps=steps, cfg=1.0))

    def test_a_hook_that_only_wraps(self, toy):
        """Reference-only control of Advanced-ControlNet, whose user has connected no hooks."""
        control = reference_control(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8)))
        bank, positive = Bank(toy, 2), controlled(control, toy.positive)
        drawn = toy.sample(fused(toy, bank), positive=positive)
        assert not close(drawn, toy.sample(fused(toy, bank))) and not close(drawn, toy.sample(positive=positive))

    def test_areas_and_masks_are_still_refused(self, toy):
        part = [[states, {**extras, "area": (8, 16, 0, 0)}] for states, extras in toy.positive]
        with pytest.raises(
            ValueError, match="positive: expected one conditioning for the whole picture, got one with area"
        ):
            toy.sample(fused(toy, Bank(toy, 1)), positive=part)


class TestNegPip:
    """Beside it every token has two rows, which for a concept's own keys and values are the same word twice."""

    @pytest.fixture
    def parts(self, host):
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.shapeland import load_clip, load_model

        generator = torch.Generator().manual_seed(2)
        deltas = {"middle.0.0": {"k": Delta((torch.randn(128, 128, generator=generator) * 0.1,))}}
        return load_model(), load_clip(), Concept("star", deltas, class_word="star")

    def draw(self, model, clip, concept, prompt):
        import comfy.sample
        from conceptloom.host.weaver.fusion import FusionSettings, apply
        from conceptloom.host.weaver.prompts import encode_prompts

        made = encode_prompts(clip, prompt, "", [concept])
        everywhere = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
        fused, positive = apply(model, made.positive, made.concepts, Partition(everywhere), FusionSettings())
        latent = torch.zeros(1, 8, 16, 16)
        noise = comfy.sample.prepare_noise(latent, 0)
        return comfy.sample.sample(
            fused, noise, 2, 4.0, "euler", "normal", positive, made.negative, latent, disable_pbar=True, seed=0
        )

    def test_words_of_negative_weight_are_refused_and_others_drawn_as_without_it(self, parts):
        model, clip, concept = parts
        with torch.inference_mode():
            prompt = "a (red:1.2) star"
            drawn = self.draw(negpip(model), NegPip(clip), concept, prompt)
            assert float((drawn - self.draw(model, clip, concept, prompt)).norm() / drawn.norm()) < 1e-4
            with pytest.raises(
                ValueError, match="clip: expected one row of text states for each token where words have"
            ):
                self.draw(negpip(model), NegPip(clip), concept, "a (red:-1.0) star")


class TestPicture:
    @pytest.mark.parametrize(("count", "suppression"), [(1, 0.0), (2, 0.3), (3, 1.0), (5, 0.3)])
    def test_it_is_the_papers_equation_at_every_layer(self, toy, monkeypatch, count, suppression):
        bank = Bank(toy, count)
        drawn = toy.sample(fused(toy, bank, suppression=suppression))
        assert toy.rows == [2] * toy.steps
        naive(toy, bank, monkeypatch, suppression)
        assert close(drawn, toy.sample())

    @pytest.mark.parametrize(("batch", "cfg", "size"), [(2, 7.5, (16, 16)), (1, 1.0, (16, 16)), (1, 5.0, (15, 21))])
    def test_batches_cfg_1_and_odd_sizes(self, toy, monkeypatch, batch, cfg, size):
        bank = Bank(toy, 2, size)
        drawn = toy.sample(fused(toy, bank), batch=batch, cfg=cfg, size=size)
        naive(toy, bank, monkeypatch, 0.3)
        assert close(drawn, toy.sample(batch=batch, cfg=cfg, size=size))

    def test_the_decoder_alone(self, toy, monkeypatch):
        bank = Bank(toy, 2)
        drawn = toy.sample(fused(toy, bank, layers="decoder"))
        naive(toy, bank, monkeypatch, 0.3, "output")
        assert close(drawn, toy.sample())
        assert not close(drawn, toy.sample(fused(toy, bank)))

    def test_a_part_of_the_schedule(self, toy, monkeypatch):
        bank = Bank(toy, 2)
        drawn = toy.sample(fused(toy, bank, start_percent=0.1, end_percent=0.6), steps=5)
        levels = toy.base.model_sampling.percent_to_sigma
        naive(toy, bank, monkeypatch, 0.3, between=(levels(0.6), levels(0.1)))
        assert close(drawn, toy.sample(steps=5))
        monkeypatch.undo()
        naive(toy, bank, monkeypatch, 0.3)
        assert not close(drawn, toy.sample(steps=5))

    def test_a_bound_on_suppression(self, toy, monkeypatch):
        bank = Bank(toy, 2)
        drawn = toy.sample(fused(toy, bank, suppression=1.0, norm_cap=1.2))
        naive(toy, bank, monkeypatch, 1.0, cap=1.2)
        assert close(drawn, toy.sample())
        assert not close(drawn, toy.sample(fused(toy, bank, suppression=1.0)))

    def test_the_published_batch_of_rows_is_one_shared_stream(self, toy, monkeypatch):
        """Oracle O5: a row for the base and one per concept, of prompts and weights of their own, whose cross-attention
        gives the fused answer in all, stay equal to each other and to the single row."""
        bank = Bank(toy, 3)
        short = [toy.clip.encode_from_tokens_scheduled(f"concept {i}") for i in range(3)]
        bank.concepts = [replace(one, conditioning=text) for one, text in zip(bank.concepts, short, strict=True)]
        drawn = toy.sample(fused(toy, bank), cfg=1.0)
        texts = torch.cat([toy.positive[0][0], *(text[0][0] for text in short)])

        def rows_of_all(apply_model, arguments):
            x, sigma = (t.repeat(len(texts), *(1,) * (t.ndim - 1)) for t in (arguments["input"], arguments["timestep"]))
            out = apply_model(x, sigma, **{**arguments["c"], "c_crossattn": texts})
            assert all(torch.equal(row, out[0]) for row in out)
            return out[:1]

        for key, layer in bank.layers.items():

            def forward(x, context=None, value=None, mask=None, transformer_options=None, key=key, layer=layer):
                weights = [0, *(prompted.concept.deltas[key] for prompted in bank.concepts)]
                grid = tuple(transformer_options["activations_shape"][-2:])
                background_last = layer_masks(bank.partition, grid).flatten(1)
                mixed, answers = 0, []
                for row, delta in enumerate(weights):
                    k, v = (
                        context[row : row + 1] @ (linear.weight + (delta[part].matrix() if delta else 0)).T
                        for part, linear in (("k", layer.to_k), ("v", layer.to_v))
                    )
                    answers.append(full_attention(layer.to_q(x[row : row + 1]), k, v))
                    mixed = mixed + background_last[row - 1, :, None] * answers[-1]
                return layer.to_out((1.3 * mixed - 0.3 * answers[0]).expand(len(x), -1, -1))

            monkeypatch.setattr(layer, "forward", forward)
        published = toy.model.clone()
        published.set_model_unet_function_wrapper(rows_of_all)
        assert close(drawn, toy.sample(published, cfg=1.0))
        assert toy.rows == [4] * toy.steps

    def test_all_nodes_with_everything_off_are_the_stock_sampler(self, toy):
        """Oracle E1: concepts that change nothing, shares of 0, through the nodes' own path."""
        from comfy_extras import nodes_custom_sampler as stock
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.weaver.fusion import PromptedConcept
        from conceptloom.host.weaver.prompts import ConceptPrompts
        from conceptloom.nodes.inversion import DDIMInversion
        from conceptloom.nodes.masks import ConceptMasks
        from conceptloom.nodes.weaver import MultiConceptFusion, PlugAndPlayInjection

        picture = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))}
        made = DDIMInversion.execute(toy.model, picture, toy.positive, 4, "normal", "pnp", 0).args
        noise, trajectory, sigmas = made[:3]
        nothing = {"middle.0.0": {"k": Delta((torch.zeros(128, WIDTH),))}}
        prompted = tuple(PromptedConcept(Concept(f"none{i}", nothing), toy.positive) for i in range(2))
        prompts = ConceptPrompts(toy.positive, toy.negative, prompted, None, ("", ""))
        masks = torch.zeros(2, 64, 64)
        masks[0, :, :20], masks[1, 20:, 40:] = 1, 1
        (partition, _) = ConceptMasks.execute({"mask0": masks}, 0.03, 0.05, "smaller in front").args
        blocks = {"blocks": "custom list", "numbers": "4-11"}
        injected = PlugAndPlayInjection.execute(toy.model, trajectory, 0.0, 0.0, blocks).args[0]
        options = {"suppression": 0.3, "start_percent": 0.0, "end_percent": 1.0, "mode": "features"}
        options |= {"layers": "all layers", "elsewhere": "inside its mask", "norm_cap": 0.0}
        model, positive, negative = MultiConceptFusion.execute(injected, prompts, partition, **options).args

        def drawn(model, positive, negative):
            guider = stock.CFGGuider.execute(model, positive, negative, 5.0).args[0]
            sampler = stock.KSamplerSelect.execute("euler").args[0]
            still = stock.DisableNoise.execute().args[0]
            return stock.SamplerCustomAdvanced.execute(still, guider, sampler, sigmas, noise).args[0]["samples"]

        expected = drawn(toy.model, toy.positive, toy.negative)
        assert close(drawn(model, positive, negative), expected)
        held = PlugAndPlayInjection.execute(model, trajectory, 1.0, 1.0, blocks).args[0]
        assert not close(drawn(held, positive, negative), expected)

    def test_one_concept_over_all_is_the_model_with_its_weights(self, toy):
        """Oracle O1."""
        bank = Bank(toy, 1)
        bank.partition = torch.stack([torch.ones(32, 32), torch.zeros(32, 32)])
        (prompted,) = bank.concepts
        swapped = toy.model.clone()
        for key, parts in prompted.concept.deltas.items():
            for part, delta in parts.items():
                weight = f"diffusion_model.{bank.name(key)}.to_{part}.weight"
                swapped.add_patches({weight: ("diff", (delta.matrix(),))})
        drawn = toy.sample(fused(toy, bank, suppression=0.0), cfg=1.0)
        assert close(drawn, toy.sample(swapped, cfg=1.0, positive=prompted.conditioning))

    def test_concepts_that_equal_the_base_change_nothing(self, toy):
        """Oracle O3."""
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.weaver.fusion import PromptedConcept

        bank = Bank(toy, 2)
        nothing = {"middle.0.0": {"k": Delta((torch.zeros(128, WIDTH),))}}
        bank.concepts = [PromptedConcept(Concept(f"none{i}", nothing), toy.positive) for i in range(2)]
        assert close(toy.sample(fused(toy, bank, suppression=0.8)), toy.sample())

    def test_a_background_concept_has_the_rest(self, toy):
        bank = Bank(toy, 2)
        rest = bank.concepts[1]
        first = bank.partition[:1]
        bank.concepts, bank.partition = bank.concepts[:1], torch.cat([first, 1 - first])
        with_background = toy.sample(fused(toy, bank, background=rest))
        both = Bank(toy, 2)
        both.partition = torch.cat([first, 1 - first, torch.zeros_like(first)])
        assert close(with_background, toy.sample(fused(toy, both)))

    def test_conditionings_evaluated_apart_give_the_same(self, toy, monkeypatch):
        """Oracle E7."""
        bank = Bank(toy, 2)
        together = toy.sample(fused(toy, bank))
        monkeypatch.setattr(toy.base, "memory_required", lambda *_, **__: 1e15)
        apart = toy.sample(fused(toy, bank))
        assert toy.rows == [1, 1] * toy.steps
        assert close(apart, together)


class TestOrdinaryLoras:
    """A LoRA of all kinds of layers, for a concept's own part of the picture."""

    LAYERS = (
        "input_blocks.1.0.in_layers.2",
        "input_blocks.1.1.proj_in",
        "input_blocks.3.0.op",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "middle_block.1.transformer_blocks.0.ff.net.0.proj",
        "output_blocks.4.1.transformer_blocks.0.attn2.to_q",
        "output_blocks.4.1.transformer_blocks.0.attn2.to_k",
        "output_blocks.4.1.transformer_blocks.0.attn2.to_out.0",
        "output_blocks.5.1.transformer_blocks.0.attn2.to_v",
        "output_blocks.9.1.transformer_blocks.0.attn1.to_out.0",
        "output_blocks.11.0.out_layers.3",
        "out.2",
    )

    def lora(self, toy, extra=()):
        generator, state = torch.Generator().manual_seed(6), {}
        for name in (*self.LAYERS, *extra):
            weight = toy.base.diffusion_model.get_submodule(name).weight
            up, down = (torch.randn(s, generator=generator) for s in ((len(weight), 2), (2, *weight.shape[1:])))
            scale = 0.5 / weight[0].numel() ** 0.5
            state[f"diffusion_model.{name}.lora_up.weight"] = up.view(*up.shape, *(1,) * (weight.ndim - 2)) * scale
            state[f"diffusion_model.{name}.lora_down.weight"] = down
        return state

    def concept(self, toy, **options):
        from conceptloom.host.weaver.concepts import load_concept

        return load_concept(toy.model, self.lora(toy, **options), name="lora")

    def merged(self, toy):
        import comfy.lora

        model = toy.model.clone()
        names = comfy.lora.model_lora_keys_unet(model.model, {})
        model.add_patches(comfy.lora.load_lora(self.lora(toy), names))
        return model

    @staticmethod
    def sites(toy):
        from conceptloom.host.model.families.unet import UNetFamily
        from conceptloom.host.model.sites import CROSS

        return [site for site in UNetFamily().sites(toy.base.diffusion_model) if site.kind == CROSS]

    def bank(self, toy, partition):
        from conceptloom.host.weaver.fusion import PromptedConcept

        bank = Bank(toy, 1)
        bank.concepts = [PromptedConcept(self.concept(toy), toy.positive)]
        bank.partition = partition
        return bank

    def test_over_all_it_is_the_merged_lora(self, toy):
        everywhere = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
        drawn = toy.sample(fused(toy, self.bank(toy, everywhere), suppression=0.0), cfg=1.0)
        expected = toy.sample(self.merged(toy), cfg=1.0)
        assert float((drawn - expected).norm() / expected.norm()) < 2e-3
        assert float((toy.sample(cfg=1.0) - expected).norm() / expected.norm()) > 0.05

    def test_queries_and_outputs_are_the_concepts_own_and_the_base_is_the_bases(self, toy, monkeypatch):
        """h_i is a whole cross-attention with a concept's weights, h_base one with none of them."""
        generator, extra = torch.Generator().manual_seed(9), {}
        bank = Bank(toy, 2)
        for i, prompted in enumerate(bank.concepts):
            for key in prompted.concept.deltas:
                extra[i, key] = {
                    part: torch.randn(w, w, generator=generator) * 0.05 for part, w in self.widths(bank, key)
                }
        bank.concepts = [self.with_parts(prompted, i, extra) for i, prompted in enumerate(bank.concepts)]
        bank.partition = torch.zeros(3, 16, 16)
        bank.partition[0, :, :8], bank.partition[1, :8, 8:], bank.partition[2, 8:, 8:] = 1, 1, 1
        drawn = toy.sample(fused(toy, bank, suppression=0.8), cfg=1.0)
        for key, layer in bank.layers.items():

            def forward(x, context=None, value=None, mask=None, transformer_options=None, key=key, layer=layer):
                grid = tuple(transformer_options["activations_shape"][-2:])
                masks = layer_masks(bank.partition, grid).flatten(1)
                base = full_attention(layer.to_q(x), layer.to_k(context), layer.to_v(context))
                mixed = masks[-1, :, None] * layer.to_out(base)
                for prompted, share in zip(bank.concepts, masks, strict=False):
                    own = {part: delta.matrix() for part, delta in prompted.concept.deltas[key].items()}
                    p = prompted.conditioning[0][0]
                    answer = full_attention(
                        x @ (layer.to_q.weight + own["q"]).T,
                        p @ (layer.to_k.weight + own["k"]).T,
                        p @ (layer.to_v.weight + own["v"]).T,
                    )
                    mixed = mixed + share[:, None] * (layer.to_out(answer) + answer @ own["out"].T)
                return 1.8 * mixed - 0.8 * layer.to_out(base)

            monkeypatch.setattr(layer, "forward", forward)
        expected = toy.sample(cfg=1.0)
        assert close(drawn, expected)
        monkeypatch.undo()
        without = [replace(s, concept=self.keys_and_values(s.concept)) for s in bank.concepts]
        bank.concepts = without
        assert (
            float((toy.sample(fused(toy, bank, suppression=0.8), cfg=1.0) - expected).norm() / expected.norm()) > 5e-2
        )

    @staticmethod
    def widths(bank, key):
        return [("q", len(bank.layers[key].to_q.weight)), ("out", len(bank.layers[key].to_q.weight))]

    @staticmethod
    def with_parts(prompted, number, extra):
        from conceptloom.encoders.concepts import Delta

        deltas = {
            key: {**parts, **{part: Delta((matrix,)) for part, matrix in extra[number, key].items()}}
            for key, parts in prompted.concept.deltas.items()
        }
        return replace(prompted, concept=replace(prompted.concept, deltas=deltas))

    @staticmethod
    def keys_and_values(concept):
        deltas = {key: {part: parts[part] for part in "kv"} for key, parts in concept.deltas.items()}
        return replace(concept, deltas=deltas)

    def test_layers_are_handled_by_what_was_made_once_per_run(self, toy, monkeypatch):
        """Once for the two rows that guidance has, however many steps."""
        from conceptloom.host.weaver import layers

        made, make = [], layers.MaskedLayer.__init__
        monkeypatch.setattr(
            layers.MaskedLayer, "__init__", lambda self, *args, **more: made.append(args) or make(self, *args, **more)
        )
        model = fused(toy, self.bank(toy, torch.stack([torch.ones(16, 16), torch.zeros(16, 16)])))
        toy.sample(model, steps=4)
        changed = len(made)
        assert changed > 1
        made.clear()
        toy.sample(model, steps=2)
        assert len(made) == changed

    def test_the_decoder_alone_leaves_the_encoders_queries_too(self, toy):
        from conceptloom.host.weaver.layers import changes_of

        bank = Bank(toy, 1)
        extra = {(0, key): {"q": torch.ones(w, w)} for key in bank.layers for _, w in self.widths(bank, key)}
        concept = self.with_parts(bank.concepts[0], 0, extra).concept
        decoder = [site for site in self.sites(toy) if site.key.startswith("output")]
        assert {name.split(".")[0] for name in changes_of([concept], toy.model, decoder)[0]} == {"output_blocks"}

    def test_one_lora_in_two_halves_and_two_formats_is_the_lora_everywhere(self, toy):
        """Oracle O2 for all layers, with factors on the left and whole differences on the right."""
        from conceptloom.host.weaver.concepts import load_concept
        from conceptloom.host.weaver.fusion import PromptedConcept

        lora, whole = self.lora(toy), {}
        for name in self.LAYERS:
            up, down = lora[f"diffusion_model.{name}.lora_up.weight"], lora[f"diffusion_model.{name}.lora_down.weight"]
            whole[f"diffusion_model.{name}.diff"] = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
        halves = [load_concept(toy.model, state, name=f"{i}") for i, state in enumerate((lora, whole))]
        assert {len(delta.factors) for one in halves for p in one.deltas.values() for delta in p.values()} == {1, 2}
        bank = self.bank(toy, torch.stack([torch.ones(16, 16), torch.zeros(16, 16)]))
        expected = toy.sample(fused(toy, bank))
        bank.concepts = [PromptedConcept(half, toy.positive) for half in halves]
        bank.partition = torch.zeros(3, 16, 16)
        bank.partition[0, :, :7], bank.partition[1, :, 7:] = 1, 1
        drawn = toy.sample(fused(toy, bank))
        assert float((drawn - expected).norm() / expected.norm()) < 2e-3
        bank.concepts[1] = replace(bank.concepts[1], concept=replace(halves[1], others={}))
        assert float((toy.sample(fused(toy, bank)) - expected).norm() / expected.norm()) > 2e-2

    def test_parts_of_the_picture_are_refused(self, toy):
        """HyperTile and token merging give self-attention's layers something else than the picture's cells."""
        from comfy_extras.nodes_hypertile import HyperTile
        from comfy_extras.nodes_tomesd import TomePatchModel

        everywhere = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
        for model in (
            HyperTile.execute(toy.model, 32, 2, 0, False)[0],
            TomePatchModel.execute(toy.model, 0.75)[0],
        ):
            bank = self.bank(toy, everywhere)
            with pytest.raises(ValueError, match="layers see the whole picture, got .*left out any do"):
                toy.sample(fused(toy, bank, model=model))
            toy.sample(fused(toy, bank, model=model, elsewhere="left out"))

    def test_deep_shrink_by_any_factor_keeps_a_lora_in_its_place(self, toy):
        from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

        shrunk = PatchModelAddDownscale.execute(toy.model, 3, 1.5, 0.0, 0.35, True, "bicubic", "bicubic")[0]
        everywhere = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
        drawn = toy.sample(fused(toy, self.bank(toy, everywhere), model=shrunk, suppression=0.0), cfg=1.0)
        merged = self.merged(toy)
        expected = PatchModelAddDownscale.execute(merged, 3, 1.5, 0.0, 0.35, True, "bicubic", "bicubic")[0]
        expected = toy.sample(expected, cfg=1.0)
        assert float((drawn - expected).norm() / expected.norm()) < 2e-3

    def test_the_negative_side_sees_nothing_of_it(self, toy):
        """With both sides of guidance equal but for the LoRA, guidance 0 is the negative alone."""
        everywhere = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
        drawn = toy.sample(fused(toy, self.bank(toy, everywhere)), cfg=0.0)
        assert close(drawn, toy.sample(cfg=0.0))

    def test_left_out_it_acts_by_its_keys_and_values_alone(self, toy):
        half = torch.zeros(2, 8, 8)
        half[0, :, :4], half[1, :, 4:] = 1, 1
        bank = self.bank(toy, half)
        inside, left_out = (toy.sample(fused(toy, bank, elsewhere=e)) for e in ("inside its mask", "left out"))
        assert not close(inside, left_out)
        assert not close(left_out, toy.sample())

    def test_each_layer_changes_its_own_place_alone(self, toy):
        from conceptloom.host.weaver.layers import MaskedLayer, Rows, changes_of

        changes, left_out = changes_of([self.concept(toy)], toy.model, self.sites(toy))
        assert left_out == 0 and len(changes) == len(self.LAYERS) - 2
        masks = torch.zeros(1, 16, 16)
        masks[:, :5, :7] = 1
        for name, x in (("out.2", torch.randn(2, 32, 16, 16)), (self.LAYERS[9], torch.randn(2, 256, 32))):
            layer = toy.base.diffusion_model.get_submodule(name)
            handled = MaskedLayer(layer, changes[name], lambda grid: masks, 2, [Rows(slice(0, 1), None)])
            plain = layer(x)
            out = handled(x, plain.clone(), (16, 16))
            inside = (out != plain).any(1 if x.ndim == 4 else 2).view(2, 16, 16)
            assert torch.equal(inside[0], masks[0].bool()) and not inside[1].any()

    def test_layers_without_places_are_counted(self, toy):
        from conceptloom.host.weaver.layers import changes_of

        concept = self.concept(toy, extra=("time_embed.0", "input_blocks.1.0.emb_layers.1"))
        assert changes_of([concept], toy.model, self.sites(toy))[1] == 2

    def test_plug_and_plays_source_pass_sees_nothing_of_it(self, toy):
        from conceptloom.host.structure import plugandplay
        from conceptloom.host.structure.inversion import SourceTrajectory
        from conceptloom.samplers.inversion import Trajectory

        latents = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
        source = SourceTrajectory(Trajectory((0.0, 15.0), latents), toy.positive, 0.0)
        seen = []
        layer = toy.base.diffusion_model.get_submodule("output_blocks.4.1.transformer_blocks.0.attn1.to_q")
        handle = layer.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].clone()))
        try:
            injected = plugandplay.apply(toy.model, source, plugandplay.InjectionSettings())
            toy.sample(injected, steps=2)
            plain = [x for x in seen if len(x) == 1]
            seen.clear()
            everywhere = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
            toy.sample(fused(toy, self.bank(toy, everywhere), model=injected), steps=2)
            under = [x for x in seen if len(x) == 1]
        finally:
            handle.remove()
        assert len(plain) == len(under) == 1
        assert torch.equal(plain[0], under[0])


class TestScores:
    """The naive mixing that Concept Weaver is compared with."""

    def drawn(self, toy, bank, **options):
        from conceptloom.host.weaver.fusion import FusionSettings, apply

        settings = FusionSettings(mode="scores", suppression=0.0)
        model, positive = apply(toy.model, toy.positive, bank.concepts, Partition(bank.partition), settings)
        return toy.sample(model, positive=positive, **options)

    @pytest.mark.parametrize("cfg", [1.0, 5.0])
    def test_it_mixes_what_each_concepts_own_model_gives(self, toy, cfg):
        """Oracle T1: in one step the result is the mix of the single models' results, guidance included."""
        bank = Bank(toy, 2)
        bank.partition = torch.zeros(3, 16, 16)
        bank.partition[0, :, :8], bank.partition[1, :, 8:] = 1, 1
        mixed = self.drawn(toy, bank, steps=1, cfg=cfg)
        assert sum(toy.rows) == (2 if cfg == 1 else 3)
        negative = toy.sample(steps=1, cfg=1.0, positive=toy.negative)
        for i, part in enumerate((slice(0, 8), slice(8, 16))):
            swapped = toy.model.clone()
            for key, parts in bank.concepts[i].concept.deltas.items():
                for name, delta in parts.items():
                    weight = f"diffusion_model.{bank.name(key)}.to_{name}.weight"
                    swapped.add_patches({weight: ("diff", (delta.matrix(),))})
            alone = toy.sample(swapped, steps=1, cfg=1.0, positive=bank.concepts[i].conditioning)
            guided = negative + cfg * (alone - negative)
            assert close(mixed[..., part], guided[..., part])

    def test_it_costs_a_row_per_concept(self, toy):
        self.drawn(toy, Bank(toy, 3), steps=1)
        assert sum(toy.rows) == 3 + 2

    def test_a_lora_elsewhere_acts_on_its_own_rows(self, toy):
        from conceptloom.host.weaver.fusion import FusionSettings, PromptedConcept, apply

        bank = Bank(toy, 1)
        bank.concepts = [PromptedConcept(TestOrdinaryLoras().concept(toy), toy.positive)]
        bank.partition = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
        both = []
        for mode in ("scores", "features"):
            settings = FusionSettings(mode=mode, suppression=0.0)
            model, positive = apply(toy.model, toy.positive, bank.concepts, Partition(bank.partition), settings)
            both.append(toy.sample(model, positive=positive))
        assert close(*both)


class TestNothing:
    @pytest.mark.parametrize("how", ["no strength", "no place", "outside the range"])
    def test_it_is_the_untouched_model_bit_by_bit(self, toy, how):
        bank = Bank(toy, 2, strength=0.0 if how == "no strength" else 1.0)
        if how == "no place":
            bank.partition = torch.stack([torch.zeros(32, 32), torch.zeros(32, 32), torch.ones(32, 32)])
        outside = {"start_percent": 1.0} if how == "outside the range" else {}
        assert torch.equal(toy.sample(fused(toy, bank, **outside)), toy.sample())

    def test_model_and_second_run_are_as_the_first(self, toy):
        before = {name: p.clone() for name, p in toy.base.diffusion_model.named_parameters()}
        plain, model = toy.sample(), fused(toy, Bank(toy, 2))
        once = toy.sample(model)
        assert torch.equal(toy.sample(model), once)
        assert torch.equal(toy.sample(), plain)
        assert all(torch.equal(p, before[name]) for name, p in toy.base.diffusion_model.named_parameters())

    def test_cancelled_in_the_middle_it_leaves_no_trace(self, toy):
        from comfy.model_management import InterruptProcessingException

        plain, model = toy.sample(), fused(toy, Bank(toy, 2))
        whole = toy.sample(model)

        def cancel(step, *_):
            if step == 0:
                raise InterruptProcessingException()

        with pytest.raises(InterruptProcessingException):
            toy.sample(model, callback=cancel)
        assert torch.equal(toy.sample(), plain)
        assert torch.equal(toy.sample(model), whole)

    @pytest.mark.parametrize("count", [1, 5])
    def test_keys_and_values_are_held_once_and_gone_afterwards(self, toy, monkeypatch, count):
        from conceptloom.host.weaver.fusion import FusionRun

        held, runs = [], []

        def close(run, end=FusionRun.close):
            kept = [x for prompted in run._keys.values() for pairs in prompted.values() for pair in pairs for x in pair]
            kept += [x for group in run._groups.values() for one in group for x in (one.key, one.value)]
            held.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values()))
            end(run)
            runs.append(run)

        monkeypatch.setattr(FusionRun, "close", close)
        bank = Bank(toy, count)
        toy.sample(fused(toy, bank))
        lengths = sum(prompted.conditioning[0][0].shape[1] for prompted in bank.concepts)
        channels = sum(len(layer.to_k.weight) for layer in bank.layers.values())
        assert held == [2 * 4 * lengths * channels]
        assert not runs[0]._keys and not runs[0]._groups


class TestCompany:
    def test_what_another_node_adds_to_cross_attention_stays(self, toy):
        def adapter(q, k, v, extra_options):
            from comfy.ldm.modules.attention import optimized_attention

            return optimized_attention(q, k, v, extra_options["n_heads"]) + 0.3 * q

        other = toy.model.clone()
        for i in range(3, 12):
            other.set_model_attn2_replace(adapter, "output", i)
        bank = Bank(toy, 2)
        drawn = toy.sample(fused(toy, bank, model=other))
        assert not close(drawn, toy.sample(fused(toy, bank)))
        assert not close(drawn, toy.sample(other))
        bank.partition = torch.stack([torch.zeros(8, 8)] * 2 + [torch.ones(8, 8)])
        assert torch.equal(toy.sample(fused(toy, bank, model=other)), toy.sample(other))

    def test_loras_on_the_model_are_in_the_concepts_too(self, toy):
        bank = Bank(toy, 1)
        changed = toy.model.clone()
        weight = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
        changed.add_patches({weight: (torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(3)),)})
        bank.partition = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
        plain = toy.sample(fused(toy, bank, suppression=0.0), cfg=1.0)
        assert not close(toy.sample(fused(toy, bank, model=changed, suppression=0.0), cfg=1.0), plain)

    def test_controlnet_acts_on_the_picture_that_all_share(self, toy, monkeypatch):
        from comfy.controlnet import ControlBase

        class Control(ControlBase):
            def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
                return {"middle": [torch.full((len(x_noisy), 128, 2, 2), 0.5)], "output": [], "input": []}

            def get_models(self):
                return []

        control, bank = Control(), Bank(toy, 2)
        sides = {
            side: [[c, {**extra, "control": control}] for c, extra in getattr(toy, side)]
            for side in ("positive", "negative")
        }
        drawn = toy.sample(fused(toy, bank), **sides)
        assert not close(drawn, toy.sample(fused(toy, bank)))
        naive(toy, bank, monkeypatch, 0.3)
        assert close(drawn, toy.sample(**sides))

    def test_perp_negs_empty_prompt_has_no_concepts(self, toy):
        """Guided away from a negative that is the empty prompt itself, the picture is that of ordinary guidance."""
        import comfy.sample
        from comfy_extras.nodes_perpneg import Guider_PerpNeg

        bank = Bank(toy, 2)
        guider = Guider_PerpNeg(fused(toy, bank))
        guider.set_conds(toy.positive, toy.negative, toy.negative)
        guider.set_cfg(5.0, 1.0)
        noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 16, 16), 3)
        sampler = comfy.samplers.KSampler(toy.model, toy.steps, "cpu", "euler", "sgm_uniform", 1.0)
        drawn = guider.sample(noise, torch.zeros(1, 4, 16, 16), comfy.samplers.sampler_object("euler"), sampler.sigmas)
        assert close(drawn, toy.sample(fused(toy, bank)))

    def test_hypertile_and_deep_shrink(self, toy, monkeypatch):
        """Both leave cross-attention a whole picture, the second in fewer cells in a part of the steps."""
        from comfy_extras.nodes_hypertile import HyperTile
        from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

        tiled = HyperTile.execute(toy.model, 32, 2, 0, False)[0]
        shrunk = PatchModelAddDownscale.execute(toy.model, 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic")[0]
        bank = Bank(toy, 2)
        for model in (tiled, shrunk):
            monkeypatch.undo()
            drawn = toy.sample(fused(toy, bank, model=model), seed=3)
            assert not close(drawn, toy.sample(fused(toy, bank)))
            naive(toy, bank, monkeypatch, 0.3)
            assert close(drawn, toy.sample(model, seed=3))


def test_strong_suppression_is_told_of(toy, caplog):
    caplog.set_level("WARNING")
    toy.sample(fused(toy, Bank(toy, 1), suppression=1.0))
    assert "suppression" not in caplog.text
    toy.sample(fused(toy, Bank(toy, 1), suppression=1.5))
    assert "a suppression of 1.5 is far beyond 0.3 and burns colors" in caplog.text


def test_where_no_concept_is_drawn_it_is_told_of(toy, caplog):
    caplog.set_level("WARNING")
    bank = Bank(toy, 2)
    fused(toy, bank)
    assert not caplog.records
    fused(toy, Bank(toy, 2, strength=0.0))
    assert "no concept has a strength, so the plain prompt is drawn" in caplog.text
    bank.partition = torch.cat([torch.zeros(2, 16, 16), torch.ones(1, 16, 16)])
    drawn = toy.sample(fused(toy, bank))
    assert "no concept has a place in the partition, so the plain prompt is drawn" in caplog.text
    assert torch.equal(drawn, toy.sample())


def test_a_concept_smaller_than_a_cell_is_told_of_once(toy, caplog):
    bank = Bank(toy, 2)
    bank.partition = torch.zeros(3, 128, 128)
    bank.partition[0, :, :64], bank.partition[1, :5, 64:69] = 1, 1
    bank.partition[2] = 1 - bank.partition[:2].sum(0)
    caplog.set_level("WARNING")
    toy.sample(fused(toy, bank))
    said = [record.getMessage() for record in caplog.records if "smaller than a cell" in record.getMessage()]
    assert (
        len(said) == 1
        and "the concept concept1 is smaller than a cell of every layer, even of that of 16x16" in said[0]
    )


class TestRefusals:
    def test_a_partition_of_another_number(self, toy):
        bank = Bank(toy, 2)
        bank.partition = bank.partition[1:]
        with pytest.raises(ValueError, match="partition: expected one mask for each of the 2 concepts, got 1"):
            fused(toy, bank)

    def test_a_mask_of_another_kind_of_thing_is_advised(self, toy, caplog):
        from conceptloom.host.weaver.fusion import FusionSettings, apply

        bank = Bank(toy, 2)
        kinds = ["sks dog", "cat"]
        concepts = [
            replace(prompted, concept=replace(prompted.concept, class_word=kind))
            for prompted, kind in zip(bank.concepts, kinds, strict=True)
        ]
        for names, advised in ((("Dog", "white cat"), False), ((), False), (("cat", "dog"), True)):
            caplog.clear()
            partition = Partition(bank.partition, names)
            model, positive = apply(toy.model, toy.positive, concepts, partition, FusionSettings())
            toy.sample(model, positive=positive, steps=1)
            found = [record.message for record in caplog.records if "give masks and concepts" in record.message]
            assert len(found) == 2 * advised
        assert f'mask 1 shows "cat", but its concept {concepts[0].concept.name} is a "sks dog"' in found[0]

    def test_a_partition_of_another_shape(self, toy):
        bank = Bank(toy, 1, size=(16, 24))
        with pytest.raises(ValueError, match=r"partition: expected the shape of the latent \(16x16\), got 192x128"):
            toy.sample(fused(toy, bank))

    def test_a_range_that_ends_before_it_begins(self, toy):
        with pytest.raises(ValueError, match=r"start_percent: expected at most end_percent \(0.2\), got 0.5"):
            fused(toy, Bank(toy, 1), start_percent=0.5, end_percent=0.2)

    def test_a_part_of_the_steps_with_scores(self, toy):
        with pytest.raises(ValueError, match="mode: expected features where start_percent and end_percent leave"):
            fused(toy, Bank(toy, 1), mode="scores", end_percent=0.5)

    def test_a_model_of_another_family(self, toy):
        from conceptloom.host.structure import plugandplay
        from conceptloom.host.weaver import concepts

        bank = Bank(toy, 1)
        flux = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Identity()))
        for use in (
            lambda: fused(toy, bank, model=flux),
            lambda: plugandplay.apply(flux, None, plugandplay.InjectionSettings()),
            lambda: concepts.load_concept(flux, {"unet": {"x.attn2.to_k.weight": torch.zeros(2, 2)}}),
        ):
            with pytest.raises(ValueError, match="model: expected one of the families SD 1.x.*, got Identity"):
                use()

    def test_a_concept_of_another_model(self, toy):
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.weaver.fusion import PromptedConcept

        bank = Bank(toy, 1)
        foreign = Concept("foreign", {"middle.0.0": {"k": Delta((torch.zeros(128, 768),))}})
        bank.concepts = [PromptedConcept(foreign, toy.positive)]
        with pytest.raises(ValueError, match="width 64, got foreign with 768"):
            fused(toy, bank)

    def test_a_positive_conditioning_of_parts(self, toy):
        entry = [toy.positive[0][0], {**toy.positive[0][1], "area": (8, 8, 0, 0)}]
        with pytest.raises(
            ValueError, match="positive: expected one conditioning for the whole picture, got 2 of them"
        ):
            toy.sample(fused(toy, Bank(toy, 1)), positive=[toy.positive[0], toy.positive[0]])
        with pytest.raises(ValueError, match="got one with area"):
            toy.sample(fused(toy, Bank(toy, 1)), positive=[entry])
