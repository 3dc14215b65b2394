"""Training a concept within the host, on Shapeland's shapes with random weights."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def parts(host):
    """MODEL with a random UNet, and the shipped CLIP and VAE, made as the host's nodes make them."""
    from conceptloom.host.shapeland import load_clip, load_model, load_vae
    from conceptloom.shapeland import models

    torch.manual_seed(0)
    with torch.inference_mode():
        return load_model(models.build_unet().state_dict()), load_clip(), load_vae()


def train(parts, steps=2, report=lambda *_: None, prior=None, pictures=None, folder=None, **recipe):
    from conceptloom.host.weaver.training import train
    from conceptloom.training.concepts.learner import Recipe
    from conceptloom.training.concepts.pictures import Pictures

    generator = torch.Generator().manual_seed(1)
    if pictures is None:
        pictures = Pictures([torch.rand(64, 64, 3, generator=generator)], [None], ["a {}"])
    with torch.inference_mode():
        return train(*parts, pictures, "star", "<new1>", Recipe(steps=steps, **recipe), 64, prior, report, folder)


def load_moving_vae():
    """A VAE made in inference mode, whose weights are replaced whenever it encodes, as loading onto a GPU does."""
    from conceptloom.host.shapeland import load_vae

    with torch.inference_mode():
        vae = load_vae()
    encode = vae.encode

    def moved(pictures):
        vae.first_stage_model.double().float()
        return encode(pictures)

    vae.encode = moved
    return vae


@pytest.fixture(scope="module")
def learned(parts):
    """A concept as `train` makes it without a word more."""
    return train(parts)


