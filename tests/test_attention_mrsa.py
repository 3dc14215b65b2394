"""Multi-reference self-attention against the equations, written out in float64 (spec: oracles 1 to 9)."""

import math

import pytest
import torch
from conceptloom.attention.mrsa import (
    FORMULAS,
    KeyLayout,
    balance_biases,
    bias_row,
    crowding,
    keep_style,
    multi_reference_attention,
    plan_keys,
    query_groups,
    subject_shares,
)

HEADS, WIDTH, TOKENS, SUBJECTS = 4, 40, 256, 3
CHANNELS = HEADS * WIDTH


def attend(q, k, v, bias):
    """Plain scaled dot-product attention with the head layout of the host."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def qkv(draw):
    return draw(2, TOKENS, CHANNELS), draw(2, TOKENS, CHANNELS), draw(2, TOKENS, CHANNELS)


@pytest.fixture
def references(draw):
    return draw(SUBJECTS, TOKENS, CHANNELS), draw(SUBJECTS, TOKENS, CHANNELS)


@pytest.fixture
def masks(draw):
    return draw(SUBJECTS, TOKENS) > 0.7


def mrsa(qkv, references, masks, weights, formula="official", targets=None, own_tokens=TOKENS, with_shares=False):
    """The shipped functions, used as the host floor uses them."""
    q, k, v = qkv
    n = len(weights)
    plan = plan_keys(masks, range(n), len(references[0]), weights, [0.0] * n, range(n), formula)
    keys, values = plan.collect(*references)
    bias = bias_row(plan.layout, k.shape[1], own_tokens, q.dtype)
    groups = None if targets is None else query_groups(targets, plan.layout.owner, k.shape[1])
    out = multi_reference_attention(attend, q, k, v, keys, values, bias, groups)
    if not with_shares:
        return out
    return out, subject_shares(attend, q, k, keys, bias, plan.layout.owner, n, HEADS, groups)


def naive(qkv, references, masks, weights, formula="official", targets=None, with_shares=False):
    """softmax over own and reference logits, keys neither gathered nor merged, in float64."""
    q, k, v = (x.double().unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in qkv)
    logits, values = [q @ k.mT / math.sqrt(WIDTH)], [v]
    for i, w in enumerate(weights):
        k_i, v_i = (x[i].double().unflatten(-1, (HEADS, -1)).transpose(0, 1)[None] for x in references)
        s = q @ k_i.mT / math.sqrt(WIDTH)
        m = masks[i].expand_as(s)
        if formula == "official":
            s = torch.where(m, s + w, -math.inf)
        elif formula == "paper":
            s = s * w * m
        else:
            s = torch.where(m, s * w, -math.inf)
        if targets is not None:
            s = torch.where(targets[i][:, None].expand_as(s), s, -math.inf)
        logits.append(s)
        values.append(v_i.expand(len(q), -1, -1, -1))
    probabilities = torch.cat(logits, -1).softmax(-1)
    out = (probabilities @ torch.cat(values, -2)).transpose(1, 2).flatten(2).float()
    shares = torch.stack([p.sum(-1).mean(1) for p in probabilities.split([x.shape[-1] for x in logits], -1)], -1)
    return (out, shares.float()) if with_shares else out


@pytest.mark.parametrize(("formula", "tolerance"), [("official", 1e-6), ("paper", 1e-5), ("paper_drop", 1e-5)])
def test_matches_equation(qkv, references, masks, formula, tolerance):
    weights = [3.0, 2.0, 2.5]
    assert (
        mrsa(qkv, references, masks, weights, formula) - naive(qkv, references, masks, weights, formula)
    ).abs().max() < tolerance


def test_dropping_masked_keys_changes_the_papers_formula(qkv, references, masks):
    paper, drop = (mrsa(qkv, references, masks, [3.0] * 3, f) for f in ("paper", "paper_drop"))
    assert (paper - drop).abs().mean() > 1e-3


def test_self_reference(qkv):
    q, k, v = (x[:1] for x in qkv)
    everything = torch.ones(1, TOKENS, dtype=torch.bool)
    plain = attend(q, k, v, None)
    for w in (1.0, 3.0, 7.0):
        assert torch.allclose(mrsa((q, k, v), (k, v), everything, [w]), plain, atol=1e-6)
    assert torch.allclose(mrsa((q, k, v), (k, v), everything, [1.0], "paper"), plain, atol=1e-6)
    assert (mrsa((q, k, v), (k, v), everything, [3.0], "paper") - plain).abs().max() > 0.1


def test_empty_mask(qkv, references):
    nothing = torch.zeros(SUBJECTS, TOKENS, dtype=torch.bool)
    plain = attend(*qkv, None)
    for formula in ("official", "paper_drop"):
        assert torch.allclose(mrsa(qkv, references, nothing, [3.0] * 3, formula), plain, atol=1e-6)
    assert (mrsa(qkv, references, nothing, [3.0] * 3, "paper") - plain).abs().max() > 0.05


def test_duplicate_reference_is_ln2_of_weight(qkv, references, masks):
    k, v = (x[:1] for x in references)
    twice = mrsa(qkv, (k.repeat(2, 1, 1), v.repeat(2, 1, 1)), masks[:1].repeat(2, 1), [2.0, 2.0])
    once = mrsa(qkv, (k, v), masks[:1], [2.0 + math.log(2)])
    assert torch.allclose(twice, once, atol=2e-6)


def test_order_of_references_is_irrelevant(qkv, references, masks):
    order = torch.tensor([2, 0, 1])
    weights = torch.tensor([1.0, 2.0, 3.0])
    straight = mrsa(qkv, references, masks, weights.tolist())
    shuffled = mrsa(qkv, tuple(x[order] for x in references), masks[order], weights[order].tolist())
    assert torch.allclose(straight, shuffled, atol=2e-6)


def test_two_subjects_of_one_reference_share_its_row(qkv, references, masks):
    q, k, v = qkv
    ref_k, ref_v = (x[:1] for x in references)
    plan = plan_keys(masks[:2], [0, 0], 1, [2.0, 3.0], [0.0, 0.0], [0, 1], "paper")
    keys, values = plan.collect(ref_k, ref_v)
    shared = multi_reference_attention(attend, q, k, v, keys, values, bias_row(plan.layout, TOKENS, TOKENS, q.dtype))
    copied = mrsa(qkv, (ref_k.repeat(2, 1, 1), ref_v.repeat(2, 1, 1)), masks[:2], [2.0, 3.0], "paper")
    assert torch.allclose(shared, copied, atol=1e-6)


def test_vanishing_weight_is_plain(qkv, references, masks):
    assert torch.allclose(mrsa(qkv, references, masks, [-1e4] * 3), attend(*qkv, None), atol=1e-6)


def test_style_fidelity_blends(qkv, references, masks):
    plain, mixed = attend(*qkv, None), mrsa(qkv, references, masks, [3.0] * 3)
    assert torch.equal(keep_style(plain, mixed, 1.0), plain)
    assert torch.equal(keep_style(plain, mixed, 0.0), mixed)
    assert torch.allclose(keep_style(plain, mixed, 0.3), 0.7 * mixed + 0.3 * plain, atol=1e-6)


@pytest.mark.parametrize("formula", FORMULAS)
def test_shares_match_equation_and_sum_to_one(qkv, references, masks, formula):
    weights = [3.0, 2.0, 1.0]
    _, shares = mrsa(qkv, references, masks, weights, formula, with_shares=True)
    _, expected = naive(qkv, references, masks, weights, formula, with_shares=True)
    assert torch.allclose(shares, expected, atol=1e-5)
    assert torch.allclose(shares.sum(-1), torch.ones(2, TOKENS), atol=1e-5)


def test_shares_of_more_subjects_than_channels_of_a_head(draw):
    heads, width, n = 2, 4, 6
    q, k = draw(1, 8, heads * width), draw(1, 8, heads * width)
    keys = draw(n * 3, heads * width)
    layout = KeyLayout(torch.ones(n * 3), torch.arange(n).repeat_interleave(3), torch.full((n * 3,), 8.0))

    def small(q, k, v, bias):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    shares = subject_shares(small, q, k, keys, bias_row(layout, 8, 8, q.dtype), layout.owner, n, heads)
    assert shares.shape == (1, 8, n + 1)
    assert torch.allclose(shares.sum(-1), torch.ones(1, 8), atol=1e-5)


def test_equal_logits_give_the_closed_form(references, masks):
    zeros = torch.zeros(1, TOKENS, CHANNELS)
    weights = [3.0, 2.0, 1.0]
    _, shares = mrsa((zeros, zeros, zeros), references, masks, weights, with_shares=True)
    coverages = [float(m.float().mean()) for m in masks]
    assert shares[..., 0].sub(1 / (1 + crowding(coverages, weights))).abs().max() < 1e-5


def test_merging_partial_softmaxes_by_their_normalizers_gives_the_same(qkv, references, masks):
    """An independent derivation: out = sum_i softmax_i(lse_i + w_i) out_i over own and references."""
    q, k, v = (x.double().unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in qkv)
    weights = [3.0, 2.0, 2.5]
    parts, sizes = [], []
    for index in range(-1, SUBJECTS):
        if index < 0:
            k_i, v_i, w = k, v, 0.0
        else:
            k_i, v_i = (
                x[index][masks[index]].double().unflatten(-1, (HEADS, -1)).transpose(0, 1)[None] for x in references
            )
            w = weights[index]
        s = q @ k_i.mT / math.sqrt(WIDTH)
        parts.append(s.softmax(-1) @ v_i)
        sizes.append(s.logsumexp(-1) + w)
    merged = (torch.stack(sizes).softmax(0)[..., None] * torch.stack(parts)).sum(0).transpose(1, 2).flatten(2)
    assert torch.allclose(mrsa(qkv, references, masks, weights).double(), merged, atol=2e-6)


@pytest.mark.parametrize("formula", FORMULAS)
def test_target_masks_equal_a_full_bias(qkv, references, masks, draw, formula):
    targets = draw(SUBJECTS, TOKENS) > 0
    targets[:, :20] = False
    weights = [3.0, 2.0, 1.0]
    out, shares = mrsa(qkv, references, masks, weights, formula, targets, with_shares=True)
    expected, expected_shares = naive(qkv, references, masks, weights, formula, targets, with_shares=True)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(shares, expected_shares, atol=1e-5)
    assert torch.allclose(out[:, :20], attend(*qkv, None)[:, :20], atol=1e-6)


def test_weight_means_the_same_at_every_reference_size(draw):
    """With equal logits the picture's own share does not depend on the size of the reference's grid."""
    own = []
    for tokens in (64, 256, 1024):
        mask = torch.zeros(1, tokens, dtype=torch.bool)
        mask[:, : tokens // 4] = True
        plan = plan_keys(mask, [0], 1, [2.0], [0.0], [0], "official")
        zeros = torch.zeros(1, 256, CHANNELS)
        keys, _ = plan.collect(draw(1, tokens, CHANNELS), draw(1, tokens, CHANNELS))
        shares = subject_shares(
            attend, zeros, zeros, keys, bias_row(plan.layout, 256, 256, zeros.dtype), plan.layout.owner, 1, HEADS
        )
        own.append(float(shares[0, 0, 0]))
    assert max(own) - min(own) < 1e-6


def test_equal_sizes_add_exactly_nothing():
    plan = plan_keys(torch.ones(1, 77, dtype=torch.bool), [0], 1, [3.0], [0.0], [0], "official")
    assert torch.equal(bias_row(plan.layout, 5, 77, torch.float32)[0, 0, 0], torch.tensor([0.0] * 5 + [3.0] * 77))


def test_balance_evens_out_sizes_and_is_bounded():
    assert balance_biases([0.2, 0.05], 0.0) == [0.0, 0.0]
    even = balance_biases([0.2, 0.05], 1.0)
    assert 0.2 * math.exp(even[0]) == pytest.approx(0.05 * math.exp(even[1]))
    assert balance_biases([0.5, 0.001], 1.0)[1] == 3.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_half_precision(qkv, references, masks, dtype, tolerance):
    half = mrsa(tuple(x.to(dtype) for x in qkv), tuple(x.to(dtype) for x in references), masks, [3.0] * 3)
    assert half.dtype == dtype
    assert (half.float() - naive(qkv, references, masks, [3.0] * 3)).abs().max() < tolerance


def test_unknown_formula_is_named():
    with pytest.raises(ValueError, match="formula: expected one of official, paper, paper_drop, got 'sum'"):
        plan_keys(torch.ones(1, 4, dtype=torch.bool), [0], 1, [1.0], [0.0], [0], "sum")
