"""Multi-concept fusion on the host, against modules that compute the paper's equation in full."""

import pytest
import torch

WIDTH = 64


def close(drawn, expected):
    """Equal up to the rounding of single precision; the toy's latents are in the hundreds."""
    return float((drawn - expected).norm() / expected.norm()) < 2e-5


class Bank:
    """Concepts with random differences at all layers of the toy, their prompts, and a partition."""

    def __init__(self, toy, count, size=(16, 16), strength=1.0):
        from conceptloom.attention.partition import assemble
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.fusion import SpokenConcept
        from conceptloom.host.sites import CROSS, UNetFamily

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
            self.concepts.append(SpokenConcept(concept, toy.clip.encode_from_tokens_scheduled(text)))
        h, w = size[0] * 8, size[1] * 8
        masks = torch.zeros(count, h, w)
        for i in range(count):
            masks[i, h // 4 : 3 * h // 4, i * w // count : (i + 1) * w // count - w // 16] = 1
        self.partition = assemble(list(masks), dilation=0.02, feather=0.05)

    @staticmethod
    def name(key):
        block, number, depth = key
        place = {"input": f"input_blocks.{number}.1", "middle": "middle_block.1", "output": f"output_blocks.{number}.1"}
        return f"{place[block]}.transformer_blocks.{depth}.attn2"


def fused(toy, bank, model=None, background=None, **settings):
    from conceptloom.host.fusion import Settings, apply

    return apply(toy.model if model is None else model, bank.concepts, bank.partition, Settings(**settings), background)


def naive(toy, bank, monkeypatch, suppression):
    """Every cross-attention of the toy computes h_fuse from full attentions with whole weights."""
    from conceptloom.attention.partition import layer_masks

    def heads(x):
        return x.unflatten(-1, (4, -1)).transpose(1, 2)

    def attention(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)

    for key, layer in bank.layers.items():

        def forward(x, context=None, value=None, mask=None, transformer_options=None, key=key, layer=layer):
            q, base = layer.to_q(x), attention(layer.to_q(x), layer.to_k(context), layer.to_v(context))
            grid = transformer_options["activations_shape"][-2:]
            masks = layer_masks(bank.partition, tuple(grid)).flatten(1)
            out, n = base.clone(), len(x) // len(transformer_options["cond_or_uncond"])
            for i, side in enumerate(transformer_options["cond_or_uncond"]):
                if side == 1:
                    continue
                rows = slice(i * n, (i + 1) * n)
                mixed = masks[-1, :, None] * base[rows]
                for spoken, share in zip(bank.concepts, masks, strict=False):
                    p = spoken.conditioning[0][0].expand(n, -1, -1)
                    k, v = (
                        p @ (linear.weight + spoken.concept.deltas[key][part].matrix()).T
                        for part, linear in (("k", layer.to_k), ("v", layer.to_v))
                    )
                    mixed = mixed + share[:, None] * attention(q[rows], k, v)
                out[rows] = (1 + suppression) * mixed - suppression * base[rows]
            return layer.to_out(out)

        monkeypatch.setattr(layer, "forward", forward)


class TestPicture:
    @pytest.mark.parametrize(("count", "suppression"), [(1, 0.0), (2, 0.3), (3, 1.0), (5, 0.3)])
    def test_it_is_the_papers_equation_at_every_layer(self, toy, monkeypatch, count, suppression):
        bank = Bank(toy, count)
        drawn = toy.sample(fused(toy, bank, suppression=suppression))
        assert toy.rows == [2, 2, 2]
        naive(toy, bank, monkeypatch, suppression)
        assert close(drawn, toy.sample())

    @pytest.mark.parametrize(("batch", "cfg", "size"), [(2, 7.5, (16, 16)), (1, 1.0, (16, 16)), (1, 5.0, (15, 21))])
    def test_batches_cfg_1_and_odd_sizes(self, toy, monkeypatch, batch, cfg, size):
        bank = Bank(toy, 2, size)
        drawn = toy.sample(fused(toy, bank), batch=batch, cfg=cfg, size=size)
        naive(toy, bank, monkeypatch, 0.3)
        assert close(drawn, toy.sample(batch=batch, cfg=cfg, size=size))

    def test_one_concept_over_all_is_the_model_with_its_weights(self, toy):
        """Oracle O1."""
        bank = Bank(toy, 1)
        bank.partition = torch.stack([torch.ones(32, 32), torch.zeros(32, 32)])
        (spoken,) = bank.concepts
        swapped = toy.model.clone()
        for key, parts in spoken.concept.deltas.items():
            for part, delta in parts.items():
                weight = f"diffusion_model.{bank.name(key)}.to_{part}.weight"
                swapped.add_patches({weight: ("diff", (delta.matrix(),))})
        drawn = toy.sample(fused(toy, bank, suppression=0.0), cfg=1.0)
        assert close(drawn, toy.sample(swapped, cfg=1.0, positive=spoken.conditioning))

    def test_concepts_that_equal_the_base_change_nothing(self, toy):
        """Oracle O3."""
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.fusion import SpokenConcept

        bank = Bank(toy, 2)
        nothing = {("middle", 0, 0): {"k": Delta((torch.zeros(128, WIDTH),))}}
        bank.concepts = [SpokenConcept(Concept(f"none{i}", nothing), toy.positive) for i in range(2)]
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
        assert toy.rows == [1] * 6
        assert close(apart, together)


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


class TestRefusals:
    def test_a_partition_of_another_number(self, toy):
        bank = Bank(toy, 2)
        bank.partition = bank.partition[1:]
        with pytest.raises(ValueError, match="partition: one mask for each of the 2 concepts is wanted, not 1"):
            fused(toy, bank)

    def test_a_concept_of_another_model(self, toy):
        from conceptloom.encoders.concepts import Concept, Delta
        from conceptloom.host.fusion import SpokenConcept

        bank = Bank(toy, 1)
        foreign = Concept("foreign", {("middle", 0, 0): {"k": Delta((torch.zeros(128, 768),))}})
        bank.concepts = [SpokenConcept(foreign, toy.positive)]
        with pytest.raises(ValueError, match="width 64 are wanted, but foreign has 768"):
            fused(toy, bank)

    def test_a_positive_conditioning_of_parts(self, toy):
        entry = [toy.positive[0][0], {**toy.positive[0][1], "area": (8, 8, 0, 0)}]
        with pytest.raises(
            ValueError, match="positive: one conditioning for the whole picture is wanted, not 2 of them"
        ):
            toy.sample(fused(toy, Bank(toy, 1)), positive=[toy.positive[0], toy.positive[0]])
        with pytest.raises(ValueError, match="not one with area"):
            toy.sample(fused(toy, Bank(toy, 1)), positive=[entry])
