"""FastComposer in the host: markers, fusing, the exact switch, and files of the published layout."""

import random
from functools import cache

import pytest
import torch
from conceptloom.subjects.subject import Subject

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def clip(host):
    """Shapeland's text tower behind the tokenizer of SD 1.5."""
    from conceptloom.host.shapeland import load_clip

    return load_clip()


@pytest.fixture(scope="module")
def vision(host):
    from conceptloom.host.shapeland import load_clip_vision

    return load_clip_vision()


@pytest.fixture(scope="module")
def fuser(host, vision):
    from conceptloom.encoders.fuser import Fuser
    from conceptloom.host.fastcomposer import files

    torch.manual_seed(0)
    return files.wrap_fuser(Fuser(128, 128).state_dict(), files.tower_fingerprint(vision))


def subject(noun, seed=0, **changes):
    return Subject(torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(seed)), noun, **changes)


def encoded(vision, *subjects, **options):
    from conceptloom.host.fastcomposer.conditioning import encode_subjects

    with torch.inference_mode():
        return encode_subjects(vision, subjects, **options)


def places_of(clip, prompt, nouns, mark="@subject"):
    from conceptloom.host.words import find_subjects, locate

    return locate(clip, *find_subjects(prompt, nouns, mark))


# ---- markers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["@subject", "<|image|>", "img"])
def test_published_example(clip, mark):
    prompt = f"a man {mark} and a man {mark} are reading book together"
    tokens, places = places_of(clip, prompt, ["man", "man"], mark)
    assert [t for t, _ in tokens["l"][0]][:11] == [49406, 320, 786, 537, 320, 786, 631, 2337, 1116, 1952, 49407]
    assert [place.row for place in places] == [2, 5]
    assert tokens == clip.tokenize("a man and a man are reading book together")


def test_emphasis_and_long_prompts(clip):
    _, (place,) = places_of(clip, "(man @subject:1.2)", ["man"])
    assert (place.row, place.weight) == (2 - 1, 1.2)
    _, (place,) = places_of(clip, "word " * 73 + "a man @subject walking", ["man"])
    assert place.row == 75
    tokens, (place,) = places_of(clip, "word " * 74 + "skateboarder @subject walking", ["x"])
    assert tokens == clip.tokenize("word " * 74 + "skateboarder walking")
    flat = [t for chunk in tokens["l"] for t, _ in chunk]
    assert flat[place.row] == clip.tokenize("skateboarder")["l"][0][2][0] and place.word == "boarder"


def test_words_that_contain_a_marker_stay_whole(clip):
    tokens, (place,) = places_of(clip, "a man img on imgur", ["man"], "img")
    assert tokens == clip.tokenize("a man  on imgur") and place.word == "man"


def test_nouns_find_themselves_in_the_order_of_subjects(clip):
    _, places = places_of(clip, "a (Dog:1.1) with a hat and a dog, hotdog", ["hat", "dog", "dog"])
    assert [place.word for place in places] == ["hat", "dog", "dog"]
    rows = [place.row for place in places]
    assert rows[1] < rows[0] < rows[2]
    assert places[1].weight == 1.1


def test_random_prompts_keep_the_host_s_tokens(clip):
    """300 prompts of words, emphasis, escapes and length: the plain tokens are the host's, and the marked token is the
    one that the host gives for the same words with nothing behind the mark."""
    rng = random.Random(0)
    words = "a man woman skateboarder, photorealistic \\(old\\) (red:1.3) ((deep)) [cold] on imgur 4k pneumonoultra"
    words = words.split()
    for _ in range(120):
        parts = [rng.choice(words) for _ in range(rng.randint(1, 110))]
        nouns = [i for i, part in enumerate(parts) if part in ("man", "woman", "skateboarder,")]
        if not nouns:
            continue
        chosen = sorted(rng.sample(nouns, min(len(nouns), rng.randint(1, 3))))
        marked = list(parts)
        for i in chosen:
            comma = "," if parts[i].endswith(",") else ""
            marked[i] = f"{parts[i].rstrip(',')} @subject{comma}"
        tokens, places = places_of(clip, " ".join(marked), ["x"] * len(chosen))
        assert tokens == clip.tokenize(" ".join(parts))
        real = [t for chunk in clip.tokenize(" ".join(parts), return_word_ids=True)["l"] for t in chunk if t[2]]
        for i, place in zip(chosen, places, strict=True):
            head = clip.tokenize(" ".join(parts[: i + 1]).rstrip(","), return_word_ids=True)["l"]
            count = sum(word != 0 for chunk in head for *_, word in chunk)
            flat = [t for chunk in tokens["l"] for t, _ in chunk]
            assert flat[place.row] == real[count - 1][0]
            assert place.word == ("boarder" if "skate" in parts[i] else parts[i])


