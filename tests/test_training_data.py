"""FastComposer's training data: each stage with a tiny model of the true class, the matching against known truth, and
the reader against pixels."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision", reason="torchvision is not installed (pip install torchvision)")
pytest.importorskip("tqdm", reason="tqdm is not installed (pip install tqdm)")

from conceptloom.encoders.files import whole_file
from conceptloom.shapeland import world
from conceptloom.training import data
from conceptloom.training.data import captions, dataset, images, match, phrases, segments
from conceptloom.training.data.folder import Folder, MatchedSubject, Phrase, Segment
from conceptloom.training.data.greedy import greedy_match
from torchvision.transforms import v2


def needs(package: str, pip: str):
    """A module that a test cannot do without."""
    return pytest.importorskip(package, reason=f"{package} is not installed (pip install {pip})")


def put_picture(folder: Folder, image_id: str, pixels: np.ndarray) -> None:
    """A picture in the folder, as near to `pixels` as a JPEG comes."""
    with whole_file(folder.path(image_id, ".jpg")) as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=100, subsampling=0)


@pytest.fixture
def folder(tmp_path) -> Folder:
    """Five pictures of noise, two of them wide."""
    root = Folder(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(5):
        put_picture(root, f"{i:08d}", rng.integers(0, 256, (64, 96 if i in (1, 3) else 64, 3), np.uint8))
    return root


def annotate(folder: Folder) -> None:
    """Two phrases and two segments for each picture, as a user would supply them."""
    for image_id in folder.ids():
        text = "a cat and a dog"
        ends = [{"text": "a cat", "end": 5}, {"text": "a dog", "end": 15}]
        folder.write_json(image_id, ".phrases.json", {"caption": text, "phrases": ends})
        width, height = folder.size(image_id)
        ids = np.zeros((height, width), int)
        ids[8:40, 4:20], ids[20:60, 30:62] = 3, 7
        folder.write_map(image_id, ids)
        boxes = [Segment(3, (4, 8, 20, 40), "dog"), Segment(7, (30, 20, 62, 60), "cat")]
        folder.write_json(image_id, ".segments.json", [b.record() for b in boxes])


def fixed(table):
    """A similarity that gives each picture the same table."""
    return lambda phrases, others: [np.array(table, float) for _ in phrases]


def words_in_common(texts, labels):
    """1 where a phrase ends with the label."""
    pairs = zip(texts, labels, strict=True)
    return [np.array([[float(text.endswith(name)) for name in names] for text in row]) for row, names in pairs]


def files_of(folder: Folder) -> dict[str, bytes]:
    """All files below the folder with their content."""
    return {str(p.relative_to(folder.root)): p.read_bytes() for p in sorted(folder.root.rglob("*")) if p.is_file()}


# --- greedy matching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "pairs"),
    [
        # The best pair goes first even where another assignment has the larger sum (0.8 + 0.85).
        ([[0.9, 0.8], [0.85, 0.1]], [(0, 0), (1, 1)]),
        ([[0.2, 0.9, 0.3], [0.8, 0.7, 0.1]], [(0, 1), (1, 0)]),
        # What is left falls below the threshold, which itself counts.
        ([[0.9, 0.8], [0.85, 0.0999]], [(0, 0)]),
        ([[0.1]], [(0, 0)]),
        ([[0.0999]], []),
        # Ties: first row, then first column.
        ([[0.5, 0.5], [0.5, 0.5]], [(0, 0), (1, 1)]),
        ([[0.2, 0.5], [0.5, 0.5]], [(0, 1), (1, 0)]),
        # More rows than columns and the reverse.
        ([[0.3], [0.6], [0.5]], [(1, 0)]),
        ([[0.3, 0.6, 0.5]], [(0, 1)]),
        ([[-1.0, -2.0]], []),
        (np.zeros((0, 3)), []),
        (np.zeros((2, 0)), []),
    ],
)
def test_greedy_matching_of_small_tables(scores, pairs):
    given = np.array(scores)
    assert greedy_match(given, 0.1) == pairs
    assert np.array_equal(given, np.array(scores)), "the caller's table is left as it is"


def test_greedy_matching_by_its_definition():
    """Against sorting all pairs, best first, and taking each whose row and column are free."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        scores = rng.integers(-3, 10, (rng.integers(1, 6), rng.integers(1, 6))) / 10
        order = sorted(np.ndindex(scores.shape), key=lambda at: (-scores[at], at))
        taken = []
        for r, c in order:
            if scores[r, c] >= 0.1 and all(r != a and c != b for a, b in taken):
                taken.append((r, c))
        assert greedy_match(scores, 0.1) == taken


@pytest.mark.parametrize("scores", [[[0.5, float("nan")]], [[float("inf")]], [0.5, 0.2]])
def test_greedy_matching_refuses_what_is_no_table(scores):
    with pytest.raises(ValueError, match="table of finite numbers"):
        greedy_match(np.array(scores), 0.1)


# --- phrases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "noun", "singular", "expected"),
    [
        ("two ", "women", "woman", ["a woman"] * 2),
        ("Two ", "women", "woman", ["a woman"] * 2),
        ("the two young ", "women", "woman", ["a young woman"] * 2),
        ("three ", "apples", "apple", ["an apple"] * 3),
        ("4 old blue-eyed ", "men", "man", ["an old blue-eyed man"] * 4),
        ("two ", "people", "people", ["a person"] * 2),
        ("two ", "fish", "fish", ["a fish"] * 2),
        ("two ", "unicorns", "unicorn", ["a unicorn"] * 2),
        ("two ", "umbrellas", "umbrella", ["an umbrella"] * 2),
        ("two unimportant ", "hours", "hour", ["an unimportant hour"] * 2),
        ("two ", "hours", "hour", ["an hour"] * 2),
        ("two one-eyed ", "cats", "cat", ["a one-eyed cat"] * 2),
        ("five ", "women", "woman", ["five women"]),
        ("many ", "women", "woman", ["many women"]),
        ("", "women", "woman", ["women"]),
        ("her two ", "sons", "son", ["her two sons"]),
        ("two women's ", "hats", "hat", ["two women's hats"]),
        ("two ", "women", "", ["two women"]),
    ],
)
def test_counted_plurals_are_taken_apart(before, noun, singular, expected):
    assert phrases.take_apart(before, noun, singular) == expected


