"""Text to masks: each backend on a tiny model of its true class with random weights, the judge on ground truth."""

import pytest
import torch
from conceptloom.subjects.instances import EMPTY, ERROR

pytestmark = pytest.mark.usefixtures("host")

SIZE = (48, 60)
PICTURE = torch.rand(*SIZE, 3, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[5.0, 6, 30, 40], [20, 10, 55, 45], [0, 0, 60, 48]])


def randomize(model, scale=1.4):
    """Weights that keep signals alive, so that a mistake shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (scale / p[0].numel() ** 0.5))
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


# ---- SAM3 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam3(host):
    """The host's SAM3 at 112 pixels with its text encoder at width 64 and one layer."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import comfy.supported_models_base
    from comfy.text_encoders import sam3_clip

    config = comfy.supported_models.SAM3(
        {
            "image_model": "SAM3",
            "d_model": 32,
            "embed_dim": 64,
            "depth": 1,
            "img_size": 112,
            "pretrain_img_size": 56,
            "window_size": 4,
            "global_att_blocks": (0,),
            "num_queries": 12,
            "dtype": torch.float32,
        }
    )
    base = comfy.model_base.SAM3(config, device="cpu").eval()
    randomize(base.diffusion_model)
    model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
        patch.setattr(sam3_clip, "SAM3_CLIP_CONFIG", {**sam3_clip.SAM3_CLIP_CONFIG, **small, "projection_dim": 64})
        target = comfy.supported_models_base.ClipTarget(sam3_clip.SAM3TokenizerWrapper, sam3_clip.SAM3ClipModelWrapper)
        clip = comfy.sd.CLIP(target)
    randomize(clip.cond_stage_model)
    return model, clip


def host_answer(sam3, noun):
    """What the host's node asks of the model: scores of the queries, and masks at the picture's size."""
    import comfy.utils

    model, clip = sam3
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(noun))
    pixels = comfy.utils.common_upscale(PICTURE[None].movedim(-1, 1), 112, 112, "bilinear", "disabled")
    with torch.no_grad():
        return model.model.diffusion_model(
            pixels,
            text_embeddings=conditioning[0][0],
            text_mask=conditioning[0][1]["attention_mask"],
            threshold=0.0,
            orig_size=SIZE,
        )


def test_sam3_gives_the_host_s_masks_for_each_noun_by_itself(sam3):
    from conceptloom.host.segmenting.segmenters import Sam3

    nouns = ["dog", "red hat", "dog"]
    found = Sam3(*sam3, threshold=0.0).segment(PICTURE, nouns)
    for noun, candidates in zip(nouns, found, strict=True):
        out = host_answer(sam3, noun)
        scores = out["scores"][0].sigmoid() * out["presence"][0].sigmoid()
        assert len(candidates) == 12
        torch.testing.assert_close(torch.tensor([one.score for one in candidates]), scores)
        assert torch.equal(torch.stack([one.mask for one in candidates]), out["masks"][0] > 0)
    assert not torch.equal(host_answer(sam3, "dog")["scores"], host_answer(sam3, "red hat")["scores"])


def test_sam3_keeps_what_is_above_the_threshold(sam3):
    from conceptloom.host.segmenting.segmenters import Sam3

    (everything,) = Sam3(*sam3, threshold=0.0).segment(PICTURE, ["dog"])
    middle = sorted(one.score for one in everything)[5]
    (some,) = Sam3(*sam3, threshold=middle).segment(PICTURE, ["dog"])
    assert [one.score for one in some] == [one.score for one in everything if one.score > middle]
    assert Sam3(*sam3, threshold=1.0).segment(PICTURE, ["dog"]) == [[]]


def test_sam3_refuses_other_models(sam3):
    from conceptloom.host.segmenting.segmenters import Sam3
    from conceptloom.host.shapeland import load_clip, load_model
    from conceptloom.shapeland import models

    other = load_model(models.build_unet().state_dict())
    with pytest.raises(ValueError, match="model: expected SAM3 from Load Checkpoint, got BaseModel"):
        Sam3(other, sam3[1], 0.5)
    with pytest.raises(ValueError, match=r"clip: expected the text encoder of SAM3 \(width 64\), got one of 128"):
        Sam3(sam3[0], load_clip(), 0.5).segment(PICTURE, ["dog"])