def test_embeddings_count_with_all_their_vectors(host, tmp_path):
    from conceptloom.host.shapeland import load_clip
    from safetensors.torch import save_file

    save_file({"emb_params": torch.randn(3, 128)}, tmp_path / "friend.safetensors")
    save_file({"emb_params": torch.randn(1, 768)}, tmp_path / "stranger.safetensors")
    clip = load_clip(embedding_directory=str(tmp_path))
    tokens, (place,) = places_of(clip, "a embedding:friend @subject walks", ["x"])
    assert place.row == 4 and place.word == "embedding"
    assert torch.is_tensor(tokens["l"][0][4][0])
    with pytest.raises(ValueError, match="embeddings of width 128"):
        places_of(clip, "a man @subject by embedding:stranger", ["x"])


@pytest.mark.parametrize(
    "prompt, nouns, sentence",
    [
        ("@subject walks", ["man"], "before the marker of subject 1"),
        ("a man, @subject walks", ["man"], "got ','"),
        ("a man @subject @subject walks", ["man", "man"], "a word of its own"),
        ("a man @subject walks", ["man", "woman"], "expected one @subject per subject, got 1 for 2 subjects"),
        ("a man @subject and a man @subject", ["man"], "got 2 for 1 subjects"),
        ("a woman walks", ["man"], "got 'man' of subject 1 0 times"),
        ("a man walks", ["man", "man"], "1 times for 2"),
        ("a embedding:man walks", ["man"], "got 'man' of subject 1 0 times"),
        ("a skate@subject boarder", ["x"], None),
        ("a pho@subject'to", ["x"], None),
    ],
)
def test_bad_places_get_their_sentence(clip, prompt, nouns, sentence):
    if sentence is None:
        places_of(clip, prompt, nouns)
        return
    with pytest.raises(ValueError, match=sentence):
        places_of(clip, prompt, nouns)


def test_a_mark_inside_an_embedding_s_name_is_none(clip):
    _, (place,) = places_of(clip, "a embedding:img-2 and a man img", ["man"], "img")
    assert place.word == "man"
    with pytest.raises(ValueError, match="expected one img per subject, got 2 for 1 subjects"):
        places_of(clip, "a embedding:img-2 and a man img img", ["man"], "img")


@pytest.mark.parametrize(
    ("prompt", "nouns", "apart", "words"),
    [
        ("一只狗在公园", ["狗"], "一只 狗 在公园", ["狗"]),
        ("一只狗和一只猫在公园", ["猫", "狗"], "一只 狗 和一只 猫 在公园", ["猫", "狗"]),
        ("一只(狗:1.2)在公园", ["狗"], "一只(狗:1.2)在公园", ["狗"]),
        ("公園で犬が走る", ["犬"], "公園で 犬 が走る", ["犬"]),
        ("หมาในสวน", ["หมา"], "หมา ในสวน", ["หมา"]),
        ("개가 공원에 있다", ["개"], "개 가 공원에 있다", ["개"]),
        ("一只dog在公园", ["dog"], "一只 dog 在公园", ["dog"]),
        ("一只狗@subject在公园", ["x"], "一只狗 在公园", ["狗"]),
        ("the catalog 狗 dogs", ["狗"], "the catalog 狗 dogs", ["狗"]),
    ],
)
def test_nouns_of_scripts_without_blanks_get_a_token_of_their_own(clip, prompt, nouns, apart, words):
    from conceptloom.host.words import find_subjects

    assert find_subjects(prompt, nouns)[0] == apart
    tokens, places = places_of(clip, prompt, nouns)
    assert tokens == clip.tokenize(apart)
    # What the encoder has read at the row is exactly the prompt up to the end of the word.
    for place, word in zip(places, words, strict=True):
        read = apart[: apart.index(word) + len(word)].replace("(", " ")
        head = clip.tokenize(read, return_word_ids=True)["l"][0]
        assert place.row == sum(number != 0 for *_, number in head)
    if words != ["หมา"]:
        assert [place.word for place in places] == words