def test_caption_is_rewritten_around_its_phrases():
    caption = "Two women and a dog, near two red cars."
    chunks = [
        phrases.Chunk(0, 9, ("a woman", "a woman")),
        phrases.Chunk(14, 19, ("a dog",)),
        phrases.Chunk(26, 38, ("a red car", "a red car")),
    ]
    text, found = phrases.rewrite(caption, chunks)
    assert text == "A woman and a woman and a dog, near a red car and a red car."
    assert [p.text for p in found] == ["A woman", "a woman", "a dog", "a red car", "a red car"]
    assert [text[: p.end] for p in found] == [
        "A woman",
        "A woman and a woman",
        "A woman and a woman and a dog",
        "A woman and a woman and a dog, near a red car",
        "A woman and a woman and a dog, near a red car and a red car",
    ]
    assert phrases.rewrite("nothing here", []) == ("nothing here", [])


LEXICON = {
    "two": ("CD", "NUM", "two"), "a": ("DT", "DET", "a"), "the": ("DT", "DET", "the"), "old": ("JJ", "ADJ", "old"),
    "women": ("NNS", "NOUN", "woman"), "people": ("NNS", "NOUN", "people"), "dog": ("NN", "NOUN", "dog"),
    "grass": ("NN", "NOUN", "grass"), "they": ("PRP", "PRON", "they"), "and": ("CC", "CCONJ", "and"),
    "on": ("IN", "ADP", "on"), "are": ("VBP", "AUX", "be"), "sit": ("VBP", "VERB", "sit"),
}  # fmt: skip


@pytest.fixture
def spacy_pipeline(tmp_path_factory):
    """The folder of a spaCy pipeline that looks words up in a table and hangs what precedes a noun on the noun."""
    spacy = needs("spacy", "spacy")
    from spacy.language import Language
    from spacy.tokens import Doc

    @Language.component("conceptloom_table")
    def parse(doc):
        rows = [LEXICON[t.lower_] for t in doc]
        nouns = [i for i, r in enumerate(rows) if r[1] in ("NOUN", "PRON")]
        heads, deps = [], []
        for i, (_, pos, _) in enumerate(rows):
            noun = next((n for n in nouns if n >= i), i)
            inside = pos in ("NUM", "DET", "ADJ") and noun != i
            heads.append(noun if inside else i)
            deps.append("det" if inside else "ROOT")
        tags, kinds, lemmas = (list(column) for column in zip(*rows, strict=True))
        spaces = [bool(t.whitespace_) for t in doc]
        words = [t.text for t in doc]
        return Doc(doc.vocab, words, spaces, tags=tags, pos=kinds, lemmas=lemmas, heads=heads, deps=deps)

    pipeline = spacy.blank("en")
    pipeline.add_pipe("conceptloom_table")
    path = tmp_path_factory.mktemp("spacy")
    pipeline.to_disk(path)
    return path


def test_phrases_of_captions_by_spacy(folder, spacy_pipeline, monkeypatch):
    texts = [
        "Two old women sit on the grass", "a dog and two people", "they sit on the grass", "they sit", "the old dog",
    ]  # fmt: skip
    for image_id, text in zip(folder.ids(), texts, strict=True):
        folder.write_text(image_id, ".caption.txt", text + "\n")
    data.main(["phrases", "--root", str(folder.root), "--model", str(spacy_pipeline), "--batch-size", "2"])
    assert [folder.phrases(i) for i in folder.ids()] == [
        (
            "An old woman and an old woman sit on the grass",
            [Phrase("An old woman", 12), Phrase("an old woman", 29), Phrase("the grass", 46)],
        ),
        ("a dog and a person and a person", [Phrase("a dog", 5), Phrase("a person", 18), Phrase("a person", 31)]),
        ("they sit on the grass", [Phrase("the grass", 21)]),
        ("they sit", []),
        ("the old dog", [Phrase("the old dog", 11)]),
    ]
    before = files_of(folder)
    monkeypatch.setattr(phrases, "_load", None)
    phrases.write_phrases(folder, str(spacy_pipeline))
    assert files_of(folder) == before


def test_spacy_pipeline_must_be_there_and_parse(folder, tmp_path_factory):
    spacy = needs("spacy", "spacy")
    for image_id in folder.ids():
        folder.write_text(image_id, ".caption.txt", "two women")
    with pytest.raises(FileNotFoundError, match="--model: expected .* spaCy pipeline .*, got 'no_such_pipeline'"):
        phrases.write_phrases(folder, "no_such_pipeline")
    blank = tmp_path_factory.mktemp("blank")
    spacy.blank("en").to_disk(blank)
    with pytest.raises(ValueError, match="sets no DEP, POS, TAG, LEMMA"):
        phrases.write_phrases(folder, str(blank))


# --- models of the true classes, tiny and random --------------------------------------------------------------------


def save_tiny_blip2(path):
    """A BLIP-2 with an OPT of two layers and a vocabulary of forty words."""
    transformers = needs("transformers", "transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"word{i}": i + 3 for i in range(37)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    side = {"height": 28, "width": 28}
    processor = transformers.Blip2Processor(transformers.BlipImageProcessor(size=side), tokenizer, num_query_tokens=4)
    width = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**width, "image_size": 28, "patch_size": 14},
        qformer_config={**width, "vocab_size": 41, "encoder_hidden_size": 32},
        text_config=transformers.OPTConfig(
            vocab_size=41, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=32, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        ),
        num_query_tokens=4,
        image_token_index=40,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config)
    for parameter in model.parameters():
        # The library's start makes all pictures alike.
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model.eval(), processor


def save_tiny_mask2former(path):
    """A Mask2Former on a Swin of one layer a stage, made sure of its classes."""
    transformers = needs("transformers", "transformers")
    swin = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=32, encoder_feedforward_dim=32, num_queries=6,
        id2label={0: "person", 1: "dog", 2: "sky"},
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(100)
        model.model.transformer_module.queries_features.weight.mul_(5)
    processor = transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model.eval(), processor


def save_tiny_clip(path):
    """A CLIP of one layer with a tokenizer of letters."""
    transformers = needs("transformers", "transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    entries = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[])
    width = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPConfig(
        text_config={**width, **ends, "vocab_size": 54, "max_position_embeddings": 16},
        vision_config={**width, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    small = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**small), tokenizer)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model.eval(), processor


def save_tiny_sentences(path):
    """A sentence encoder of one layer with mean pooling."""
    package = needs("sentence_transformers", "sentence-transformers")
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    width = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **width))
    bert.save_pretrained(path / "bert")
    tokenizer.save_pretrained(path / "bert")
    encoder = package.SentenceTransformer(str(path / "bert"), device="cpu", local_files_only=True)
    encoder.save(str(path))
    return encoder


