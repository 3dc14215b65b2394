"""CoAdapter's fuser against its published names, a naive reading of it, and its reduction to a plain sum."""

import pytest
import torch
from conceptloom.encoders.coadapter import KINDS, STYLE, CoAdapterFuser

CHANNELS, WIDTH = (8, 16, 32, 32), 24


def fuser(seed=0, trained=True):
    torch.manual_seed(seed)
    net = CoAdapterFuser(CHANNELS, WIDTH, heads=4, layers=2).eval().requires_grad_(False)
    if trained:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return net


def maps(seed=0, n=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, 16 // 2**i, 12 // 2**i, generator=generator) for i, c in enumerate(CHANNELS)]


def test_published_names_and_size():
    with torch.device("meta"):
        net = CoAdapterFuser()
    state = net.state_dict()
    assert sum(value.numel() for value in state.values()) == 27_285_184
    assert state["task_embedding"].shape == (16, 768) and state["positional_embedding"].shape == (4, 768)
    assert state["seq_proj"].shape == (768, 768)
    for key, shape in {
        "spatial_feat_mapping.2.1.weight": (768, 1280),
        "transformer_layes.2.attn.in_proj_weight": (2304, 768),
        "transformer_layes.0.attn.out_proj.bias": (768,),
        "transformer_layes.0.mlp.c_fc.weight": (3072, 768),
        "transformer_layes.1.ln_2.bias": (768,),
        "ln_pre.weight": (768,),
        "ln_post.bias": (768,),
        "spatial_ch_projs.3.weight": (1280, 768),
    }.items():
        assert state[key].shape == shape, key


def test_a_fuser_that_scales_nothing_is_the_sum_of_the_adapters():
    net = fuser()
    for layer in net.spatial_ch_projs:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.zeros_(net.seq_proj)
    style = torch.randn(2, 3, WIDTH)
    fused, tokens = net({"sketch": maps(0), "depth": maps(1)}, style)
    for level, a, b in zip(fused, maps(0), maps(1), strict=True):
        assert torch.equal(level, a + b)
    assert torch.equal(tokens, style)


def test_every_part_is_as_published():
    """Token by token, with the transformer's own layers."""
    net, style = fuser(), torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(5))
    given = {"depth": maps(1), "sketch": maps(0)}
    fused, tokens = net(given, style)
    rows = []
    for kind, levels in given.items():
        for i, level in enumerate(levels):
            vector = net.spatial_feat_mapping[i](level.mean((2, 3)))
            rows.append(vector + net.task_embedding[KINDS.index(kind)] + net.positional_embedding[i])
    rows += [style[:, i] + net.task_embedding[KINDS.index(STYLE)] for i in range(3)]
    x = net.ln_pre(torch.stack(rows, 1))
    for block in net.transformer_layes:
        h = block.ln_1(x)
        weights = torch.nn.functional.linear(h, block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in weights.chunk(3, -1))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + block.attn.out_proj(attended)
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(h * torch.sigmoid(1.702 * h))
    x = net.ln_post(x)
    for i, level in enumerate(fused):
        expected = sum(
            levels[i] * (1 + net.spatial_ch_projs[i](x[:, 4 * j + i]))[..., None, None]
            for j, levels in enumerate(given.values())
        )
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens, style * (1 + x[:, 8:] @ net.seq_proj), rtol=1e-4, atol=1e-4)


def test_style_alone_and_nothing():
    net = fuser()
    assert net({}) == (None, None)
    fused, tokens = net({}, torch.randn(1, 3, WIDTH))
    assert fused is None and tokens.shape == (1, 3, WIDTH)


def test_weights_load_by_their_shapes_and_others_are_refused():
    net = fuser()
    loaded = CoAdapterFuser.from_state(net.state_dict())
    # The number of heads is in no shape; published weights have 8.
    assert [layer.out_features for layer in loaded.spatial_ch_projs] == list(CHANNELS)
    with pytest.raises(
        ValueError, match="^file: expected the weights of CoAdapter's fuser, got a file without task_emb"
    ):
        CoAdapterFuser.from_state({"body.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="got 1 for extra, where it has nothing"):
        CoAdapterFuser.from_state({**net.state_dict(), "extra": torch.ones(1)})
    lacking = {key: value for key, value in net.state_dict().items() if key != "ln_post.bias"}
    with pytest.raises(ValueError, match="got nothing for ln_post.bias"):
        CoAdapterFuser.from_state(lacking)