@pytest.mark.parametrize("mark", ["", "two words", "a:b", "(x)"])
def test_bad_markers_get_their_sentence(clip, mark):
    with pytest.raises(ValueError, match="marker: expected a word without"):
        places_of(clip, "a man", ["man"], mark)


# ---- fusing -------------------------------------------------------------------------------------------------------


def fuse(clip, fuser, prompt, subjects, **options):
    from conceptloom.host.fastcomposer import conditioning as fastcomposer

    with torch.inference_mode():
        return fastcomposer.fuse(clip, fuser, prompt, subjects, **options)


def test_only_subject_rows_change_and_the_text_is_the_host_s(clip, fuser, vision):
    man, woman = encoded(vision, subject("man", 1), subject("woman", 2))
    text, fused, report = fuse(clip, fuser, "a man @subject meets a woman @subject", [man, woman])
    native = clip.encode_from_tokens_scheduled(clip.tokenize("a man meets a woman"))
    assert torch.equal(text[0][0], native[0][0])
    changed = (fused[0][0] != text[0][0]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [2, 5]
    vector = vision.encode_image(_square(man.image)).image_embeds[0]
    with torch.inference_mode():
        torch.testing.assert_close(fused[0][0][0, 2], fuser.module(text[0][0][0, 2], vector))
    assert report.splitlines() == ["1. man: token 2 'man'", "2. woman: token 5 'woman'"]
    assert torch.equal(fused[0][1]["pooled_output"], text[0][1]["pooled_output"])


def _square(image):
    from conceptloom.encoders.clip_pixels import square

    return square(image, 64)[None]


def test_emphasis_moves_the_fused_state_as_the_host_moves_text(clip, fuser, vision):
    subjects = encoded(vision, subject("man", 1))
    _, plain, _ = fuse(clip, fuser, "a man @subject walks", subjects)
    text, loud, _ = fuse(clip, fuser, "a (man @subject:1.4) walks", subjects)
    native = clip.encode_from_tokens_scheduled(clip.tokenize("a (man:1.4) walks"))
    assert torch.equal(text[0][0], native[0][0])
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0][0, 2]
    expected = empty + 1.4 * (plain[0][0][0, 2] - empty)
    torch.testing.assert_close(loud[0][0][0, 2], expected, atol=1e-4, rtol=1e-4)


def test_strength_0_and_weight_0_are_the_text(clip, fuser, vision):
    subjects = encoded(vision, subject("man", 1))
    for options, chosen in (({"strength": 0.0}, subjects), ({}, encoded(vision, subject("man", 1, weight=0.0)))):
        text, fused, _ = fuse(clip, fuser, "a (man @subject:1.3)", chosen, **options)
        assert torch.equal(text[0][0], fused[0][0])


def test_photos_of_one_subject_are_averaged(vision):
    from conceptloom.host.fastcomposer.conditioning import AVERAGED

    photos = [subject("man", i) for i in range(3)]
    single = [s.encodings["fastcomposer"].vector for s in encoded(vision, *photos)]
    (one,) = encoded(vision, *photos, pictures=AVERAGED)
    torch.testing.assert_close(one.encodings["fastcomposer"].vector, torch.stack(single).mean(0))


def test_another_vision_tower_is_warned_of(clip, fuser, vision, caplog):
    from conceptloom.host.shapeland import load_clip_vision
    from conceptloom.shapeland import models

    state = models.load("vision")
    last = "vision_model.encoder.layers.3.mlp.fc2.weight"
    other = load_clip_vision({**state, last: state[last] + 0.1})
    fuse(clip, fuser, "a man @subject", encoded(vision, subject("man")))
    assert "another vision tower" not in caplog.text
    fuse(clip, fuser, "a man @subject", encoded(other, subject("man")))
    assert "another vision tower" in caplog.text


