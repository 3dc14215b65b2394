"""Stand-ins for nodes of other packs: what they do to a model or a conditioning, as small as it can be."""

import torch
from torch.nn import functional as F


class NegPip:
    """A CLIP as CLIP NegPip leaves it: each token has a row of states for keys and one for values, which is negative
    where its weight is."""

    def __init__(self, clip):
        self.clip = clip

    def __getattr__(self, name):
        return getattr(self.clip, name)

    def clone(self):
        return NegPip(self.clip.clone())

    def encode_from_tokens_scheduled(self, tokens):
        weights = torch.tensor([weight for chunk in next(iter(tokens.values())) for _, weight in chunk])
        positive = {name: [[(t, abs(w)) for t, w in chunk] for chunk in chunks] for name, chunks in tokens.items()}
        return [
            [torch.stack([states, states * weights.sign()[:, None]], 2).flatten(1, 2), extras]
            for states, extras in self.clip.encode_from_tokens_scheduled(positive)
        ]


def negpip(model):
    """The MODEL that goes with such a CLIP."""
    model = model.clone()
    model.set_model_attn2_patch(lambda q, k, v, options: (q, k[:, 0::2], v[:, 1::2]))
    return model


def couple(model, conditioning, mask):
    """An attention couple of one region: inside a mask (H, W) the positive's cross-attention is that of another prompt.
    Of the conditioning the first tensor is read, as these packs do."""
    states, counts = conditioning[0][0], []

    def enter(q, k, v, options):
        sides = options["cond_or_uncond"]
        counts[:] = [1 if side == 1 else 2 for side in sides]
        rows = [(part, key) for part, key in zip(q.chunk(len(sides)), k.chunk(len(sides)), strict=True)]
        queries = [part for (part, _), count in zip(rows, counts, strict=True) for _ in range(count)]
        keys = [
            chosen
            for (part, key), count in zip(rows, counts, strict=True)
            for chosen in (key, states.to(k).expand(len(part), -1, -1))[:count]
        ]
        shortest = max(key.shape[1] for key in keys)
        keys = torch.cat([key.repeat(1, shortest // key.shape[1], 1) for key in keys])
        return torch.cat(queries), keys, keys

    def leave(out, options):
        inside = F.interpolate(mask[None, None], options["activations_shape"][-2:]).flatten()[:, None]
        parts, given = [], iter(out.chunk(sum(counts)))
        for count in counts:
            part = next(given)
            parts.append(part if count == 1 else part * (1 - inside) + next(given) * inside)
        return torch.cat(parts)

    model = model.clone()
    model.set_model_attn2_patch(enter)
    model.set_model_attn2_output_patch(leave)
    return model


def perturbed(model, *blocks):
    """Guidance away from a second evaluation in which self-attention of some decoder blocks gives its values."""
    import comfy.model_patcher
    import comfy.samplers

    def guide(told):
        options = told["model_options"].copy()
        for block in blocks:
            options = comfy.model_patcher.set_model_options_patch_replace(
                options, lambda q, k, v, extra_options: v, "attn1", "output", block
            )
        (worse,) = comfy.samplers.calc_cond_batch(told["model"], [told["cond"]], told["input"], told["sigma"], options)
        return told["denoised"] + 2.0 * (told["cond_denoised"] - worse)

    model = model.clone()
    model.set_model_sampler_post_cfg_function(guide)
    return model


def reference_control(hint):
    """Reference-only control in the manner of Advanced-ControlNet: a ControlNet that brings a hook, whose wrapper of
    sampling puts itself into all transformer blocks. At every evaluation a picture `hint` (1, C, h, w) goes through the
    model first, and its self-attention inputs are more keys for the picture's positive rows."""
    import comfy.hooks
    import comfy.patcher_extension
    from comfy.controlnet import ControlBase
    from comfy.ldm.modules.attention import BasicTransformerBlock

    written: dict = {}

    def self_attention(block, x, options):
        extra = {**options, "n_heads": block.n_heads, "dim_head": block.d_head, "attn_precision": None}
        replaced = options.get("patches_replace", {}).get("attn1", {})
        key = (*options["block"], options["block_index"])
        attend = replaced.get(key) or replaced.get(options["block"])
        state = options.get("toy_reference")
        if state == "write":
            written[key] = x.clone()
        keys = torch.cat([x, written[key]], 1) if state == "read" else x
        negative = [i for i, side in enumerate(options["cond_or_uncond"]) if side == 1 and state == "read"]

        def answer(q, k):
            if attend is None:
                return block.attn1(q, context=k, transformer_options=options)
            return block.attn1.to_out(attend(block.attn1.to_q(q), block.attn1.to_k(k), block.attn1.to_v(k), extra))

        out = answer(x, keys).clone()
        if negative:
            out[negative] = answer(x[negative], x[negative])
        return out

    def cross_attention(block, x, context, options):
        extra = {**options, "n_heads": block.n_heads, "dim_head": block.d_head, "attn_precision": None}
        attend = options.get("patches_replace", {}).get("attn2", {}).get((*options["block"], options["block_index"]))
        if attend is None:
            return block.attn2(x, context=context, transformer_options=options)
        q, k, v = block.attn2.to_q(x), block.attn2.to_k(context), block.attn2.to_v(context)
        return block.attn2.to_out(attend(q, k, v, extra))

    def forward_of(block):
        def forward(x, context=None, transformer_options=None):
            x = x + self_attention(block, block.norm1(x), transformer_options)
            x = x + cross_attention(block, block.norm2(x), context, transformer_options)
            return x + block.ff(block.norm3(x))

        return forward

    def evaluate(executor, x, *args, **kwargs):
        options = kwargs.get("transformer_options") or args[-1]
        options["toy_reference"] = "write"
        executor(hint.to(x).expand_as(x), *args, **kwargs)
        options["toy_reference"] = "read"
        return executor(x, *args, **kwargs)

    def sample(executor, *args, **kwargs):
        guider = executor.class_obj
        blocks = [m for m in guider.model_patcher.model.modules() if isinstance(m, BasicTransformerBlock)]
        wrappers = guider.model_options["transformer_options"].setdefault("wrappers", {})
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers.setdefault(kind, {})["toy_reference"] = [evaluate]
        for block in blocks:
            block.forward = forward_of(block)
        try:
            return executor(*args, **kwargs)
        finally:
            for block in blocks:
                del block.forward
            del wrappers[kind]["toy_reference"]

    class Reference(ControlBase):
        def __init__(self):
            super().__init__()
            wrappers = {}
            comfy.patcher_extension.add_wrapper_with_key(
                comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "toy_reference", sample, wrappers
            )
            self.extra_hooks = comfy.hooks.HookGroup()
            self.extra_hooks.add(comfy.hooks.WrapperHook(wrappers))

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            return None

        def get_models(self):
            return []

        def copy(self):
            return self

    return Reference()


def controlled(control, conditioning):
    """A conditioning with a ControlNet on it."""
    return [[states, {**extras, "control": control}] for states, extras in conditioning]