# ---- Grounding DINO and SAM of transformers ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A folder as transformers saves Grounding DINO, of some thousand weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "dog", "red", "hat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_indices=[2, 3, 4]
    )
    bert = transformers.BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, num_queries=6, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, max_text_len=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    return folder / "model.safetensors"


def test_grounding_dino_gives_boxes_in_pixels_for_each_noun(dino):
    from conceptloom.host.segmenting.boxes import GroundingDino
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    found = GroundingDino(dino, 0.0).detect(PICTURE, ["Dog", "red hat", "Dog"])
    processor = AutoProcessor.from_pretrained(dino.parent)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(dino.parent).eval()
    pixels = (PICTURE * 255).round().byte().numpy()
    for text, (boxes, scores) in zip(["dog.", "red hat.", "dog."], found, strict=True):
        with torch.no_grad():
            out = model(**processor(images=pixels, text=text, return_tensors="pt"))
        x, y, w, h = out.pred_boxes[0].unbind(-1)
        expected = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) * torch.tensor([60, 48, 60, 48])
        torch.testing.assert_close(boxes, expected)
        torch.testing.assert_close(scores, out.logits[0].sigmoid().amax(-1))
    assert not torch.equal(found[0][1], found[1][1])
    middle = float(found[0][1].sort().values[2])
    ((boxes, scores),) = GroundingDino(dino, middle).detect(PICTURE, ["dog"])
    assert len(boxes) == len(scores) == 3 and scores.min() > middle


def tiny_sam(transformers):
    model = transformers.SamModel(
        transformers.SamConfig(
            vision_config=transformers.SamVisionConfig(
                hidden_size=16, output_channels=32, num_hidden_layers=1, num_attention_heads=2, image_size=64,
                num_pos_feats=16, global_attn_indexes=[0], window_size=2,
            ),
            prompt_encoder_config=transformers.SamPromptEncoderConfig(hidden_size=32, image_size=64),
            mask_decoder_config=transformers.SamMaskDecoderConfig(
                hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
            ),
        )
    )  # fmt: skip
    images = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    return randomize(model), transformers.SamProcessor(images)


def tiny_sam2(transformers):
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1], window_size_per_stage=[4, 4, 4, 4], global_attention_blocks=[3],
    )  # fmt: skip
    model = transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=transformers.Sam2VisionConfig(
                backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
                backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            ),
            prompt_encoder_config=transformers.Sam2PromptEncoderConfig(hidden_size=32, image_size=64),
            mask_decoder_config=transformers.Sam2MaskDecoderConfig(
                hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
            ),
        )
    )  # fmt: skip
    images = transformers.Sam2ImageProcessor(size={"height": 64, "width": 64})
    return randomize(model), transformers.Sam2Processor(images)


@pytest.mark.parametrize("build", [tiny_sam, tiny_sam2])
def test_sam_of_transformers_cuts_out_what_is_in_each_box(build, tmp_path):
    from conceptloom.host.segmenting.boxes import TransformersSam, load_cutter

    transformers = pytest.importorskip("transformers")
    model, processor = build(transformers)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    cutter = load_cutter(tmp_path / "model.safetensors")
    assert type(cutter) is TransformersSam and type(cutter.model) is type(model)
    masks = cutter.cut(PICTURE, BOXES)
    assert masks.shape == (3, *SIZE) and masks.dtype == torch.bool
    assert masks.any() and not masks.all() and not torch.equal(masks[0], masks[1])
    # The picture is scaled to 64 pixels (SAM keeps its shape and pads, SAM 2 stretches it), and so are the boxes.
    scale = torch.tensor([64 / 60, 51 / 48 if build is tiny_sam else 64 / 48]).repeat(2)
    pixels = processor(images=(PICTURE * 255).round().byte().numpy(), return_tensors="pt")["pixel_values"]
    for box, mask in zip(BOXES, masks, strict=True):
        with torch.no_grad():
            out = model.eval()(pixel_values=pixels, input_boxes=(box * scale)[None, None], multimask_output=False)
        logits = out.pred_masks[0]
        if build is tiny_sam:
            logits = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear")[..., :51, :]
        full = torch.nn.functional.interpolate(logits, SIZE, mode="bilinear")[0, 0]
        assert ((full > 0) == mask)[full.abs() > 1e-4].all()