class TestConcept:
    @pytest.mark.parametrize("rank", [0, 4])
    def test_it_has_all_layers_and_its_word_and_they_have_moved(self, parts, rank):
        losses = []
        concept = train(parts, rank=rank, report=lambda step, loss, _: losses.append(loss))
        assert len(losses) == 2 and all(loss > 0 for loss in losses)
        assert len(concept.deltas) == 16
        for deltas in concept.deltas.values():
            assert set(deltas) == {"k", "v"}
            assert all(delta.matrix().abs().max() > 0 for delta in deltas.values())
        start = parts[1].tokenize("star")["l"][0][1][0]
        table = parts[1].cond_stage_model.clip_l.transformer.get_input_embeddings().weight
        assert concept.tokens["l"].shape == (1, 128)
        assert not torch.equal(concept.tokens["l"][0], table[start])
        assert torch.allclose(concept.tokens["l"][0], table[start].float(), atol=0.05)

    def test_the_same_seed_gives_the_same_concept(self, parts, learned):
        again, other = train(parts), train(parts, seed=1)
        key = "middle.0.0"
        assert torch.equal(learned.deltas[key]["v"].matrix(), again.deltas[key]["v"].matrix())
        assert not torch.equal(learned.deltas[key]["v"].matrix(), other.deltas[key]["v"].matrix())

    @pytest.mark.parametrize("rank", [0, 4])
    def test_the_script_learns_by_the_same_loss_and_gradients(self, parts, rank):
        """diffusers' model with the script's processors against the host's with its sites, with the same noise."""
        pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")
        import comfy.model_management
        from conceptloom.encoders.concept_texts import Name
        from conceptloom.host.model.copies import trainable_copies
        from conceptloom.host.weaver import training as concept_training
        from conceptloom.host.weaver.weights import Weights
        from conceptloom.shapeland import models
        from conceptloom.training.base import open_base
        from conceptloom.training.concepts.diffusion import Learner
        from conceptloom.training.concepts.learner import Recipe, concept_losses, prediction_weight
        from conceptloom.training.concepts.pictures import Pictures, called

        model, clip, _ = parts
        name, recipe = Name("star", "<new1>"), Recipe(rank=rank, batch_size=1)
        base = open_base("shapeland", with_vision=False)
        torch.manual_seed(0)
        base.unet.load_state_dict(models.build_unet().state_dict())
        learner = Learner(base, name, recipe, torch.device("cpu"), half=False)
        assert learner.fingerprint == Weights.of(model).fingerprint()
        for p in learner.weights.parameters():
            torch.nn.init.normal_(p, std=0.05)
        assert set(learner.state_dict()) == {f"weights.{key}" for key in learner.weights.state_dict()}
        generator = torch.Generator().manual_seed(2)
        x0, noise = torch.randn(2, 2, 8, 16, 16, generator=generator)
        t, masks = torch.tensor([700, 250]), (torch.rand(2, 16, 16, generator=generator) > 0.4).float()
        captions = ["a {} and a red mug", "a star and a red mug"]
        losses = learner(x0, masks, captions, noise, t)
        sum(losses.values()).backward()
        pictures = Pictures([torch.zeros(64, 64, 3)], [None], ["a {}"])
        with torch.inference_mode(False), torch.enable_grad(), trainable_copies(model, clip) as (patcher, text):
            trainer = concept_training._Trainer(patcher, text, pictures, name, recipe, 64, None)
            trainer.weights.load_state_dict(learner.weights.state_dict())
            comfy.model_management.load_models_gpu(trainer.patchers)
            sigma = trainer.model.model_sampling.sigmas[t].float().clone()
            x = x0 + sigma[:, None, None, None] * noise
            denoised = trainer._denoise(x, sigma, trainer._conds([called(c, name) for c in captions], x0[:1]))
            expected = concept_losses(denoised, x0, masks, prediction_weight(sigma, True), recipe)
            sum(expected.values()).backward()
        for kind in ("concept", "prior"):
            assert float(losses[kind].detach()) == pytest.approx(float(expected[kind].detach()), rel=1e-4)
        for key, p in learner.weights.named_parameters():
            theirs = trainer.weights.get_parameter(key).grad
            assert float((p.grad - theirs).norm() / theirs.norm()) < 1e-3, key

    def test_models_in_fp16_train_in_another_precision(self, parts, monkeypatch):
        """In fp16 the gradients of a mean over all latents would be 0."""
        import comfy.model_management
        from conceptloom.host.model import copies

        model, clip, _ = parts
        copy = copies._copy

        def half(patcher):
            made = copy(patcher)
            if patcher is model:
                made[0].model.manual_cast_dtype = torch.float16
            return made

        monkeypatch.setattr(copies, "_copy", half)
        with torch.inference_mode(False), copies.trainable_copies(model, clip) as (patcher, _):
            comfy.model_management.load_models_gpu([patcher])
            assert patcher.model.get_dtype_inference() in (torch.bfloat16, torch.float32)

    def test_the_vae_still_computes_after_it_was_moved(self, parts):
        """A parameter that is created in inference mode and moves outside of it never computes again. On a CPU nothing
        moves, so another precision stands in for another device."""
        vae = load_moving_vae()
        train((*parts[:2], vae))
        for mode in (True, False):
            with torch.inference_mode(mode), torch.no_grad():
                assert vae.decode(torch.zeros(1, 8, 4, 4)).isfinite().all()

    def test_the_hosts_models_stay_where_they_are(self, parts, monkeypatch):
        """What is unloaded afterwards is the copies alone, and in inference mode."""
        import comfy.model_management

        unloaded = []
        free = comfy.model_management.free_memory

        def spy(size, device, keep_loaded=(), **more):
            if size == 1e30:
                kept = [one.model for one in keep_loaded]
                unloaded.append((parts[0] in kept, parts[1].patcher in kept, torch.is_inference_mode_enabled()))
            return free(size, device, list(keep_loaded), **more)

        with torch.inference_mode():
            comfy.model_management.load_models_gpu([parts[0], parts[1].patcher])
        monkeypatch.setattr(comfy.model_management, "free_memory", spy)
        train(parts)
        assert unloaded == [(True, True, True)] * 2
        loaded = [one.model for one in comfy.model_management.current_loaded_models]
        assert parts[0] in loaded and parts[1].patcher in loaded

    def test_no_text_loads_a_model_within_a_step(self, parts, monkeypatch):
        import comfy.model_management

        calls, load = [], comfy.model_management.load_models_gpu

        def spy(models, **more):
            calls.append(list(models))
            return load(models, **more)

        monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)
        train(parts)
        encoded = calls.index([parts[2].patcher])
        assert [len(models) for models in calls[encoded + 1 :]] == [2, 2], "both copies in each of two steps"

    def test_room_is_made_in_inference_mode(self, monkeypatch):
        import comfy.model_management
        from conceptloom.host.model.copies import load_copies

        class Patcher:
            parent, load_device = None, torch.device("cuda:0")

            def model_size(self):
                return 1000

            def loaded_size(self):
                return 400

        copies, calls = [Patcher(), Patcher()], []

        def called(name):
            return lambda *given: calls.append((name, given, torch.is_inference_mode_enabled()))

        monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 50)
        monkeypatch.setattr(comfy.model_management, "free_memory", called("free"))
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", called("load"))
        with torch.inference_mode(False):
            load_copies(copies)
        (freed, (size, device, kept), mode), loaded = calls
        assert (freed, size, device, mode) == ("free", pytest.approx(1.1 * 1200 + 50), copies[0].load_device, True)
        assert [one.model for one in kept] == copies
        assert loaded == ("load", (copies,), False)

    def test_a_checkpoint_belongs_to_the_patches_too(self, parts, tmp_path):
        from conceptloom.host.progress import training_folder
        from conceptloom.training.concepts.pictures import Pictures

        model, clip, _ = parts
        pictures, key = Pictures([torch.zeros(8, 8, 3)], [None], ["a {}"]), "diffusion_model.input_blocks.0.0.weight"
        models = [model, model.clone(), model.clone(), model.clone()]
        for one, strength in zip(models[2:], (0.5, 0.25), strict=True):
            one.add_patches({key: (torch.ones_like(model.model.state_dict()[key]),)}, strength)
        names = [training_folder(tmp_path, ["a star"], pictures, one, clip) for one in models]
        assert names[0] == names[1] and len(set(names)) == 3
        skipping = clip.clone()
        skipping.clip_layer(-2)
        assert training_folder(tmp_path, ["a star"], pictures, model, skipping) not in names

    def test_what_is_trained_is_what_fusion_draws(self, parts):
        """The trainer's denoised latents are those of Multi-Concept Fusion with the concept over the whole picture."""
        import comfy.model_management
        from conceptloom.encoders.concept_texts import Name
        from conceptloom.host.model.copies import trainable_copies
        from conceptloom.host.weaver import training as concept_training
        from conceptloom.host.weaver.fusion import FusionSettings, PromptedConcept, apply
        from conceptloom.host.weaver.prompts import encode_text
        from conceptloom.subjects.partition import Partition
        from conceptloom.training.concepts.learner import Recipe
        from conceptloom.training.concepts.pictures import Pictures

        model, clip, _ = parts
        seen = {}
        with torch.inference_mode(False), torch.enable_grad(), trainable_copies(model, clip) as (patcher, text):
            pictures = Pictures([torch.zeros(64, 64, 3)], [None], ["a {}"])
            name = Name("star", "<new1>")
            trainer = concept_training._Trainer(patcher, text, pictures, name, Recipe(), 64, None)
            for p in trainer.weights.parameters():
                torch.nn.init.normal_(p, std=0.05)
            comfy.model_management.load_models_gpu(trainer.patchers)
            x, sigma = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(2)) * 4, torch.tensor([3.0])
            conds = trainer._conds(["a <new1> star"], x)
            seen["trained"] = trainer._denoise(x, sigma, conds).detach()
            concept = trainer.concept()
        with torch.inference_mode():
            prompted = PromptedConcept(concept, encode_text(clip, "a <new1> star", concept))
            everywhere = Partition(torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]))
            drawing, _ = apply(model, prompted.conditioning, [prompted], everywhere, FusionSettings(suppression=0.0))

            import comfy.samplers

            guider = comfy.samplers.CFGGuider(drawing)
            guider.inner_set_conds({"positive": prompted.conditioning})

            def once(model, x, sigmas, extra_args, **_):
                seen["drawn"] = model(seen["x"], sigma, **extra_args)
                return x

            seen["x"] = x
            guider.sample(x, torch.zeros_like(x), comfy.samplers.KSAMPLER(once), torch.tensor([3.0, 0.0]))
        assert torch.allclose(seen["drawn"], seen["trained"], atol=2e-3)

    def test_captions_of_one_chunk_and_of_two_are_learnt_together(self, parts):
        from conceptloom.training.concepts.pictures import Pictures

        image = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(1))
        pictures = Pictures([image] * 2, [None] * 2, ["a {}", "a {}" + " and a red mug" * 30])
        lengths = []
        train(parts, pictures=pictures, report=lambda step, *_: lengths.append(step))
        assert lengths == [0, 1]

    def test_previews_are_drawn_when_nothing_of_the_step_is_left(self, parts):
        """A preview may move the training's model away from its device, which must not be between the passes."""
        between = []
        with pytest.MonkeyPatch.context() as patch:
            backward = torch.Tensor.backward
            patch.setattr(torch.Tensor, "backward", lambda self: (between.append("backward"), backward(self)))
            train(parts, steps=2, report=lambda *_: between.append("report"))
        assert between == ["backward", "report"] * 2

    def test_pictures_of_the_class_take_part(self, parts, learned):
        prior = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(5))
        key = "middle.0.0"
        with_prior = train(parts, prior=prior).deltas[key]["v"].matrix()
        assert not torch.equal(with_prior, learned.deltas[key]["v"].matrix())
        without_weight = train(parts, prior=prior, prior_weight=0.0).deltas[key]["v"].matrix()
        assert not torch.equal(with_prior, without_weight)

    def test_it_is_the_same_of_a_model_that_is_compiled(self, parts, learned):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        def backend(graph, inputs):
            raise AssertionError("compiled")

        model, key = parts[0].clone(), "middle.0.0"
        set_torch_compile_wrapper(model, backend)
        of_compiled = train((model, *parts[1:])).deltas[key]["v"].matrix()
        assert torch.equal(of_compiled, learned.deltas[key]["v"].matrix())