def no_model(*_, **__):
    """Stands for a model that must not be loaded."""
    raise AssertionError("a model is loaded though there is nothing to do")


def test_captions_by_blip2(folder, tmp_path_factory, monkeypatch):
    transformers = needs("transformers", "transformers")
    path = tmp_path_factory.mktemp("blip2")
    model, processor = save_tiny_blip2(path)
    data.main(["captions", "--root", str(folder.root), "--model", str(path), "--batch-size", "2", "--device", "cpu"])
    found = [folder.caption(i) for i in folder.ids()]
    for image_id, caption in zip(folder.ids(), found, strict=True):
        pixels = processor(images=folder.image(image_id), return_tensors="pt").pixel_values
        tokens = model.generate(pixels, num_beams=captions.BEAMS, max_new_tokens=captions.WORDS)
        assert caption == processor.decode(tokens[0], skip_special_tokens=True).strip()
    assert all(found)
    assert len(set(found)) > 1

    # A caption that a person wrote stays, one that is missing is made again, and nothing else changes.
    folder.write_text("00000002", ".caption.txt", "my own words")
    folder.path("00000004", ".caption.txt").unlink()
    captions.write_captions(folder, path)
    assert [folder.caption(i) for i in folder.ids()] == [*found[:2], "my own words", *found[3:]]
    before = files_of(folder)
    monkeypatch.setattr(transformers.Blip2ForConditionalGeneration, "from_pretrained", no_model)
    captions.write_captions(folder, path)
    assert files_of(folder) == before


def test_segments_by_mask2former(folder, tmp_path_factory, monkeypatch):
    transformers = needs("transformers", "transformers")
    path = tmp_path_factory.mktemp("mask2former")
    model, processor = save_tiny_mask2former(path)
    data.main(["segments", "--root", str(folder.root), "--model", str(path), "--batch-size", "4", "--device", "cpu"])
    total = 0
    for image_id in folder.ids():
        picture = folder.image(image_id)
        with torch.no_grad():
            # One picture alone: batches of mixed sizes would move the masks.
            out = model(**processor(images=picture, return_tensors="pt"))
        one = processor.post_process_panoptic_segmentation(
            out, label_ids_to_fuse=set(), target_sizes=[(picture.height, picture.width)]
        )[0]
        ids = folder.instance_map(image_id)
        assert np.array_equal(ids, one["segmentation"].clamp(min=0).numpy())
        labels = {s["id"]: model.config.id2label[s["label_id"]] for s in one["segments_info"]}
        found = folder.segments(image_id)
        assert {s.id: s.label for s in found} == labels
        for segment in found:
            x1, y1, x2, y2 = segment.bbox
            inside = ids[y1:y2, x1:x2] == segment.id
            assert inside.sum() == (ids == segment.id).sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        total += len(found)
    assert total >= 5

    before = files_of(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Mask2FormerForUniversalSegmentation, "from_pretrained", no_model)
        segments.write_segments(folder, path)
    assert files_of(folder) == before

    # Of one class only: the others' pixels become 0.
    label = folder.segments(folder.ids()[0])[0].label
    segments.write_segments(folder, path, [label], again=True)
    for image_id in folder.ids():
        kept = folder.segments(image_id)
        assert {s.label for s in kept} <= {label}
        assert set(np.unique(folder.instance_map(image_id))) - {0} == {s.id for s in kept}
    with pytest.raises(ValueError, match=r"--labels: expected classes .* \(dog, person, sky\), got unicorn"):
        segments.write_segments(folder, path, ["person", "unicorn"])


def test_clip_similarity_of_batches_is_that_of_single_pairs(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    model, processor = save_tiny_clip(path)
    rng = np.random.default_rng(2)
    texts = [["a cat", "an elephant with a very long trunk indeed"], ["a dog"]]
    crops = [[rng.integers(0, 256, (n, n, 3), np.uint8) for n in sides] for sides in ((20, 40, 33), (50, 7))]
    found = match.open_clip(path)(texts, crops)
    assert [t.shape for t in found] == [(2, 3), (1, 2)]
    for table, some, pieces in zip(found, texts, crops, strict=True):
        for p, text in enumerate(some):
            for s, piece in enumerate(pieces):
                inputs = processor(text=[text], images=[piece], truncation=True, max_length=16, return_tensors="pt")
                with torch.no_grad():
                    out = model(**inputs)
                assert table[p, s] == pytest.approx(float(out.text_embeds @ out.image_embeds.T), abs=1e-5)
    assert np.abs(found[0]).max() < 1
    assert np.ptp(found[0]) > 1e-3


def test_label_similarity_of_batches_is_that_of_single_pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentences")
    encoder = save_tiny_sentences(path)
    found = match.open_sentences(path)([["a cat", "a dog"], ["a cat"]], [["dog"], ["cat", "dog"]])
    assert [t.shape for t in found] == [(2, 1), (1, 2)]
    unit = {t: encoder.encode(t, normalize_embeddings=True) for t in ("a cat", "a dog", "dog", "cat")}
    assert found[0][:, 0] == pytest.approx([unit["a cat"] @ unit["dog"], unit["a dog"] @ unit["dog"]], abs=1e-5)
    assert found[1][0] == pytest.approx([unit["a cat"] @ unit["cat"], unit["a cat"] @ unit["dog"]], abs=1e-5)


# --- the stage match ------------------------------------------------------------------------------------------------


def test_matches_are_written_in_the_published_format(folder):
    annotate(folder)
    match.write_matches(folder, lambda: fixed(np.full((2, 2), 0.3)), lambda: words_in_common, batch=2)
    content = json.loads(folder.path("00000000", ".json").read_text())
    assert content == {
        "caption": "a cat and a dog",
        "segments": [
            {"id": 7, "bbox": [30, 20, 62, 60], "coco_label": "cat", "end": 5},
            {"id": 3, "bbox": [4, 8, 20, 40], "coco_label": "dog", "end": 15},
        ],
    }
    lists = {name: folder.read_ids(name) for name in ("all", "train", "test")}
    assert lists["all"] == folder.ids()
    assert sorted(lists["train"] + lists["test"]) == folder.ids()
    assert len(lists["test"]) == 1


def test_match_with_models_from_the_command_line(folder, tmp_path_factory):
    annotate(folder)
    clip_path, sentences_path = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("sentences")
    save_tiny_clip(clip_path)
    save_tiny_sentences(sentences_path)
    given = ["--clip", str(clip_path), "--sentences", str(sentences_path), "--threshold", "-1", "--device", "cpu"]
    data.main(["match", "--root", str(folder.root), *given])
    for image_id in folder.ids():
        caption, subjects = folder.matched(image_id)
        assert caption == "a cat and a dog"
        assert {s.end for s in subjects} == {5, 15} and {s.segment.id for s in subjects} == {3, 7}


def test_score_is_clips_times_the_labels_and_never_of_two_negatives():
    segment, said = Segment(1, (0, 0, 8, 8), "z"), [Phrase("x", 1), Phrase("y", 2)]
    one = match.Annotated(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), int), said, [segment])
    assert match.match_pictures([one], fixed([[-0.9], [0.5]]), fixed([[-0.9], [0.3]])) == [[MatchedSubject(segment, 2)]]
    assert match.match_pictures([one], fixed([[-0.9], [0.5]]), fixed([[-0.9], [0.1]])) == [[]]
    assert match.match_pictures([one], fixed([[0.5], [0.5]]), fixed([[-0.9], [-0.3]])) == [[]]