def test_folders_of_another_kind_get_their_sentence(dino, tmp_path):
    from conceptloom.host.segmenting.boxes import GroundingDino, load_cutter
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="detector: expected Grounding DINO, as transformers saves it, got what is in"):
        GroundingDino(tmp_path / "model.safetensors", 0.3)
    with pytest.raises(ValueError, match="sam: expected SAM or SAM 2, as transformers saves it, got what is in"):
        load_cutter(dino)


# ---- segment-anything -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of segment-anything with one layer, and the builder that the package would choose for it."""
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    def build(checkpoint=None):
        transformer = TwoWayTransformer(depth=1, embedding_dim=32, mlp_dim=32, num_heads=2)
        return Sam(
            ImageEncoderViT(
                64, 16, 3, 768, 1, 2, mlp_ratio=0.1, out_chans=32, use_rel_pos=True, global_attn_indexes=(0,)
            ),
            PromptEncoder(32, (4, 4), (64, 64), 4),
            MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_hidden_dim=16),
        )

    path = tmp_path_factory.mktemp("sams") / "sam_vit_b_tiny.pth"
    torch.save(randomize(build()).state_dict(), path)
    return path, build


def test_segment_anything_cuts_out_what_is_in_each_box(checkpoint, monkeypatch):
    import segment_anything
    from conceptloom.host.segmenting.boxes import SegmentAnything, load_cutter

    path, build = checkpoint
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build)
    cutter = load_cutter(path)
    assert type(cutter) is SegmentAnything
    masks = cutter.cut(PICTURE, BOXES)
    assert masks.shape == (3, *SIZE) and masks.any() and not masks.all() and not torch.equal(masks[0], masks[1])
    model = build().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    predictor = segment_anything.SamPredictor(model)
    predictor.set_image((PICTURE * 255).round().byte().numpy())
    for box, mask in zip(BOXES, masks, strict=True):
        expected, _, _ = predictor.predict(box=box.numpy(), multimask_output=False)
        assert torch.equal(torch.from_numpy(expected[0]), mask)


def test_checkpoints_of_another_kind_get_their_sentence(checkpoint, monkeypatch, tmp_path):
    import sys

    import segment_anything
    from conceptloom.host.segmenting.boxes import load_cutter

    path, build = checkpoint
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match="sam: expected a checkpoint of Segment Anything, got other.pth with other weights"
    ):
        load_cutter(tmp_path / "other.pth")
    state = build().state_dict()
    state.popitem()
    torch.save(state, tmp_path / "part.pth")
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build)
    with pytest.raises(ValueError, match="sam: expected all weights of SAM vit_b, got part.pth with others"):
        load_cutter(tmp_path / "part.pth")
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ValueError, match="pip install segment-anything"):
        load_cutter(path)


# ---- what is common to all --------------------------------------------------------------------------------------