class TestAfterwards:
    def test_a_training_that_was_cancelled_continues_as_if_it_had_not_been(self, parts, tmp_path):
        import comfy.model_management
        from comfy.model_management import InterruptProcessingException
        from conceptloom.training.loop import Run

        def stop(step, *_):
            if step == 1:
                comfy.model_management.interrupt_current_processing()

        folder, key = tmp_path / "training", "middle.0.0"
        saved, save = [], Run.save
        with pytest.MonkeyPatch.context() as patch:
            # As if a minute had passed at each step.
            patch.setattr("time.monotonic", iter(range(0, 10**6, 100)).__next__)
            patch.setattr(Run, "save", lambda run: (saved.append(run.step), save(run)))
            with pytest.raises(InterruptProcessingException):
                train(parts, steps=3, report=stop, folder=folder)
        assert saved == [1, 2]
        steps = []
        continued = train(parts, steps=3, report=lambda step, *_: steps.append(step), folder=folder)
        assert steps == [2]
        assert not folder.exists()
        assert torch.equal(continued.deltas[key]["v"].matrix(), train(parts, steps=3).deltas[key]["v"].matrix())

    def test_a_checkpoint_belongs_to_its_networks(self, parts, tmp_path):
        from conceptloom.host.progress import training_folder
        from conceptloom.training.concepts.pictures import Pictures

        pictures, (model, clip, vae) = Pictures([torch.zeros(8, 8, 3)], [None], ["a {}"]), parts
        others = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), vae.first_stage_model
        first, *rest = (training_folder(tmp_path, ["kind"], pictures, model, clip, one) for one in (others[0], *others))
        assert rest[0] == first and len({first, *rest}) == 3

    def test_models_are_as_before(self, parts):
        model, clip, _ = parts
        before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model.model, clip.cond_stage_model)]
        train(parts, steps=1)
        for module, state in zip((model.model, clip.cond_stage_model), before, strict=True):
            assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert not model.patches and not clip.patcher.patches

    def test_an_interruption_leaves_nothing(self, parts):
        import comfy.model_management
        from comfy.model_management import InterruptProcessingException

        with pytest.raises(InterruptProcessingException):
            train(parts, report=lambda *_: comfy.model_management.interrupt_current_processing())
        assert not comfy.model_management.in_training
        train(parts, steps=1)


