"""Stage 'captions': one sentence per picture, by BLIP-2 (arXiv 2301.12597)."""

from __future__ import annotations

from pathlib import Path

import torch

from .folder import CAPTION, Folder, in_batches, model_folder, work_through

WORDS = 40  # maximum tokens of a caption
BEAMS = 5


def write_captions(folder: Folder, model: Path, device: str = "cpu", batch: int = 16, again: bool = False) -> None:
    """Writes `<id>.caption.txt` for every picture that has none, with the BLIP-2 model in the folder `model`.

    Raises FileNotFoundError if there is no such model.
    """
    ids = folder.left_to_do((), (CAPTION,), again)
    model = model_folder(model, "BLIP-2 model", "--model")
    if not ids:
        return
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    processor = Blip2Processor.from_pretrained(model, local_files_only=True)
    # On a GPU the published models, of 3 to 8 billion parameters, are meant to run in half precision.
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    captioner = Blip2ForConditionalGeneration.from_pretrained(model, local_files_only=True, dtype=dtype)
    if captioner.config.image_token_index is None:
        # Older models lack this token in their configuration; the processor has appended it to the vocabulary.
        captioner.config.image_token_index = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    captioner = captioner.eval().to(device)

    @torch.inference_mode()
    def work(some: list[str]) -> None:
        pixels = processor(images=[folder.image(i) for i in some], return_tensors="pt").pixel_values
        tokens = captioner.generate(pixels.to(device, dtype), num_beams=BEAMS, max_new_tokens=WORDS)
        for image_id, text in zip(some, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
            folder.write_text(image_id, CAPTION, " ".join(text.split()) + "\n")

    work_through("captions", in_batches(ids, batch), len(ids), work)