def test_a_clip_of_two_rows_a_token_is_refused(clip, fuser, vision):
    from other_packs import NegPip

    ready = encoded(vision, subject("man"))
    with pytest.raises(
        ValueError, match=r"clip: expected one row .* each of the 77 tokens, got 154 rows, as CLIP NegPip"
    ):
        fuse(NegPip(clip), fuser, "a man @subject", ready)
    long = "a man @subject " + "red " * 80
    with pytest.raises(ValueError, match="each of the 154 tokens, got 308 rows"):
        fuse(NegPip(clip), fuser, long, ready)
    fuse(clip, fuser, long, ready)


def test_bad_input_gets_its_sentence(clip, fuser, vision):
    from conceptloom.encoders.fuser import Fuser
    from conceptloom.host.fastcomposer import files

    bare, ready = subject("man"), encoded(vision, subject("man"))
    with pytest.raises(ValueError, match=r"subject 1 \(man\) without an embedding"):
        fuse(clip, fuser, "a man @subject", [bare])
    with pytest.raises(ValueError, match="at least one subject"):
        fuse(clip, fuser, "a man @subject", [])
    with pytest.raises(ValueError, match="at least one subject"):
        encoded(vision)
    skipping = clip.clone()
    skipping.clip_layer(-2)
    with pytest.raises(ValueError, match="CLIP skip"):
        fuse(skipping, fuser, "a man @subject", ready)
    wide = files.wrap_fuser(Fuser(768, 128).state_dict(), None)
    with pytest.raises(ValueError, match="text states of width 128 for this CLIP, got 768"):
        fuse(clip, wide, "a man @subject", ready)
    wide = files.wrap_fuser(Fuser(128, 768).state_dict(), None)
    with pytest.raises(ValueError, match="embeddings of width 128 for this CLIP_VISION, got 768"):
        fuse(clip, wide, "a man @subject", ready)


# ---- the switch ---------------------------------------------------------------------------------------------------

SCHEDULERS = (
    "simple", "normal", "ddim_uniform", "sgm_uniform", "karras", "exponential", "beta", "kl_optimal",
    "linear_quadratic",
)  # fmt: skip


def two_conditionings(toy):
    return toy.clip.encode_from_tokens_scheduled("text"), toy.clip.encode_from_tokens_scheduled("subject, much else")


def plan(alpha=0.7, step=None, start=0, counting="nearest step"):
    from conceptloom.host.fastcomposer.delay import Delay

    return Delay(alpha, step, start, counting)


@pytest.fixture
def trace(toy, request):
    """Watches which of two conditionings the model gets: (sigma, name) per evaluation of the positive. The UNet
    itself is evaluated only if asked for."""
    seen, evaluates = [], getattr(request, "param", False)
    text, late = two_conditionings(toy)
    names = {float(text[0][0].sum()): "text", float(late[0][0].sum()): "subject"}

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        found = [names[s] for row in c_crossattn for s in names if abs(float(row.sum()) - s) < 1e-3]
        seen.append((float(t[0]), found, len(c_crossattn)))
        return executor(x, t, c_concat, c_crossattn, *args, **kwargs) if evaluates else x * 0.5

    from comfy.patcher_extension import WrappersMP
    from conceptloom.host.fastcomposer.delay import prepared

    model = prepared(toy.model)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "trace", wrapper)
    return model, seen


def sigmas_of(toy, scheduler, steps):
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(toy.model.get_model_object("model_sampling"), scheduler, steps)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_switch_is_exact_on_every_scheduler(toy, trace, scheduler):
    from conceptloom.host.fastcomposer.delay import delayed

    model, seen = trace
    for steps, switch in ((4, 1), (8, 7)):
        positive = delayed(*two_conditionings(toy), plan(step=switch))
        count = len(sigmas_of(toy, scheduler, steps)) - 1
        toy.sample(model, steps=steps, scheduler=scheduler, positive=positive, size=(8, 8))
        assert [found for _, found, _ in seen] == [["text"]] * switch + [["subject"]] * (count - switch)
        seen.clear()


def test_boundaries_part_all_steps_of_all_schedulers(toy):
    from conceptloom.samplers.switching import boundary_sigma

    for scheduler in SCHEDULERS:
        for steps in (4, 8, 20, 25, 30, 50, 100):
            sigmas = sigmas_of(toy, scheduler, steps).tolist()
            for step in range(1, len(sigmas) - 1):
                b = boundary_sigma(sigmas, step)
                assert all(s > b for s in sigmas[:step]) and all(s < b for s in sigmas[step:])