class TestRefusals:
    def test_bad_input_gets_its_sentence(self, parts):
        from conceptloom.training.concepts.pictures import Pictures

        image = torch.rand(64, 64, 3)
        with pytest.raises(ValueError, match="images: expected at least one picture"):
            Pictures([], [], ["a {}"])
        beside = torch.zeros(64, 128)
        beside[:, :20] = 1
        with pytest.raises(ValueError, match="masks: mask 1: expected white in the middle square of its picture"):
            Pictures([torch.rand(64, 128, 3)], [beside], ["a {}"])
        with pytest.raises(ValueError, match="captions: expected one line, or one for each of 3 pictures, got 2"):
            Pictures([image] * 3, [None] * 3, ["a {}"] * 2)
        for mask, sentence in (
            (torch.zeros(64, 64), "masks: mask 2: expected white on what is learned, got an empty one"),
            (torch.ones(64, 96), r"masks: mask 2: expected the shape of the picture \(64x64\), got 96x64"),
            (torch.full((64, 64), float("nan")), "masks: mask 2: expected finite values"),
        ):
            with pytest.raises(ValueError, match=sentence):
                Pictures([image] * 2, [None, mask], ["a {}"])
        with pytest.raises(ValueError, match="exactly once, in the place of its word, got 'a star'"):
            Pictures([image], [None], ["a star"])

    def test_a_model_whose_layers_another_node_replaces(self, parts):
        """The copy that is trained on would compute with the original's layers."""
        model = parts[0].clone()
        model.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
        with pytest.raises(ValueError) as caught:
            train((model, *parts[1:]))
        assert str(caught.value) == (
            "model: expected one whose layers are its checkpoint's, got one with another node's patch of "
            "diffusion_model, which would not be of the copy that is trained on; connect the model ahead of that node"
        )


