"""PromptNet against diffusers' own blocks and a naive reading of its projections, and its weights against the published
names and shapes."""

import pytest
import torch
from conceptloom.encoders.promptnet import PREFIX, PromptNet, PromptNetConfig, initial_state
from torch.nn import functional as F

TINY = {
    "channels": (32, 64, 64, 64),
    "heads": (2, 4, 4, 4),
    "vision_width": 48,
    "context_width": 40,
    "region": 2,
    "region_channels": 16,
}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return PromptNet(PromptNetConfig(**{**TINY, **changes})).double().eval()


def diffusers_unet(linear=True):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return (
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=TINY["channels"],
            attention_head_dim=TINY["heads"],
            cross_attention_dim=TINY["context_width"],
            use_linear_projection=linear,
        )
        .double()
        .eval()
    )


def patches(x, projection):
    """Each cell of the coarsest level from its own square of a finer one."""
    side = projection.weight.shape[-1]
    squares = x.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # (b, c, rows, side, columns, side)
    return torch.einsum("bcrykx,dcyx->bdrk", squares, projection.weight) + projection.bias[:, None, None]


def inputs(batch=2, height=16, width=16):
    generator = torch.Generator().manual_seed(2)
    reference, noisy = torch.randn(2, batch, 4, height, width, generator=generator, dtype=torch.float64)
    tokens = torch.randn(batch, 5, TINY["vision_width"], generator=generator, dtype=torch.float64)
    return reference, noisy, torch.tensor([7, 640])[:batch], tokens


class TestForward:
    @pytest.mark.parametrize("linear", [True, False], ids=["SD 2", "SD 1.5"])
    def test_it_is_the_encoder_of_a_unet_with_projections_of_every_level(self, linear):
        unet, net = diffusers_unet(linear), tiny(linear_projection=linear)
        net.load_state_dict(initial_state(net, unet.state_dict()))
        reference, noisy, timestep, tokens = inputs(height=16, width=32)
        with torch.no_grad():
            emb = unet.time_embedding(unet.time_proj(timestep).double())
            context = net.vision_embedding(tokens)
            stem = net.promptnet_cond_embedding
            h = unet.conv_in(reference) + stem.conv_out(F.silu(stem.conv_in(noisy)))
            parts = [patches(h, net.first_prompt_projection)]
            for block, projection in zip(unet.down_blocks, net.down_prompt_projections, strict=True):
                takes = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
                h, _ = block(h, emb, **takes)
                parts.append(patches(h, projection))
            parts.append(patches(unet.mid_block(h, emb, encoder_hidden_states=context), net.mid_prompt_projection))
            gathered = torch.cat(parts, 1)
            weight, bias = net.region_prompt_output.weight, net.region_prompt_output.bias
            expected = torch.stack(
                [
                    torch.einsum("bchw,dchw->bd", gathered[:, :, r : r + 2, c : c + 2], weight) + bias
                    for r in range(0, gathered.shape[2], 2)
                    for c in range(0, gathered.shape[3], 2)
                ],
                1,
            )
            made = net(reference, noisy, timestep, tokens)
        assert made.shape == (2, 2, TINY["context_width"])
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-10)

    def test_sizes(self):
        """One vector per whole region, row by row; what is left at the edges is cut off."""
        net = tiny()
        with torch.no_grad():
            for height, width, count in ((16, 16, 1), (32, 32, 4), (16, 24, 1), (24, 40, 2)):
                assert net(*inputs(1, height, width)).shape == (1, count, TINY["context_width"])
            large = inputs(1, 16, 32)
            swapped = [torch.cat(part.chunk(2, -1)[::-1], -1) for part in large[:2]]
            one, two = net(*large), net(*swapped, *large[2:])
        # Convolutions see across the border, so the order shows in what is nearer.
        distance = torch.cdist(one[0], two[0])
        assert distance[0, 1] < distance[0, 0] and distance[1, 0] < distance[1, 1]

    def test_the_noisy_latents_act_through_one_branch_alone(self):
        net = tiny()
        reference, noisy, timestep, tokens = inputs()
        with torch.no_grad():
            assert not torch.allclose(
                net(reference, noisy, timestep, tokens), net(reference, noisy * 2, timestep, tokens)
            )
            net.promptnet_cond_embedding.conv_out.weight.zero_()
            assert torch.equal(net(reference, noisy, timestep, tokens), net(reference, noisy * 2, timestep, tokens))

    def test_each_input_reaches_the_vector(self):
        net = tiny()
        given = inputs()
        floats = [part.clone().requires_grad_() for part in (given[0], given[1], given[3])]
        net(floats[0], floats[1], given[2], floats[2]).square().sum().backward()
        assert all(float(part.grad.abs().amax(tuple(range(1, part.ndim))).min()) > 0 for part in floats)
        assert all(parameter.grad is not None for parameter in net.parameters())

    def test_latents_that_do_not_fit_are_refused(self):
        net, (reference, noisy, timestep, tokens) = tiny(), inputs()
        with pytest.raises(ValueError, match="reference: expected latents of 16 x 16 cells, got 8 x 16"):
            net(reference[:, :, :8], noisy, timestep, tokens)
        with pytest.raises(ValueError, match="latent: expected at least 16 x 16 cells, got 8 x 16"):
            net(reference[:, :, :8], noisy[:, :, :8], timestep, tokens)