def test_text_and_subject_share_their_batch_with_the_negative(toy, trace):
    from conceptloom.host.fastcomposer.delay import delayed

    model, seen = trace
    toy.sample(model, steps=4, scheduler="normal", positive=delayed(*two_conditionings(toy), plan(0.5)))
    assert [rows for _, _, rows in seen] == [2] * 4


def with_area(conditioning):
    from nodes import ConditioningSetArea

    return ConditioningSetArea().append(conditioning, 64, 64, 0, 64, 1.0)[0]


@pytest.mark.parametrize("change", [lambda conditioning: conditioning, with_area], ids=["plain", "area"])
def test_ends_are_the_plain_conditionings_bit_by_bit(toy, change):
    from conceptloom.host.fastcomposer.delay import delayed, prepared

    text, late = two_conditionings(toy)
    for conditioning, plans in ((text, (plan(0.0), plan(step=99))), (late, (plan(1.0), plan(step=0)))):
        expected = toy.sample(positive=change(conditioning))
        for when in plans:
            drawn = toy.sample(prepared(toy.model), positive=change(delayed(text, late, when)))
            assert torch.equal(drawn, expected)


def test_without_a_switch_the_conditioning_is_a_plain_one_for_any_model(toy):
    from conceptloom.host.fastcomposer.delay import delayed

    text, late = two_conditionings(toy)
    assert delayed(text, late, plan(1.0)) == late and delayed(text, late, plan(step=3, start=4)) == late
    assert delayed(text, late, plan(0.0)) == text
    assert torch.equal(toy.sample(positive=delayed(text, late, plan(1.0))), toy.sample(positive=late))
    for published in ("published, PNDM", "published, other samplers"):
        assert len(delayed(text, late, plan(1.0, counting=published))) == 2
        assert delayed(text, late, plan(0.0, counting=published)) == text


def test_what_reads_the_first_tensor_alone_sees_the_subjects(toy):
    """An attention couple draws a region with it, and would draw it without them."""
    from conceptloom.host.fastcomposer.delay import delayed, prepared
    from other_packs import couple

    text, late = two_conditionings(toy)
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    model = prepared(toy.model)
    region = [delayed(text, late, plan(0.5)), late, text]
    drawn = [toy.sample(couple(model, conditioning, left), steps=2) for conditioning in region]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_model_that_was_not_prepared_is_refused(toy):
    from conceptloom.host.fastcomposer.delay import delayed

    with pytest.raises(ValueError, match="expected one from Load FastComposer"):
        toy.sample(positive=delayed(*two_conditionings(toy), plan()))


@pytest.mark.parametrize("trace", [True], indirect=True)
def test_a_prepared_model_draws_as_before_and_passes_through_other_nodes(toy, trace):
    from conceptloom.host.fastcomposer.delay import delayed, prepared

    assert torch.equal(toy.sample(prepared(prepared(toy.model))), toy.sample())
    model, seen = trace
    drawn = toy.apply(toy.subject(), model=toy.lora(model))
    toy.sample(drawn, steps=4, positive=delayed(*two_conditionings(toy), plan(0.5)))
    assert [found for _, found, _ in seen] == [["text"]] * 2 + [["subject"]] * 2


def test_rising_schedules_start_with_the_text(toy, trace):
    import comfy.sample
    import comfy.samplers
    from conceptloom.host.fastcomposer.delay import delayed

    model, seen = trace
    sigmas = sigmas_of(toy, "normal", 4)[:-1].flip(0)
    latent = torch.zeros(1, 4, 16, 16)
    comfy.sample.sample_custom(
        model,
        torch.zeros_like(latent),
        1.0,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        delayed(*two_conditionings(toy), plan(step=1)),
        toy.negative,
        latent,
        disable_pbar=True,
    )
    assert [found for _, found, _ in seen] == [["text"], ["subject"], ["subject"]]


