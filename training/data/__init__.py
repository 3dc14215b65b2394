"""Makes FastComposer's training data from pictures: `python tools/run.py training.data STAGE --root FOLDER ...`.

The format is the published one of FastComposer (arXiv 2305.10431; the data set ffhq-fastcomposer). Its authors did not
release the program that makes it; this one follows section 5.1 of the paper. Each stage reads files next to the picture
`FOLDER/<id[:5]>/<id>.jpg` and writes others, so any stage can be replaced by files of your own:

  stage      reads                    writes
  images     a folder (--from)        <id>.jpg, ids of eight digits; image_sources.txt says which file became which id
  captions   <id>.jpg                 <id>.caption.txt     one line of text
  phrases    <id>.caption.txt         <id>.phrases.json    {"caption": text, "phrases": [{"text": text, "end": offset}]}
  segments   <id>.jpg                 <id>.npy             integers (H, W) of the jpg: the segment at each pixel
                                      <id>.segments.json   [{"id": number, "bbox": [x1, y1, x2, y2],
                                                            "coco_label": text}]
  match      the four files above     <id>.json            {"caption": text, "segments": [{"id": number, "end": offset,
                                                            "bbox": [x1, y1, x2, y2], "coco_label": text}]}
                                      <id>.skipped.txt     instead, if a picture cannot be used: why
                                      image_ids.txt, image_ids_train.txt, image_ids_test.txt
  shapeland  nothing                  all of them, drawn, with the ground truth in place of what models find

The stage 'things' draws pictures of Shapeland in the form that training.promptnet reads, a folder for each thing; the
stage 'compositions' draws them in the form that training.composer reads.

An offset is the number of the caption's characters up to the end of the phrase. The caption of <id>.phrases.json may
differ from <id>.caption.txt: "two women" becomes "a woman and a woman", one phrase each. x2 and y2 of a box are
exclusive. In an <id>.npy of the stage 'segments', 0 marks pixels of no segment.

A stage skips pictures that have its file (--again makes all files anew) and writes every file whole or not at all, so
it can be interrupted at any time. Models are read from local folders; nothing is ever downloaded. Suitable models, by
their names on Hugging Face: Salesforce/blip2-opt-6.7b-coco, facebook/mask2former-swin-large-coco-panoptic,
laion/CLIP-ViT-H-14-laion2B-s32B-b79K and sentence-transformers/stsb-mpnet-base-v2; and spaCy's en_core_web_sm.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> None:
    """Runs the stage that the command line names."""
    options = _parser().parse_args(argv)
    # A stage's packages are imported when it runs: one needs spaCy, another transformers, none needs all of them.
    if options.stage == "images":
        from .images import collect_images

        collect_images(options.root, options.source)
    elif options.stage == "shapeland":
        from .shapeland import shapeland_folder

        shapeland_folder(options.root, options.count, options.seed, not options.without_looks)
    elif options.stage == "compositions":
        from .compositions import compositions_folder

        compositions_folder(options.root, options.count, options.seed)
    elif options.stage == "things":
        from .things import things_folder

        things_folder(options.root, options.count, options.pictures, options.seed)
    else:
        from .folder import Folder

        folder = Folder(options.root)
        if options.stage == "captions":
            from .captions import write_captions

            write_captions(folder, options.model, options.device or _device(), options.batch_size, options.again)
        elif options.stage == "phrases":
            from .phrases import write_phrases

            write_phrases(folder, options.model, options.batch_size, options.again)
        elif options.stage == "segments":
            from .segments import write_segments

            device = options.device or _device()
            write_segments(folder, options.model, options.labels, device, options.batch_size, options.again)
        else:
            from .match import open_clip, open_sentences, write_matches

            device = options.device or _device()
            write_matches(
                folder,
                lambda: open_clip(options.clip, device),
                lambda: open_sentences(options.sentences, device),
                options.threshold,
                options.held_out,
                options.batch_size,
                options.again,
            )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")

    def stage(name: str, purpose: str, batch: int | None = None, on_device: bool = True) -> argparse.ArgumentParser:
        one = stages.add_parser(name, help=purpose, description=purpose)
        one.add_argument("--root", type=Path, required=True, help="the folder of the data")
        if batch is not None:
            one.add_argument(
                "--batch-size", type=_positive, default=batch, help="pictures at a time (default: %(default)s)"
            )
            one.add_argument("--again", action="store_true", help="make files anew that are there already")
            if on_device:
                one.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
        return one

    one = stage("images", "Put pictures into the layout that the other stages read.")
    one.add_argument("--from", type=Path, required=True, dest="source", help="a folder with pictures at any depth")
    one = stage("captions", "One caption per picture, by BLIP-2.", 16)
    one.add_argument("--model", type=Path, required=True, help="the folder of a BLIP-2 model")
    one = stage("phrases", "The noun phrases of the captions, by spaCy.", 256, on_device=False)
    one.add_argument("--model", required=True, help="an installed spaCy pipeline (en_core_web_sm) or its folder")
    one = stage("segments", "The segments of the pictures, by Mask2Former.", 4)
    one.add_argument("--model", type=Path, required=True, help="the folder of a Mask2Former model")
    one.add_argument("--labels", nargs="+", metavar="CLASS", help="keep segments of these classes only, such as person")
    one = stage("match", "Which segment each phrase names, by CLIP and a sentence encoder.", 16)
    one.add_argument("--clip", type=Path, required=True, help="the folder of a CLIP model in transformers' format")
    one.add_argument("--sentences", type=Path, required=True, help="the folder of a sentence-transformers model")
    one.add_argument("--threshold", type=float, default=0.1, help="the least score of a match (default: %(default)s)")
    one.add_argument(
        "--held-out", type=float, default=0.01, help="the part of the pictures to test on (default: %(default)s)"
    )
    one = stage("shapeland", "Pictures of Shapeland with their true captions, segments and matches.")
    one.add_argument("--count", type=_positive, required=True, help="how many pictures")
    one.add_argument("--seed", type=int, default=0, help="which pictures (default: %(default)s)")
    one.add_argument("--without-looks", action="store_true", help="captions name things by their nouns alone")
    one = stage("compositions", "Pictures of Shapeland with instances and depth for the training of Composer.")
    one.add_argument("--count", type=_positive, required=True, help="how many pictures")
    one.add_argument("--seed", type=int, default=0, help="which pictures (default: %(default)s)")
    one = stage("things", "Pictures of Shapeland's things for PromptNet's training, a folder for each thing.")
    one.add_argument("--count", type=_positive, required=True, help="how many things")
    one.add_argument("--pictures", type=_positive, default=4, help="of each thing (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, help="which things (default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number