class TestWeights:
    def test_the_published_architecture(self):
        with torch.device("meta"):
            net = PromptNet()
        state = net.state_dict()
        assert sum(value.numel() for value in state.values()) == 408_337_024
        assert PromptNetConfig.of_state(state) == PromptNetConfig(), "the shapes tell all, with heads 64 wide"
        assert state["region_prompt_output.weight"].shape == (1024, 768, 8, 8)
        assert [tuple(state[f"down_prompt_projections.{i}.weight"].shape) for i in range(4)] == [
            (128, 320, 4, 4), (128, 640, 2, 2), (128, 1280, 1, 1), (128, 1280, 1, 1),
        ]  # fmt: skip
        assert net.config.region_side == 64

    @pytest.mark.parametrize("prefix", ["", PREFIX])
    def test_weights_load_without_the_heads_that_nothing_reads(self, prefix):
        net = tiny().float()
        unused = {"residual_projections.0.weight": torch.ones(1), "mid_residual_projection_2.weight": torch.ones(1)}
        state = {prefix + key: value for key, value in (net.state_dict() | unused).items()}
        loaded = PromptNet.from_state(state, net.config.heads)
        assert loaded.config == net.config and not any(p.requires_grad for p in loaded.parameters())
        with torch.no_grad():
            given = [part.float() if part.is_floating_point() else part for part in inputs()]
            assert torch.equal(loaded(*given), net(*given))

    @pytest.mark.parametrize("architecture", [{"linear_projection": False}, {"region": 1}, {"transformer_layers": 2}])
    def test_shapes_tell_the_architecture(self, architecture):
        net = tiny(**architecture)
        assert PromptNetConfig.of_state(net.state_dict(), TINY["heads"]) == net.config

    def test_training_begins_from_the_unet(self):
        unet, net = diffusers_unet().state_dict(), tiny()
        own, state = {k: v.clone() for k, v in net.state_dict().items()}, initial_state(net, unet)
        from_unet = [key for key in state if key in unet]
        assert all(torch.equal(state[key], unet[key]) for key in from_unet)
        rest = set(state) - set(from_unet)
        assert {key.split(".")[0] for key in rest} == {
            "promptnet_cond_embedding", "vision_embedding", "first_prompt_projection", "down_prompt_projections",
            "mid_prompt_projection", "region_prompt_output",
        }  # fmt: skip
        assert all(torch.equal(state[key], own[key]) for key in rest)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("conv_in.weight"), "without 'conv_in.weight'"),
            (
                lambda s: s.pop("down_blocks.1.resnets.1.norm2.bias"),
                "got nothing for down_blocks.1.resnets.1.norm2.bias",
            ),
            (lambda s: s.update({"extra.weight": torch.ones(2)}), "got 2 for extra.weight, where it has nothing"),
            (lambda s: s.update({"conv_in.bias": torch.ones(3)}), "got 3 for conv_in.bias, where it has 32"),
            (lambda s: s.clear(), "expected the weights of a PromptNet, got a file without region_prompt_output"),
        ],
    )
    def test_other_weights_are_refused(self, change, message):
        state = dict(tiny().state_dict())
        change(state)
        with pytest.raises(ValueError, match=message):
            PromptNet.from_state(state, TINY["heads"])