@pytest.mark.parametrize(
    "sampler, switch",
    # Two steps of text. Heun looks ahead to the next step's noise level and ancestral samplers beyond it, DPM-2 does
    # not leave its own step.
    [("heun", 3), ("dpmpp_2s_ancestral", 3), ("dpm_2", 4), ("dpmpp_2m", 2), ("uni_pc", 2), ("ipndm", 2), ("ddim", 2)],
)
def test_samplers_with_several_evaluations_switch_by_noise_level(toy, trace, sampler, switch):
    from conceptloom.host.fastcomposer.delay import delayed

    model, seen = trace
    toy.sample(
        model, steps=4, scheduler="normal", sampler=sampler, positive=delayed(*two_conditionings(toy), plan(step=2))
    )
    names = [found for _, found, _ in seen]
    assert names == [["text"]] * switch + [["subject"]] * (len(names) - switch)


def test_advanced_ranges_and_img2img(toy, trace):
    from conceptloom.host.fastcomposer.delay import delayed

    model, seen = trace
    text, late = two_conditionings(toy)
    toy.sample(
        model,
        steps=8,
        scheduler="normal",
        positive=delayed(text, late, plan(step=5, start=3)),
        start_step=3,
        last_step=7,
    )
    assert [found for _, found, _ in seen] == [["text"]] * 2 + [["subject"]] * 2
    seen.clear()
    toy.sample(model, steps=4, scheduler="normal", positive=delayed(text, late, plan(0.5)), denoise=0.5)
    assert [found for _, found, _ in seen] == [["text"]] * 2 + [["subject"]] * 2


def test_ranges_set_by_other_nodes_stay_in_force(toy, trace):
    from conceptloom.host.fastcomposer.delay import delayed

    from nodes import ConditioningSetTimestepRange

    model, seen = trace
    positive = delayed(*two_conditionings(toy), plan(step=2))
    (limited,) = ConditioningSetTimestepRange().set_range(positive, 0.0, 0.5)
    toy.sample(model, steps=4, scheduler="normal", positive=limited)
    assert [found for _, found, _ in seen] == [["text"], ["text"], [], []]


def test_two_delays_in_one_run_and_no_trace_afterwards(toy, trace):
    from conceptloom.host.fastcomposer.delay import TAG, delayed

    from nodes import ConditioningCombine

    model, seen = trace
    text, late = two_conditionings(toy)
    first, second = delayed(text, late, plan(step=1)), delayed(text, late, plan(step=3))
    (both,) = ConditioningCombine().combine(first, second)
    before = [dict(extras) for _, extras in both]
    toy.sample(model, steps=4, scheduler="normal", positive=both)
    assert [sorted(found) for _, found, _ in seen] == [
        ["text"] * 2, ["subject", "text"], ["subject", "text"], ["subject"] * 2,
    ]  # fmt: skip
    assert [dict(extras) for _, extras in both] == before and all(TAG in extras["model_conds"] for _, extras in both)
    plain = toy.sample(positive=text)
    toy.sample(model, positive=both)
    assert torch.equal(toy.sample(positive=text), plain)


def test_references_of_freecustom_work_beside_it(toy):
    from conceptloom.host.fastcomposer.delay import delayed, prepared

    text, late = two_conditionings(toy)
    model, alone = toy.apply(toy.subject(), model=prepared(toy.model)), prepared(toy.model)
    plain = toy.sample(model, positive=text)
    assert torch.equal(toy.sample(model, positive=delayed(text, late, plan(0.0))), plain)
    both = toy.sample(model, positive=delayed(text, late, plan(0.5)))
    assert not torch.equal(both, plain)
    assert not torch.equal(both, toy.sample(alone, positive=delayed(text, late, plan(0.5))))


def test_delaying_twice_is_refused(toy):
    from conceptloom.host.fastcomposer.delay import delayed

    text, late = two_conditionings(toy)
    with pytest.raises(ValueError, match="subject: expected a conditioning that does not switch yet"):
        delayed(text, delayed(text, late, plan()), plan())


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(host, tmp_path_factory):
    """A file with the published one's names, shapes and dtypes, its state, and what loads it, once."""
    from conceptloom.host.fastcomposer import files
    from true_models import fastcomposer_state

    path = tmp_path_factory.mktemp("fastcomposer") / "pytorch_model.bin"
    state = fastcomposer_state()
    torch.save(state, path)
    return path, state, cache(lambda: files.load(str(path)))