def test_clip_is_shown_the_segment_on_its_mean_color():
    rng = np.random.default_rng(3)
    pixels, ids = rng.integers(0, 256, (20, 30, 3), np.uint8), np.zeros((20, 30), int)
    ids[4:16, 10:13] = 5
    ids[6, 11] = 9
    crop = match.segment_crop(pixels, ids, Segment(5, (10, 4, 13, 16), "x"))
    expected = np.empty((12, 12, 3), np.uint8)
    expected[:] = (123, 117, 104)
    expected[:, 4:7] = pixels[4:16, 10:13]
    expected[2, 5] = (123, 117, 104)
    assert np.array_equal(crop, expected)


def test_useless_pictures_are_skipped_with_their_reason(folder):
    annotate(folder)
    # Two phrases that end together, no phrase, no segment.
    same = {"caption": "a young cat", "phrases": [{"text": "a young cat", "end": 11}, {"text": "cat", "end": 11}]}
    folder.write_json("00000000", ".phrases.json", same)
    folder.write_json("00000001", ".phrases.json", {"caption": "it is", "phrases": []})
    folder.write_json("00000002", ".segments.json", [])
    clip = fixed([[0.3, 0.2], [0.2, 0.3]])
    match.write_matches(folder, lambda: clip, lambda: fixed(np.ones((2, 2))))
    reasons = {i: folder.path(i, ".skipped.txt").read_text() for i in folder.ids()[:3]}
    assert "end at the same character: [11, 11]" in reasons["00000000"]
    assert "None of 0 phrases" in reasons["00000001"]
    assert "one of 0 segments" in reasons["00000002"]
    assert folder.read_ids("all") == folder.ids()[3:]
    # Both kinds of result count as done.
    match.write_matches(folder, no_model, no_model)
    # Made again with a phrase of its own, the reason gives way.
    folder.write_json("00000000", ".phrases.json", json.loads(folder.path("00000004", ".phrases.json").read_text()))
    match.write_matches(folder, lambda: clip, lambda: fixed(np.ones((2, 2))), again=True)
    assert not folder.path("00000000", ".skipped.txt").exists()
    assert folder.read_ids("all") == ["00000000", "00000003", "00000004"]


def test_interrupted_stage_leaves_whole_files_and_goes_on(folder):
    annotate(folder)
    asked = []

    def clip(texts, crops):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(texts))
        return [np.full((2, 2), 0.3)] * len(texts)

    with pytest.raises(KeyboardInterrupt):
        match.write_matches(folder, lambda: clip, lambda: words_in_common, batch=1)
    assert [folder.path(i, ".json").exists() for i in folder.ids()] == [True, True, False, False, False]
    first = files_of(folder)
    assert not any(name.endswith(".part") for name in first)
    # A process that was killed while it wrote leaves a part, which says nothing.
    folder.path("00000002", ".json.part").write_bytes(b'{"capt')
    asked = [0]
    match.write_matches(folder, lambda: fixed(np.full((2, 2), 0.3)), lambda: words_in_common, batch=1)
    after = files_of(folder)
    assert all(folder.matched(i)[0] == "a cat and a dog" for i in folder.ids())
    assert {name: after[name] for name in first} == first
    assert not any(name.endswith(".part") for name in after)
    # The whole again in one go gives the same bytes, and a further run computes nothing.
    match.write_matches(folder, lambda: fixed(np.full((2, 2), 0.3)), lambda: words_in_common, again=True)
    assert files_of(folder) == after
    match.write_matches(folder, no_model, no_model)


def test_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as part:
        part.write_text("new and")
        raise RuntimeError
    assert path.read_text() == "old" and not list(tmp_path.glob("*.part"))


def test_held_out_pictures_stay_held_out_when_others_come(folder):
    first = [f"{i:08d}" for i in range(400)]
    more = [f"{i:08d}" for i in range(800)]

    class Listed(Folder):
        names: list[str] = []

        def ids(self):
            return self.names

        def path(self, image_id, suffix):
            return folder.path("00000000", ".jpg")

    listed = Listed(folder.root)
    held_out = []
    for listed.names in (first, more):
        match.write_lists(listed, 0.05)
        held_out.append(set(listed.read_ids("test")))
        assert 0.03 < len(held_out[-1]) / len(listed.names) < 0.07
        assert set(listed.read_ids("train")) == set(listed.names) - held_out[-1]
    assert held_out[1] & set(first) == held_out[0]


# --- Shapeland: the matching against truth, and the format ----------------------------------------------------------


@pytest.fixture(scope="module")
def shapeland(tmp_path_factory):
    """240 drawn pictures in the published format."""
    needs("diffusers", "diffusers")
    from conceptloom.training.data import shapeland

    root = tmp_path_factory.mktemp("shapeland")
    shapeland.shapeland_folder(root, 240, seed=11)
    return Folder(root)


