"""The nodes: what they say about bad input before anything is computed (spec: table 3.2), and attention shares."""

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def nodes(toy):
    from conceptloom.nodes import freecustom, subjects

    return {
        node.GET_SCHEMA().node_id.removeprefix("ConceptLoom"): node for node in (*freecustom.NODES, *subjects.NODES)
    }


def defaults(node):
    """Every widget's default, as the host hands it over."""
    inputs = node.GET_SCHEMA().inputs
    values = {i.id: i.default if i.default is not None else "" for i in inputs if hasattr(i, "default")}
    return values | {i.id: {i.id: i.options[0].key} for i in inputs if hasattr(i, "options") and i.id not in values}


@pytest.fixture
def reference(nodes):
    def make(**changes):
        node = nodes["ReferenceSubject"]
        inputs = {**defaults(node), "image": torch.rand(1, 64, 64, 3), "noun": "dog", **changes}
        return node.execute(**inputs)[0]

    return make


@pytest.fixture
def patch(nodes, toy, reference):
    def make(**changes):
        node = nodes["MultiReferenceSelfAttention"]
        inputs = {**defaults(node), "model": toy.model, "clip": toy.clip, "vae": toy.vae, **changes}
        inputs.setdefault("subjects", {"subject0": reference()})
        inputs.pop("control_after_generate", None)
        return node.execute(**inputs)[0]

    return make


BAD_SUBJECTS = [
    ({"image": torch.rand(3, 64, 64, 3)}, "image: expected one picture, got a batch of 3"),
    ({"image": torch.full((1, 64, 64, 3), float("nan"))}, "image: expected finite values"),
    ({"noun": " "}, "noun: expected a word"),
    ({"weight": -0.5}, "weight: expected a number from 0 (off) to 10, got -0.5"),
    ({"mask": torch.ones(2, 64, 64)}, "mask: expected one mask (height, width), got (2, 64, 64)"),
    ({"mask": torch.ones(1, 64, 96)}, "mask: expected the shape of the picture (64x64), got 96x64"),
    ({"mask": torch.zeros(1, 64, 64)}, "mask: expected white on the subject, got an empty mask (all black): paint"),
    ({"mask": torch.zeros(1, 64, 64), "image": torch.rand(1, 64, 96, 3)}, "mask: expected white on the subject"),
    ({"target_mask": torch.ones(2, 8, 8)}, "target_mask: expected one mask"),
    ({"target_mask": torch.zeros(1, 8, 8)}, "target_mask: expected white on the subject's place in the new picture"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD_SUBJECTS)
def test_bad_subjects(reference, changes, sentence):
    with pytest.raises(ValueError) as caught:
        reference(**changes)
    assert str(caught.value).startswith("Reference Subject: " + sentence)


def custom(numbers):
    return {"blocks": {"blocks": "custom list", "numbers": numbers}}


def soft_subject():
    from conceptloom.subjects.subject import Subject

    return Subject(torch.rand(64, 64, 3), "dog", torch.full((64, 64), 0.3))


class BadVAE:
    latent_channels = 16


class NotAUNet(torch.nn.Module):
    pass


BAD_SETTINGS = [
    ({"vae": BadVAE()}, "vae: expected one with 4 latent channels for this model, got 16"),
    ({"vae": None}, "vae: expected the one of the model's checkpoint"),
    ({"clip": None}, "clip: expected the one of the model's checkpoint"),
    ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent: expected at most end_percent (0.2), got 0.8"),
    ({"formula": "sum"}, "formula: expected one of official, paper, paper_drop, got 'sum'"),
    (custom("ten"), 'blocks: expected numbers such as "10-15" or "3, 7-9", got \'ten\''),
    (custom(""), 'blocks: expected numbers such as "10-15"'),
    (custom("15-10"), "blocks: expected rising ranges, got '15-10'"),
    (custom("10-16"), "blocks: expected numbers from 0 to 15 for this model, got 16"),
    ({"subjects": {}}, "subjects: expected at least one, got none"),
    (
        {"subjects": {"subject0": soft_subject()}},
        'mask_threshold: expected at most 0.3, the largest value in the mask of "dog", got 0.5',
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD_SETTINGS)
def test_bad_settings(patch, toy, changes, sentence):
    toy.rows.clear()
    toy.vae.encoded.clear()
    with pytest.raises(ValueError) as caught:
        patch(**changes)
    assert str(caught.value).startswith("Multi-Reference Self-Attention (FreeCustom): " + sentence)
    assert "\n" not in str(caught.value)
    assert not toy.rows and not toy.vae.encoded


def test_other_families_are_refused(patch):
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=NotAUNet()))
    with pytest.raises(
        ValueError, match="model: expected one of the families SD 1.x, SD 2.x, SDXL and Shapeland, got NotAUNet"
    ):
        patch(model=model)


def test_latents_that_are_not_finite_name_their_reference(toy, patch, reference, monkeypatch):
    model = patch(subjects={"subject0": reference(noun="hat")})
    monkeypatch.setattr(toy.vae, "encode", lambda pixels: torch.full((len(pixels), 4, 16, 16), float("nan")))
    with pytest.raises(ValueError, match='vae: expected finite latents, got NaN or infinity for the reference "hat"'):
        toy.sample(model)