def test_published_layout_loads_bit_by_bit(published, caplog):
    import comfy.utils
    from conceptloom.host.fastcomposer import conditioning as fastcomposer

    _path, state, load = published
    with torch.inference_mode():
        parts = load()
    assert "missing" not in caplog.text.lower().replace("clip missing: ['text_projection.weight']", "")
    names = comfy.utils.unet_to_diffusers(parts.model.model.model_config.unet_config)
    own = parts.model.model.diffusion_model.state_dict()
    unet = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    assert len(unet) == len(own) == 686
    assert all(torch.equal(own[names[key]].float(), value) for key, value in unet.items())
    text = parts.clip.cond_stage_model.clip_l.transformer.state_dict()
    for key in (
        "encoder.layers.0.self_attn.q_proj.weight",
        "final_layer_norm.weight",
        "embeddings.token_embedding.weight",
    ):
        torch.testing.assert_close(text[f"text_model.{key}"].float(), state[f"text_encoder.{key}"].float())
    vision = parts.clip_vision.get_sd()
    for key, value in state.items():
        if key.startswith("image_encoder.") and not key.endswith("position_ids"):
            # The host keeps vision towers in half precision.
            own = vision[key.removeprefix("image_encoder.")]
            assert torch.equal(own, value.to(own.dtype)), key
    assert (parts.fuser.module.text_width, parts.fuser.module.image_width) == (768, 768)
    assert parts.vae.latent_channels == 4
    picture = torch.rand(1, 224, 224, 3)
    with torch.inference_mode():
        subjects = fastcomposer.encode_subjects(parts.clip_vision, [Subject(picture[0], "man")])
        text_only, fused, _ = fastcomposer.fuse(parts.clip, parts.fuser, "a man @subject", subjects)
    assert torch.equal(parts.fuser.tower, subjects[0].encodings["fastcomposer"].tower)
    assert (text_only[0][0] != fused[0][0]).any(-1).nonzero().tolist() == [[0, 2]]


def test_small_file_replaces_the_trained_layers_of_a_stock_tower(published, tmp_path):
    from conceptloom.host.fastcomposer import files
    from safetensors.torch import load_file

    path, state, load = published
    report = files.convert(str(path), tmp_path, "small", files.WITHOUT)
    written = load_file(tmp_path / "fastcomposer" / "small.safetensors")
    assert report.startswith(f"fastcomposer/small.safetensors: {len(written)} tensors")
    assert {key.split(".")[0] for key in written} == {"postfuse_module", "image_encoder"}
    assert all(torch.equal(value, state[key]) for key, value in written.items())
    with pytest.raises(ValueError, match="clip_vision: expected the vision tower"):
        files.load(str(tmp_path / "fastcomposer" / "small.safetensors"))
    with pytest.raises(ValueError, match="that of small.safetensors, which exists already"):
        files.convert(str(path), tmp_path, "small", files.WITHOUT)
    with pytest.raises(ValueError, match="model: expected Stable Diffusion 1.5"):
        files.convert(str(path), tmp_path, "other", files.AS_LORA)
    whole = load().clip_vision
    stock = files._vision({k: v + 0.5 if ".layers.2" in k else v for k, v in whole.get_sd().items()}, None)
    parts = files.load(str(tmp_path / "fastcomposer" / "small.safetensors"), clip_vision=stock)
    assert parts.model is None and parts.vae is None
    torch.testing.assert_close(parts.fuser.tower, files.tower_fingerprint(whole))
    assert not torch.equal(files.tower_fingerprint(stock), parts.fuser.tower)