def test_progress_previews_and_a_prior_of_the_models_own(parts, monkeypatch):
    import comfy.utils
    from conceptloom.host.weaver import studio
    from conceptloom.nodes import training

    monkeypatch.setattr(studio, "STEPS", 2)
    monkeypatch.setattr(training, "preview", lambda *_: None)
    monkeypatch.setattr(studio, "PREVIEW_STEPS", 2)
    told = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, shown, node_id: told.append((done, shown))
    )
    given = dict(zip(("model", "clip", "vae"), parts, strict=True), images=torch.rand(1, 64, 64, 3))
    given |= {"class_word": "star", "placeholder": "<new1>", "captions": "a {}", "size": 64, "class_pictures": 1}
    given |= {"preview_every": 2, "keep_checkpoint": False, "steps": 5}
    with torch.inference_mode():
        concept, (curve,), said = training.TrainConcept.execute(**given).result
    previews = [(done, shown) for done, shown in told if shown is not None]
    assert [done for done, _ in previews] == [3, 5]
    assert previews[0][1][1].size == (256, 256)
    assert told[-1][0] == 5
    assert curve.shape == (256, 512, 3)
    assert said.startswith("<new1>: 5 steps of 2 pictures in ")
    assert concept.class_word == "star"


def test_the_loss_is_drawn(host):
    from conceptloom.host.progress import loss_picture

    falling = loss_picture([1 / (i + 1) for i in range(100)])
    assert falling.shape == (256, 512, 3)
    dark = (falling.sum(-1) < 1.0).nonzero()
    left, right = dark[dark[:, 1] < 40, 0].float().mean(), dark[dark[:, 1] > 470, 0].float().mean()
    assert right > left + 100