def test_shapeland_in_the_published_format_tells_the_truth(shapeland):
    pairs = 0
    for i, image_id in enumerate(shapeland.ids()):
        scene = world.random_scene(np.random.default_rng((11, i)))
        picture = world.render(scene)
        caption, subjects = shapeland.matched(image_id)
        ids = shapeland.instance_map(image_id)
        assert [s.end for s in subjects] == sorted({s.end for s in subjects})
        assert sorted(s.segment.id for s in subjects) == list(range(1, len(scene.things) + 1))
        said, _ = world.parse_caption(caption)
        assert all(m.count == 1 for m in said)
        for mention, subject in zip(said, subjects, strict=True):
            thing = scene.things[subject.segment.id - 1]
            assert caption[: subject.end].split()[-1] == subject.segment.label == world.NOUNS[thing.noun]
            assert truly_said(mention, thing)
            nearest = picture.masks.argmax(0) == subject.segment.id - 1
            assert np.array_equal(ids == subject.segment.id, nearest & (picture.masks.sum(0) > 0.5))
        pixels = np.asarray(shapeland.image(image_id)).astype(float)
        assert np.abs(pixels - picture.image * 255).mean() < 2
        pairs += len({t.noun for t in scene.things}) < len(scene.things)
    assert pairs > 20


def test_captions_of_shapeland_may_leave_out_the_looks(shapeland, tmp_path):
    data.main(["shapeland", "--root", str(tmp_path), "--count", "20", "--seed", "11", "--without-looks"])
    bare = Folder(tmp_path)
    for image_id in bare.ids():
        caption, subjects = bare.matched(image_id)
        full, named = shapeland.matched(image_id)
        assert [s.segment for s in subjects] == [s.segment for s in named]
        said, background = world.parse_caption(caption)
        assert background == world.parse_caption(full)[1]
        looks = [(m.noun, m.color, m.second, m.pattern) for m in said]
        assert looks == [(world.NOUNS.index(s.segment.label), None, None, None) for s in subjects]
        assert all(caption[: s.end].split()[-1] == s.segment.label for s in subjects)


def truly_said(mention: world.Mention, thing: world.Thing) -> bool:
    """Whether all that a mention says is so of a thing."""
    identity = thing.identity
    said = (mention.noun, mention.color, mention.second, mention.pattern)
    true = (thing.noun, identity.color, identity.second, identity.pattern)
    return all(a in (None, b) for a, b in zip(said, true, strict=True))


@pytest.fixture(scope="module")
def towers():
    """Shapeland's CLIP towers, asked once for each batch."""
    from conceptloom.training.data import shapeland

    similarity, known = shapeland.open_towers(), {}

    def remembered(texts, crops):
        key = (json.dumps(texts), b"".join(c.tobytes() for some in crops for c in some))
        if key not in known:
            known[key] = similarity(texts, crops)
        return known[key]

    return remembered


MATCHED = 120
"""Pictures that are matched, of those of the folder."""


def matched_rightly(truth: Folder, clip_similarity, label_similarity, root) -> float:
    """The share of things that are matched with a phrase of their own.

    Things of one noun share one appearance and one description, so that any of their phrases is true of each: a match
    is right if its phrase names the thing's noun and says nothing untrue of it. No two things get one phrase.
    """
    folder = Folder(root)
    for image_id in truth.ids()[:MATCHED]:
        folder.path(image_id, "").parent.mkdir(exist_ok=True)
        for suffix in (".jpg", ".npy", ".phrases.json", ".segments.json"):
            folder.path(image_id, suffix).write_bytes(truth.path(image_id, suffix).read_bytes())
    match.write_matches(folder, lambda: clip_similarity, lambda: label_similarity, batch=64)
    right = things = 0
    for i, image_id in enumerate(truth.ids()[:MATCHED]):
        scene = world.random_scene(np.random.default_rng((11, i)))
        things += len(scene.things)
        if not folder.path(image_id, ".json").exists():
            continue
        by_end = {p.end: p.text for p in folder.phrases(image_id)[1]}
        for subject in folder.matched(image_id)[1]:
            phrase, thing = by_end[subject.end], scene.things[subject.segment.id - 1]
            if "background" not in phrase:
                right += truly_said(world.parse_caption(phrase)[0][0], thing)
    return right / things


def test_matching_finds_the_phrases_of_drawn_things(shapeland, towers, tmp_path):
    """With true segments, the shipped towers and the nouns as labels."""
    from conceptloom.training.data.shapeland import word_overlap

    share = matched_rightly(shapeland, towers, word_overlap, tmp_path)
    print(f"things matched with their own phrase: {share:.4f}")
    assert share >= 0.95