def test_references_that_drown_the_picture_are_said(patch, reference, toy, caplog):
    with caplog.at_level(logging.WARNING):
        toy.sample(patch(subjects={f"subject{i}": reference(weight=2.0) for i in range(2)}))
        assert not caplog.text
        toy.sample(patch(subjects={f"subject{i}": reference() for i in range(3)}))
        assert "outweigh the picture 60 to 1" in caplog.text


@pytest.mark.parametrize("mask", [torch.ones(1, 64, 64, 3), torch.full((1, 64, 64), 254 / 255), torch.ones(1, 32, 32)])
def test_color_soft_and_small_masks_are_taken(patch, reference, toy, mask):
    picture = toy.sample(patch(subjects={"subject0": reference(mask=mask)}))
    assert not torch.equal(picture, toy.sample())


def test_widgets_have_the_published_defaults(patch, toy, reference):
    from conceptloom.host.freecustom.attention import KEY
    from conceptloom.host.freecustom.job import MrsaSettings

    system = patch().get_attachment(KEY)
    assert system.settings == MrsaSettings()
    assert [site.index for site in system.sites] == list(range(10, 16))
    assert system.encoded[0].subject.weight == 3.0 and system.encoded[0].subject.prompt == "a dog"


def test_subjects_come_in_the_order_of_their_sockets(patch, reference):
    from conceptloom.host.freecustom.attention import KEY

    named = {f"subject{i}": reference(noun=f"n{i}") for i in (10, 2, 0)}
    pair = (reference(noun="a"), reference(noun="b"))
    system = patch(subjects={**named, "subject5": pair, "subject6": None}).get_attachment(KEY)
    assert [e.subject.noun for e in system.encoded] == ["n0", "n2", "a", "b", "n10"]


def test_executes_take_exactly_their_inputs(nodes):
    for node in nodes.values():
        takes = inspect.signature(node.execute).parameters
        names = {i.id for i in node.GET_SCHEMA().inputs}
        assert names <= set(takes) or any(p.kind is p.VAR_KEYWORD for p in takes.values())
        for i in node.GET_SCHEMA().inputs:
            assert not i.optional or takes[i.id].default is None


class TestCollage:
    @pytest.fixture
    def collage(self, nodes, reference):
        def make(**changes):
            node = nodes["ConceptCollage"]
            subjects = {
                f"subject{i}": reference(noun=noun, image=torch.full((1, 64, 64, 3), 0.5 + i / 4))
                for i, noun in enumerate(("hat", "owl"))
            }
            return node.execute(
                **{**defaults(node), "context": torch.zeros(1, 80, 160, 3), "subjects": subjects, **changes}
            )

        return make

    def test_its_subjects_share_picture_prompt_and_reference_pass(self, collage, patch, toy):
        image, masks, subject = collage()
        assert image.shape == (1, 80, 160, 3) and masks.shape == (2, 80, 160) and len(subject) == 2
        assert [s.prompt for s in subject] == ["a hat and an owl"] * 2
        toy.sample(patch(subjects={"subject0": subject}))
        assert toy.rows == [1, 2] * toy.steps

    def test_boxes_and_masks_place(self, collage):
        boxes = [{"x": 0, "y": 0, "width": 40, "height": 40}, {"x": 100, "y": 20, "width": 40, "height": 40}]
        masks = torch.zeros(2, 40, 80)
        masks[0, :20, :20], masks[1, 10:30, 50:70] = 1, 1
        by_box, by_frame, by_mask = (collage(placement=p)[1] for p in (boxes, [boxes], masks))
        assert torch.equal(by_box, by_frame) and torch.equal(by_box, by_mask)
        assert by_box[0, 20, 20] == 1 and by_box[1, 40, 120] == 1 and by_box[:, 70, 70].sum() == 0

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"subjects": {}}, "subjects: expected at least one, got none"),
            (
                {"placement": [{"x": x, "y": 0, "width": 4, "height": 4} for x in (0, 900)]},
                'placement: expected a place where "owl" is seen',
            ),
            ({"placement": {"x": 0, "y": 0, "width": 4, "height": 4}}, "boxes: expected one per subject"),
            ({"placement": torch.zeros(2, 8, 8)}, "mask: expected at least one pixel"),
            (
                {"placement": torch.ones(2, 8, 8)},
                "placement: mask 1: expected the shape of the picture (160x80), got 8x8, which would be stretched",
            ),
            ({"context": torch.zeros(2, 8, 8, 3)}, "context: expected one picture, got a batch of 2"),
        ],
    )
    def test_bad_input(self, collage, changes, sentence):
        with pytest.raises(ValueError) as caught:
            collage(**changes)
        assert str(caught.value).startswith("Concept Collage: " + sentence)