class Rectangles:
    """A cutter that takes whole boxes."""

    def cut(self, image, boxes):
        masks = torch.zeros(len(boxes), *image.shape[:2], dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        return masks


class Fixed:
    """A detector with an answer for each noun."""

    def __init__(self, **answers):
        self.answers = answers

    def detect(self, image, nouns):
        boxes = [torch.tensor(self.answers.get(noun, [])).reshape(-1, 5) for noun in nouns]
        return [(found[:, :4], found[:, 4]) for found in boxes]


def test_boxes_and_masks_stay_with_their_nouns():
    from conceptloom.host.segmenting.segmenters import Boxes, text_to_masks

    detector = Fixed(dog=[[1, 2, 10, 20, 0.4], [30, 2, 40, 20, 0.9]], hat=[[12, 30, 20, 40, 0.8]])
    masks, detections, seen = text_to_masks(Boxes(detector, Rectangles()), PICTURE, "hat, cat, dog, dog#1", EMPTY)
    assert str(detections).splitlines() == ["hat: 0.800", "cat: 0.000", "dog: 0.900", "dog#1: 0.400"]
    assert masks.shape == (4, *SIZE) and masks.dtype == torch.float32
    boxes = torch.tensor([[12, 30, 20, 40], [0, 0, 0, 0], [30, 2, 40, 20], [1, 2, 10, 20]])
    assert torch.equal(masks.bool(), Rectangles().cut(PICTURE, boxes))
    assert seen.shape == PICTURE.shape
    with pytest.raises(ValueError, match="expected something that looks like 'cat'"):
        text_to_masks(Boxes(Fixed(), Rectangles()), PICTURE, "cat", ERROR)


def test_drawn_boxes_belong_to_the_nouns_in_order():
    from conceptloom.host.segmenting.segmenters import Boxes, GivenBoxes, text_to_masks

    drawn = [[{"x": 1, "y": 2, "width": 9, "height": 18}, {"x": 30, "y": 2, "width": 10, "height": 18}]]
    masks, _scores, _ = text_to_masks(Boxes(GivenBoxes(drawn), Rectangles()), PICTURE, "dog, dog", ERROR)
    assert torch.equal(masks.bool(), Rectangles().cut(PICTURE, torch.tensor([[1, 2, 10, 20], [30, 2, 40, 20]])))
    with pytest.raises(ValueError, match="boxes: expected one per noun, got 2 for 1 nouns"):
        text_to_masks(Boxes(GivenBoxes(drawn), Rectangles()), PICTURE, "dog", ERROR)


def test_the_judge_finds_things_where_they_were_drawn():
    from conceptloom.host.segmenting.segmenters import ShapelandJudge, text_to_masks
    from conceptloom.shapeland import world
    from conceptloom.subjects.instances import overlap

    judge, overlaps = ShapelandJudge(), []
    for seed in range(12):
        picture, truth = world.draw_description("a red striped fish and a blue mug", seed, seed, 1)
        image = torch.from_numpy(picture.image)
        masks, _, _ = text_to_masks(judge, image, "mug, Red fish", EMPTY)
        overlaps += [overlap(masks[0] > 0, torch.from_numpy(truth[1]) > 0.5)]
        overlaps += [overlap(masks[1] > 0, torch.from_numpy(truth[0]) > 0.5)]
    assert torch.tensor(overlaps).median() > 0.85
    with pytest.raises(ValueError, match="nouns: expected things of Shapeland .*, got 'horse'"):
        judge.segment(image, ["horse"])


def test_nodes_hand_over_what_the_functions_give(host):
    """The three nodes after each other, as the host calls them."""
    from conceptloom.nodes import masks as nodes
    from conceptloom.shapeland import world

    picture, _truth = world.draw_description("a red striped fish and a blue mug", 0, 0, 1)
    image = torch.from_numpy(picture.image)[None]
    (segmenter,) = nodes.LoadSegmenter.execute({"kind": nodes.SHAPELAND}).args
    output = nodes.TextToMasks.execute(segmenter, image, "mug\nfish", ERROR)
    masks, detections, report = output.args
    assert masks.shape == (2, 64, 64) and output.ui and report.startswith("mug: ")
    batches = {"mask1": masks[1], "mask0": masks[:1]}
    output = nodes.ConceptMasks.execute(batches, 0.0, 0.0, "smaller in front", detections, image)
    partition, shown = output.args
    assert torch.equal(partition.weights, shown) and shown.shape == (3, 64, 64) and partition.names == ("mug", "fish")
    assert torch.equal(shown[0], masks[0] * (1 - masks[1])) or torch.equal(shown[0], masks[0])
    batches["mask10"] = torch.zeros(1, 64, 64)
    for overlap in ("smaller in front", "higher score in front"):
        with pytest.raises(ValueError, match="Concept Masks: detections: expected one per mask.* got 2 for 3 masks"):
            nodes.ConceptMasks.execute(batches, 0.0, 0.0, overlap, detections)
    assert nodes.ConceptMasks.execute(batches, 0.0, 0.0, "smaller in front").args[0].names == ()
    for node in nodes.NODES:
        node.GET_SCHEMA()
