"""The interface of two nodes of ComfyUI_IPAdapter_plus, with which its workflow is written and checked where that pack
is absent. They pass the model through."""


class UnifiedLoader:
    """IPAdapter Unified Loader."""

    RETURN_TYPES = ("MODEL", "IPADAPTER")
    RETURN_NAMES = ("model", "ipadapter")
    FUNCTION, CATEGORY = "load", "ipadapter"
    PRESETS = (
        "LIGHT - SD1.5 only (low strength)",
        "STANDARD (medium strength)",
        "VIT-G (medium strength)",
        "PLUS (high strength)",
        "PLUS FACE (portraits)",
        "FULL FACE - SD1.5 only (portraits stronger)",
    )

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (ComfyUI's name)
        return {
            "required": {"model": ("MODEL",), "preset": (list(cls.PRESETS),)},
            "optional": {"ipadapter": ("IPADAPTER",)},
        }

    def load(self, model, preset, **_):
        return model, preset


class Apply:
    """IPAdapter."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION, CATEGORY = "apply", "ipadapter"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (ComfyUI's name)
        return {
            "required": {
                "model": ("MODEL",),
                "ipadapter": ("IPADAPTER",),
                "image": ("IMAGE",),
                "weight": ("FLOAT", {"default": 1.0, "min": -1, "max": 3, "step": 0.05}),
                "start_at": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001}),
                "end_at": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.001}),
                "weight_type": (["standard", "prompt is more important", "style transfer"],),
            },
            "optional": {"attn_mask": ("MASK",)},
        }

    def apply(self, model, **_):
        return (model,)


NODE_CLASS_MAPPINGS = {"IPAdapterUnifiedLoader": UnifiedLoader, "IPAdapter": Apply}
NODE_DISPLAY_NAME_MAPPINGS = {"IPAdapterUnifiedLoader": "IPAdapter Unified Loader", "IPAdapter": "IPAdapter"}