def test_matching_needs_both_of_its_scores(shapeland, towers, tmp_path):
    """Labels that tell only two classes of nouns apart, as COCO's know no woman from a man, and pictures that tell
    more: together they find more than either alone."""

    def two_classes(texts, labels):
        def kind(text):
            return next((world.NOUNS.index(w) // 4 for w in text.split() if w in world.NOUNS), -1)

        pairs = zip(texts, labels, strict=True)
        return [np.array([[float(kind(t) == kind(n)) for n in some] for t in row]) for row, some in pairs]

    def no_help(texts, others):
        return [np.ones((len(t), len(o))) for t, o in zip(texts, others, strict=True)]

    share = {}
    for name, clip, labels in (
        ("both", towers, two_classes), ("pictures", towers, no_help), ("labels", no_help, two_classes),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        share[name] = matched_rightly(shapeland, clip, labels, tmp_path / name)
    print("things matched with their own phrase, labels of two classes:", share)
    assert share["both"] >= 0.9
    assert share["pictures"] >= 0.85
    assert share["both"] > max(share["pictures"], share["labels"]) + 0.02


def test_shapeland_from_the_command_line_goes_on_where_it_stopped(tmp_path):
    needs("diffusers", "diffusers")
    data.main(["shapeland", "--root", str(tmp_path / "new"), "--count", "3", "--seed", "5"])
    folder = Folder(tmp_path / "new")
    first = files_of(folder)
    folder.path("00000001", ".json").unlink()
    data.main(["shapeland", "--root", str(tmp_path / "new"), "--count", "4", "--seed", "5"])
    after = files_of(folder)
    assert len(folder.ids()) == 4
    assert {n: after[n] for n in first if not n.startswith("image_ids")} == {
        n: c for n, c in first.items() if not n.startswith("image_ids")
    }


# --- the reader -----------------------------------------------------------------------------------------------------


def test_items_of_drawn_pictures_are_exact(shapeland):
    read = dataset.SubjectPictures(shapeland.root, "all", 64, 32, uncondition=0, object_appear=1, augment=False)
    assert len(read) == 240
    for row in range(0, 240, 7):
        item = read[row]
        caption, subjects = shapeland.matched(item["id"])
        pixels = torch.from_numpy(np.array(shapeland.image(item["id"]))).permute(2, 0, 1)
        ids = torch.from_numpy(shapeland.instance_map(item["id"]).astype(np.int64))
        assert item["caption"] == caption
        assert torch.equal(item["picture"], pixels / 127.5 - 1)
        assert torch.equal(item["instance_map"], ids)
        count = len(subjects)
        assert item["present"].tolist() == [True] * count + [False] * (4 - count)
        assert item["ends"].tolist() == [s.end for s in subjects] + [-1] * (4 - count)
        for i, subject in enumerate(subjects):
            assert torch.equal(item["masks"][i], (ids == subject.segment.id).float())
        assert item["objects"].shape == (4, 3, 32, 32) and item["objects"][count:].abs().sum() == 0
        assert item["objects"].min() >= 0 and item["objects"].max() <= 1
        assert item["masks"][count:].sum() == 0


def test_subject_stands_in_noise_and_keeps_its_pixels(shapeland):
    image_id = next(i for i in shapeland.ids() if len(shapeland.matched(i)[1]) == 3)
    picture = torch.from_numpy(np.array(shapeland.image(image_id))).permute(2, 0, 1)
    ids = torch.from_numpy(shapeland.instance_map(image_id).astype(np.int64))
    noise = []
    for subject in shapeland.matched(image_id)[1]:
        x1, y1, x2, y2 = subject.segment.bbox
        crop = dataset.subject_crop(picture, ids, subject.segment, torch.Generator().manual_seed(4))
        inside = ids[y1:y2, x1:x2] == subject.segment.id
        assert crop.shape == (3, y2 - y1, x2 - x1)
        assert torch.equal(crop[:, inside], picture[:, y1:y2, x1:x2][:, inside])
        noise.append(crop[:, ~inside].flatten().float())
        again = dataset.subject_crop(picture, ids, subject.segment, torch.Generator().manual_seed(4))
        assert torch.equal(crop, again)
    noise = torch.cat(noise)
    assert noise.numel() > 400
    assert abs(noise.mean() - 127.5) < 10 and abs(noise.std() - 255 / 12**0.5) < 8


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("height", "width"), [(90, 61), (61, 90), (50, 50), (33, 200), (201, 40)])
def test_map_follows_its_picture_and_invents_no_ids(height, width, mirrored):
    """Each segment has a color of its own; wherever the small picture shows one unmixed, the map has its segment."""
    names = torch.tensor([0, 7, 200, 100, 2**31 + 5])
    tones = torch.tensor([[0, 0, 255], [255, 0, 0], [0, 255, 0], [255, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    ys, xs = torch.meshgrid(torch.arange(height) // 10, torch.arange(width) // 9, indexing="ij")
    which = (ys * 2 + xs * 3) % 5
    picture, ids = dataset.target_view(tones[which].permute(2, 0, 1), names[which], 48, mirrored)
    assert picture.shape == (3, 48, 48) and ids.shape == (48, 48) and ids.dtype == torch.int64
    assert picture.min() >= -1 and picture.max() <= 1
    bars = {dataset.NOWHERE} if height > width else set()
    assert set(ids.unique().tolist()) <= set(names.tolist()) | bars
    seen = ((picture + 1) * 127.5).round()
    checked = 0
    for name, tone in zip(names, tones, strict=True):
        pure = (seen == tone[:, None, None]).all(0)
        assert (ids[pure] == name).all()
        checked += int(pure.sum())
    black = (seen == 0).all(0)
    assert bool(black.any()) == (height > width)
    assert (ids[black] == dataset.NOWHERE).all()
    assert checked > 40
    if height > width:
        # The whole picture, squeezed: bars of equal width on both sides.
        columns = (ids != dataset.NOWHERE).any(0)
        assert abs(int(columns.sum()) - 48 * width / height) <= 1
        assert abs(int(columns.nonzero()[0, 0]) - (47 - int(columns.nonzero()[-1, 0]))) <= 1


@pytest.mark.parametrize(("height", "width"), [(61, 90), (61, 91), (47, 100), (50, 50), (33, 200)])
def test_a_wide_picture_is_what_torchvision_makes_of_its_shorter_side(height, width):
    from torchvision.transforms import v2

    picture = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = v2.Compose([v2.Resize(48, antialias=True), v2.CenterCrop(48)])(picture)
    drawn, _ = dataset.target_view(picture, torch.zeros(height, width, dtype=torch.int64), 48, False)
    assert torch.equal(((drawn + 1) * 127.5).round().to(torch.uint8), expected)


def test_mirroring_turns_picture_and_map_together():
    rng = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (3, 40, 60), generator=rng, dtype=torch.uint8)
    ids = torch.randint(0, 9, (40, 60), generator=rng)
    plain, mirrored = (dataset.target_view(picture, ids, 32, m) for m in (False, True))
    assert torch.equal(plain[0].flip(-1), mirrored[0]) and torch.equal(plain[1].flip(-1), mirrored[1])


def script_chances(monkeypatch, *taken: int) -> list[float]:
    """Decide the augmentations by hand: those of the numbers `taken` happen. Returns the probabilities asked for."""
    asked = []

    def chance(probability, generator):
        asked.append(probability)
        return len(asked) - 1 in taken

    monkeypatch.setattr(dataset, "_chance", chance)
    return asked


def test_augmentations_one_by_one(monkeypatch):
    crop = torch.randint(0, 256, (3, 70, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    plain = dataset.plain_object(crop, 48)

    def augmented(*taken):
        with pytest.MonkeyPatch.context() as patch:
            asked = script_chances(patch, *taken)
            image = dataset.augment_object(crop, 48, torch.Generator().manual_seed(2))
        assert asked == [0.5, 0.75, 0.5, 0.5, 0.1, 0.5, 0.5]
        return image

    assert torch.equal(augmented(), plain)
    assert torch.equal(augmented(0), dataset.plain_object(crop[:, :40], 48))
    assert torch.equal(augmented(5), plain.flip(-1))
    gray = augmented(4)
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[1], gray[2])
    for one in (1, 2, 3, 6):
        changed = augmented(one)
        assert changed.shape == plain.shape and changed.min() >= 0 and changed.max() <= 1
        assert (changed - plain).abs().mean() > 0.005


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dataset._bend, v2.ElasticTransform()),
        (dataset._jitter_colors, v2.ColorJitter(0.5, 0.5, 0.5, 0.5)),
    ],
)
def test_random_changes_are_torchvisions_under_the_same_dice(ours, theirs):
    image = torch.randint(0, 256, (3, 64, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for seed in range(8):
        torch.manual_seed(seed)
        expected = theirs(image)
        found = ours(image, torch.Generator().manual_seed(seed))
        # Factors that differ in the last bit may round a level differently, at each of four steps.
        off = (found.int() - expected.int()).abs()
        assert off.max() <= 4 and off.float().mean() < 0.01


def test_wide_crop_loses_nothing_at_the_top(monkeypatch):
    crop = torch.randint(0, 256, (3, 30, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    script_chances(monkeypatch, 0)
    assert torch.equal(dataset.augment_object(crop, 64, torch.Generator()), dataset.plain_object(crop, 64))
    square = dataset.plain_object(crop, 64)
    assert square[:, :17].sum() == 0 and square[:, 47:].sum() == 0
    assert torch.allclose(square[:, 17:47], crop / 255, atol=1e-6)


def test_subjects_are_dropped_drawn_and_ordered():
    subjects = [MatchedSubject(Segment(i, (0, 0, 1, 1), "x"), 90 - 10 * i) for i in range(7)]
    generator = torch.Generator().manual_seed(0)
    chosen = [dataset.choose_subjects(subjects, 1.0, generator) for _ in range(700)]
    assert all(len(c) == 4 and [s.end for s in c] == sorted(s.end for s in c) for c in chosen)
    times = np.bincount([s.segment.id for c in chosen for s in c], minlength=7)
    assert (np.abs(times - 400) < 60).all(), "each is drawn as often as any other"
    kept = sum(len(dataset.choose_subjects(subjects[:3], 0.9, generator)) for _ in range(2000)) / 6000
    assert abs(kept - 0.9) < 0.02
    assert dataset.choose_subjects(subjects, 0.0, generator) == []


def test_items_are_unconditional_at_their_rate_and_of_the_chosen_classes(shapeland):
    read = dataset.SubjectPictures(shapeland.root, "all", 16, 32, uncondition=0.3, object_appear=1, augment=False)
    empty = 0
    for row in range(240):
        item = read[row]
        empty += item["caption"] == ""
        assert bool(item["present"].any()) == (item["caption"] != "")
    assert 0.2 < empty / 240 < 0.4
    only = dataset.SubjectPictures(
        shapeland.root, "all", 16, 32, object_types=["fish", "star"], uncondition=0, object_appear=1, augment=False
    )
    found = 0
    for row in range(0, 240, 5):
        item = only[row]
        nouns = [item["caption"][:end].split()[-1] for end in item["ends"].tolist() if end >= 0]
        assert set(nouns) <= {"fish", "star"}
        assert len(nouns) == sum(s.segment.label in ("fish", "star") for s in shapeland.matched(item["id"])[1])
        found += len(nouns)
    assert found > 5


def equal_items(a: dict, b: dict) -> bool:
    """Whether two items or batches hold the same."""
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_item_depends_on_seed_epoch_and_row_alone(shapeland):
    def read(seed):
        return dataset.SubjectPictures(shapeland.root, "all", 16, 32, uncondition=0, seed=seed)

    state = torch.get_rng_state()
    item = read(0)[3, 2]
    assert torch.equal(torch.get_rng_state(), state), "the process's own dice are left alone"
    other = read(0)
    assert other[5, 2]["id"] != item["id"]
    assert equal_items(other[3, 2], item)
    assert not equal_items(other[3, 1], item)
    assert not equal_items(read(1)[3, 2], item)
    assert equal_items(other[3], other[3, 0])


def test_resumed_run_sees_the_same_batches(shapeland):
    read = dataset.SubjectPictures(shapeland.root, "test", 16, 32)
    count = len(read)
    assert count >= 1
    whole = list(dataset.EpochBatches(7, 3, 12, seed=1))
    assert list(dataset.EpochBatches(7, 3, 12, start=5, seed=1)) == whole[5:]
    keys = sum(whole, [])
    for epoch in range(5):
        assert sorted(keys[7 * epoch : 7 * epoch + 7]) == [(row, epoch) for row in range(7)]
    assert [r for r, _ in keys[:7]] != [r for r, _ in keys[7:14]]
    loaded = [
        list(torch.utils.data.DataLoader(read, batch_sampler=dataset.EpochBatches(count, 2, 3, start)))
        for start in (0, 2)
    ]
    assert [len(batches) for batches in loaded] == [3, 1]
    assert equal_items(loaded[0][2], loaded[1][0])
    assert loaded[0][0]["objects"].shape == (2, 4, 3, 32, 32)


# --- what is given wrongly ------------------------------------------------------------------------------------------


def test_pictures_are_collected_upright_and_once(tmp_path):
    source = tmp_path / "mine"
    (source / "deep").mkdir(parents=True)
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    Image.fromarray(pixels).save(source / "a.jpg")
    Image.fromarray(pixels).convert("RGBA").save(source / "deep" / "b.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(source / "c.jpg", exif=turned)
    data.main(["images", "--root", str(tmp_path / "root"), "--from", str(source)])
    folder = Folder(tmp_path / "root")
    assert folder.ids() == ["00000000", "00000001", "00000002"]
    assert folder.path("00000000", ".jpg").read_bytes() == (source / "a.jpg").read_bytes()
    assert [folder.size(i) for i in folder.ids()] == [(30, 20), (20, 30), (30, 20)]
    upright = np.asarray(folder.image("00000001"))
    assert upright[:12].mean() > 250 and upright[18:].mean() < 5
    before = files_of(folder)
    images.collect_images(folder.root, source)
    assert files_of(folder) == before
    # One that an interrupted call had not listed yet is written again.
    folder.path("00000003", ".jpg").write_bytes(b"half")
    Image.fromarray(pixels).save(source / "0.png")
    images.collect_images(folder.root, source)
    assert folder.size("00000003") == (30, 20)
    assert "00000003\t" in (folder.root / images.SOURCES).read_text().splitlines()[3]
    assert {n: c for n, c in files_of(folder).items() if n in before and n != images.SOURCES} == {
        n: c for n, c in before.items() if n != images.SOURCES
    }
    # And one that is another stage's stays.
    folder.path("00000004", ".jpg").write_bytes(b"another's")
    folder.path("00000004", ".caption.txt").write_text("a star")
    Image.fromarray(pixels).save(source / "1.png")
    images.collect_images(folder.root, source)
    assert folder.path("00000004", ".jpg").read_bytes() == b"another's" and folder.size("00000005") == (30, 20)


def test_folders_that_do_not_fit_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="data: expected a folder with .*, got .*nowhere"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="data: expected pictures at .*, got none in .*void"):
        (tmp_path / "void").mkdir()
        Folder(tmp_path / "void").ids()
    with pytest.raises(FileNotFoundError, match="--from: expected a folder with pictures, got .*nowhere"):
        images.collect_images(tmp_path, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"<id>\.caption\.txt .*, got none for 5 of 5 .* the stage 'captions'"):
        phrases.write_phrases(folder, "en_core_web_sm")
    with pytest.raises(FileNotFoundError, match=r"expected <id>\.phrases\.json .* the stage 'phrases'"):
        match.write_matches(folder, no_model, no_model)
    with pytest.raises(FileNotFoundError, match="--model: expected a folder with a saved BLIP-2 model"):
        captions.write_captions(folder, tmp_path / "void")
    with pytest.raises(FileNotFoundError, match="--model: expected a folder with a saved Mask2Former model"):
        segments.write_segments(folder, tmp_path / "void")
    with pytest.raises(FileNotFoundError, match="--clip: expected a folder with a saved CLIP model"):
        match.open_clip(tmp_path / "void")
    with pytest.raises(FileNotFoundError, match="data: expected a list image_ids_train.txt, got none in"):
        dataset.SubjectPictures(folder.root)
    folder.write_ids("train", folder.ids())
    with pytest.raises(FileNotFoundError, match=r"data: expected <id>\.json .*, got none for 5 of 5"):
        dataset.SubjectPictures(folder.root)
    folder.write_ids("train", [])
    with pytest.raises(ValueError, match="image_ids_train.txt: expected at least one picture's id, got an empty list"):
        dataset.SubjectPictures(folder.root)
    put_picture(folder, "00000009", np.zeros((8, 8, 3), np.uint8))
    folder.path("00000009", ".jpg").rename(folder.root / "00000" / "12345678.jpg")
    with pytest.raises(ValueError, match="expected the picture 12345678.jpg in the folder '12345', got it in '00000'"):
        folder.ids()


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("spacy", lambda folder: phrases.write_phrases(folder, "en_core_web_sm")),
        ("sentence-transformers", lambda folder: match.open_sentences(folder.root)),
    ],
)
def test_missing_packages_are_named(folder, monkeypatch, package, call):
    for image_id in folder.ids():
        folder.write_text(image_id, ".caption.txt", "a cat")
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        call(folder)


@pytest.mark.parametrize(
    ("suffix", "content", "error"),
    [
        (".phrases.json", {"caption": "a cat"}, "expected a file of the form"),
        (
            ".phrases.json",
            {"caption": "a cat", "phrases": [{"text": "a cat", "end": 4}]},
            "'a cat' to end at character 4",
        ),
        (
            ".phrases.json",
            {"caption": "a cat", "phrases": [{"text": "a cat", "end": 9}]},
            "'a cat' to end at character 9",
        ),
        (".phrases.json", [1], "expected a file of the form"),
        (".segments.json", [{"id": 1, "bbox": [0, 0, 5], "coco_label": "x"}], "expected a file of the form"),
        (".segments.json", [{"id": 1, "bbox": [0, 0, 65, 5], "coco_label": "x"}], "within the picture's 64x64"),
        (".segments.json", [{"id": 1, "bbox": [9, 0, 5, 5], "coco_label": "x"}], "within the picture's 64x64"),
        (
            ".segments.json",
            [{"id": 1, "bbox": [0, 0, 5, 5], "coco_label": "x"}] * 2,
            "segments with different ids",
        ),
        (".npy", np.zeros((64, 63), int), "one whole number for each pixel"),
        (".npy", np.zeros((64, 64)), "one whole number for each pixel"),
        (".npy", np.array([{}]), "allow_pickle|Object arrays"),
    ],
)
def test_files_of_another_form_are_named(folder, suffix, content, error):
    annotate(folder)
    path = folder.path("00000000", suffix)
    if suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    else:
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=error):
        match.write_matches(folder, lambda: fixed(np.ones((2, 2))), lambda: fixed(np.ones((2, 2))))
    assert not folder.path("00000000", ".json").exists()


def test_impossible_options_are_named(shapeland):
    for options, error in (
        ({"uncondition": 1.5}, "uncondition: expected a share from 0 to 1, got 1.5"),
        ({"object_appear": -0.1}, "object_appear: expected a share from 0 to 1, got -0.1"),
        ({"object_types": "person"}, "object_types: expected a list of class names, got the text 'person'"),
        ({"object_resolution": 16}, "object_resolution: expected at least 32 pixels, got 16"),
    ):
        with pytest.raises(ValueError, match=error):
            dataset.SubjectPictures(shapeland.root, **options)


def test_each_thing_is_drawn_in_its_own_folder(tmp_path):
    from conceptloom.training.data import things

    things.things_folder(tmp_path, 3, 2, seed=5)
    again = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*.*"))}
    assert len(again) == 3 * 2 * 2
    (tmp_path / "000001" / "1.png").unlink()
    things.things_folder(tmp_path, 3, 2, seed=5)
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*.*"))} == again
    for text in tmp_path.rglob("*.txt"):
        assert re.fullmatch(r"a \{\} on a \w+ background\n", text.read_text())

    # The same colors in both pictures of a thing, and others in those of another.
    def colors(thing):
        found = []
        for number in range(2):
            with Image.open(tmp_path / thing / f"{number}.png") as opened:
                pixels = np.asarray(opened.convert("RGB")).reshape(-1, 3) // 32
            values, counts = np.unique(pixels, axis=0, return_counts=True)
            found.append({tuple(value) for value, count in zip(values, counts, strict=True) if count > 40})
        return found[0] & found[1]

    shared = [colors(f"{thing:06d}") for thing in range(3)]
    assert all(shared) and not shared[0] & shared[1] & shared[2]