def test_lora_of_a_changed_unet_gives_it_back(host, vision, tmp_path):
    """At full rank the difference is exact up to half precision, biases and norms included, even while a clone of the
    model with a LoRA on it is loaded."""
    import comfy.model_management
    from conceptloom.encoders.fuser import Fuser
    from conceptloom.host.fastcomposer import files
    from conceptloom.host.shapeland import load_model
    from conceptloom.shapeland import models
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    before = models.build_unet().state_dict()
    changed = {key: value + 0.02 * torch.randn_like(value) for key, value in before.items()}
    fuser = {f"postfuse_module.{key}": value for key, value in Fuser(128, 128).state_dict().items()}
    save_file({**{f"unet.{key}": value for key, value in changed.items()}, **fuser}, tmp_path / "all.safetensors")
    base = load_model(before)
    other = base.clone()
    key = "diffusion_model.input_blocks.0.0.weight"
    other.add_patches({key: (torch.ones_like(base.model.state_dict()[key]),)})
    comfy.model_management.load_models_gpu([other])
    files.convert(str(tmp_path / "all.safetensors"), tmp_path, "lora", files.AS_LORA, 768, base)
    lora = tmp_path / "fastcomposer" / "lora.safetensors"
    patched = files.load(str(lora), model=base).model
    expected, got = load_model(changed).model.state_dict(), patched.clone()
    x, t, context = torch.randn(1, 8, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 128)

    def predict(model):
        comfy.model_management.load_models_gpu([model])
        with torch.inference_mode():
            return model.model.diffusion_model(x, t, context=context)

    want, plain = predict(load_model(changed)), predict(load_model(before))
    error = (predict(patched) - want).norm() / (plain - want).norm()
    assert error < 0.01, error
    state = {**load_file(lora), "lora_unet_conv_in.lora_up.bias": torch.ones(1)}
    save_file(state, lora)
    with pytest.raises(
        ValueError, match="file: expected tensors that can all be used, got 'lora_unet_conv_in.lora_up.b"
    ):
        files.load(str(lora), model=base)
    save_file({"lora_unet_nowhere.diff_b": torch.ones(1)}, lora)
    with pytest.raises(ValueError, match="model: expected the base model that the file's LoRA was made for"):
        files.load(str(lora), model=base)
    assert len(expected) == len(got.model.state_dict())


@pytest.mark.parametrize(
    "state, sentence",
    [
        ({"somewhere.else": torch.zeros(1)}, "got one with 'somewhere.else'"),
        ({}, "got an empty file"),
        ({"postfuse_module.mlp1.fc1.weight": torch.zeros(4, 8)}, "shapes that fit"),
        ({"postfuse_module.x": torch.zeros(4)}, "mlp1.fc1.weight"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(4, 4)}, "model: expected the base model, for the file holds"),
        ({"unet.x": torch.zeros(4, 4)}, "expected the UNet of a Stable Diffusion model"),
    ],
)
def test_files_of_another_kind_get_their_sentence(state, sentence, tmp_path):
    from conceptloom.host.fastcomposer import files
    from safetensors.torch import save_file

    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=sentence):
        files.load(str(tmp_path / "file.safetensors"))


def test_unet_file_is_one_for_the_host_and_for_us(host, tmp_path):
    """The whole UNet goes where Load Diffusion Model looks, and a UNet saved by itself is a part like others."""
    from conceptloom.encoders.fastcomposer import FUSER, UNET, split
    from conceptloom.encoders.fuser import Fuser
    from conceptloom.host.fastcomposer import files
    from conceptloom.shapeland import models
    from safetensors.torch import load_file, save_file

    unet = models.build_unet().state_dict()
    fuser = {FUSER + key: value for key, value in Fuser(128, 128).state_dict().items()}
    save_file({**{UNET + key: value for key, value in unet.items()}, **fuser}, tmp_path / "all.safetensors")
    report = files.convert(str(tmp_path / "all.safetensors"), tmp_path, "two", files.AS_FILE)
    assert [line.partition(":")[0] for line in report.splitlines()] == [
        "fastcomposer/two.safetensors",
        "diffusion_models/two.safetensors",
    ]
    written = load_file(tmp_path / "diffusion_models" / "two.safetensors")
    assert written.keys() == unet.keys() == split(written)[UNET].keys()
    for name in (" ", "a/b", "../a", "x" * 300):
        with pytest.raises(ValueError, match="filename: expected "):
            files.convert(str(tmp_path / "all.safetensors"), tmp_path, name, files.WITHOUT)


def test_the_host_can_make_a_second_copy_without_dynamic_memory(published, clip):
    """What it asks for when it compiles a model, hooks a LoRA to a conditioning or uses several cards."""
    import comfy.model_patcher
    from conceptloom.host.shapeland import load_model
    from conceptloom.shapeland import models

    _path, _state, load = published
    with torch.inference_mode():
        for patcher in (load().clip.patcher, load_model(models.build_unet().state_dict()), clip.patcher):
            make, arguments = patcher.cached_patcher_init
            copy = make(*arguments, disable_dynamic=True)
            assert type(copy) is comfy.model_patcher.ModelPatcher and copy.model is not patcher.model
            own, other = patcher.model.state_dict(), copy.model.state_dict()
            assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in list(own)[:20])