class TestAttentionShare:
    @pytest.fixture
    def recorded(self, nodes, patch, reference):
        def make(model=None, **inputs):
            half = torch.zeros(1, 64, 64)
            half[:, :, :32] = 1
            subjects = {
                "subject0": reference(noun="dog", target_mask=half),
                "subject1": reference(noun="hat", mask=half),
            }
            node = nodes["RecordAttentionShare"]
            model = patch(subjects=subjects) if model is None else model
            return node.execute(**{**defaults(node), "model": model, **inputs})

        return make

    @pytest.fixture
    def view(self, nodes):
        node = nodes["AttentionShare"]

        def show(record, samples, **changes):
            image = torch.rand(len(samples), 128, 128, 3)
            return node.execute(
                **{**defaults(node), "record": record, "latent": {"samples": samples}, "image": image, **changes}
            )

        return show

    def test_recording_does_not_change_the_picture(self, recorded, patch, toy):
        model = patch()
        before = toy.sample(model)
        with_record, _ = recorded(model)
        assert torch.equal(toy.sample(with_record), before)
        assert torch.equal(toy.sample(model), before)

    def test_shares_sum_to_one_and_keep_to_target_masks(self, recorded, view, toy):
        model, record = recorded()
        samples = toy.sample(model, batch=2)
        maps = record.find(samples)
        assert maps.shape == (2, 3, 16, 16)
        assert torch.allclose(maps.sum(1), torch.ones(2, 16, 16), atol=1e-4)
        assert maps[:, 1, :, 10:].max() == 0 and maps[:, 1, :, :6].min() > 0
        pictures, shares = view(record, samples)
        assert pictures.shape == (4, 128, 128, 3) and shares.shape == (4, 128, 128)

    def test_each_picture_finds_its_own_maps(self, recorded, view, toy):
        model, record = recorded()
        first = toy.sample(model, seed=1)
        maps = record.find(first).clone()
        second = toy.sample(model, seed=2)
        assert torch.equal(record.find(first), maps) and not torch.equal(record.find(second), maps)
        assert torch.equal(record.find(first.clone()), maps)

    def test_other_branches_leave_no_trace(self, recorded, patch, toy):
        plain = patch()
        _, record = recorded(plain)
        toy.sample(plain)
        toy.sample()
        assert not record.pictures

    def test_steps_and_blocks_are_chosen(self, recorded, toy, monkeypatch):
        from conceptloom.host.freecustom.shares import ShareRun

        grids, add = [], ShareRun.add
        monkeypatch.setattr(ShareRun, "add", lambda self, s, n, grid: (grids.append(grid), add(self, s, n, grid)))
        toy.sample(recorded(steps="1-2", blocks="9-13")[0], steps=4)
        assert grids == [(8, 8), (8, 8), (8, 8), (16, 16)] * 2

    def test_the_record_is_bounded(self, recorded, toy):
        from conceptloom.host.freecustom.shares import PICTURES_KEPT

        _, record = recorded()
        for i in range(PICTURES_KEPT + 3):
            record.keep(torch.full((1, 4, 2, 2), float(i)), torch.zeros(1))
        assert len(record.pictures) == PICTURES_KEPT

    def test_bad_input(self, recorded, view, nodes, toy):
        model, record = recorded()
        samples = toy.sample(model)
        for wrong, sentence in (
            (lambda: recorded(steps="first"), "Record Attention Share: steps: expected numbers such as"),
            (
                lambda: recorded(blocks="0-3"),
                "Record Attention Share: blocks: expected some of those where references are seen",
            ),
            (lambda: view(record, samples * 2), "Attention Share: latent: expected the unchanged output of a sampler"),
            (
                lambda: view(record, samples, image=torch.rand(1, 64, 128, 3)),
                "Attention Share: image: expected the picture of the latent, in the shape 16x16, got 128x64",
            ),
            (
                lambda: view(record, samples, image=torch.rand(3, 8, 8, 3)),
                "Attention Share: image: expected the 1 pictures",
            ),
        ):
            with pytest.raises(ValueError) as caught:
                wrong()
            assert str(caught.value).startswith(sentence)

    def test_without_the_system_the_model_passes_through(self, recorded, patch, reference, view, toy):
        off = patch(subjects={"subject0": reference(noun="dog", weight=0.0)})
        for model in (toy.model, off):
            same, record = recorded(model, blocks="0-3")
            assert same is model
            self.check_nothing(view, record, toy.sample(same))

    def test_where_no_step_sees_references_nothing_is_recorded(self, recorded, view, toy):
        model, record = recorded(steps="90")
        self.check_nothing(view, record, toy.sample(model))

    def check_nothing(self, view, record, samples):
        """The picture passes through, and no share is anywhere."""
        image = torch.rand(1, 128, 128, 3)
        for given in (record, None):
            pictures, shares = view(given, samples, image=image)
            assert torch.equal(pictures, image)
            assert torch.equal(shares, torch.zeros(1, 128, 128))

    def test_failed_runs_leave_no_maps(self, recorded, toy):
        model, record = recorded()

        def fail(*_):
            raise RuntimeError

        with pytest.raises(RuntimeError):
            toy.sample(model, callback=fail)
        assert not record.pictures
