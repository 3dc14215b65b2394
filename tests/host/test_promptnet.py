"""PromptNet's words in ComfyUI's sampling, on Shapeland's models and a small PromptNet with random weights."""

import pytest
import torch

SIDE = 16
"""Of Shapeland's latents."""


@pytest.fixture(scope="module")
def shapeland(host):
    """MODEL, CLIP, VAE and CLIP_VISION."""
    from conceptloom.host import shapeland

    with torch.inference_mode():
        return (
            shapeland.load_model(),
            shapeland.load_clip(),
            shapeland.load_vae(),
            shapeland.load_clip_vision(),
        )


@pytest.fixture(autouse=True)
def inference():
    """As under ComfyUI."""
    with torch.inference_mode():
        yield


def network(**changes):
    """A PromptNet for Shapeland with random weights whose vectors are of the size of token embeddings."""
    from conceptloom.encoders.promptnet import PromptNet, PromptNetConfig

    config = {
        "channels": (32, 32, 32, 32),
        "heads": (2, 2, 2, 2),
        "latent_channels": 8,
        "vision_width": 128,
        "context_width": 128,
        "region": 2,
        "region_channels": 16,
        "linear_projection": False,
    }
    torch.manual_seed(0)
    return PromptNet(PromptNetConfig(**{**config, **changes})).eval().requires_grad_(False)


@pytest.fixture
def promptnet(host):
    from conceptloom.host.profusion.promptnet import wrap

    return wrap(network())


def subject(noun="star", seed=0, size=(64, 64), weight=3.0):
    from conceptloom.subjects.subject import Subject

    return Subject(torch.rand(*size, 3, generator=torch.Generator().manual_seed(seed)), noun, weight=weight)


def encode(shapeland, promptnet, prompt="a star @subject on a navy background", subjects=None, **options):
    from conceptloom.host.profusion.promptnet import encode

    _, clip, vae, vision = shapeland
    return encode(promptnet, clip, vision, vae, prompt, subjects or [subject()], **options)


def plain(shapeland, prompt):
    clip = shapeland[1]
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def carried(conditioning):
    """What a conditioning carries for PromptNet."""
    from conceptloom.host.model.carried import carried_by
    from conceptloom.host.profusion.promptnet import TAG

    return carried_by(conditioning[0][1], TAG)


def run_of(shapeland, conditioning, side=SIDE):
    """The state of a sampling, as a prepared MODEL makes it."""
    from conceptloom.host.profusion.promptnet import WordRun

    return WordRun(carried(conditioning), shapeland[0].model, torch.zeros(1, 8, side, side))


def placed(shapeland, word, index):
    """What stands in front of the text encoder for a word: its token's embedding and its position's."""
    embeddings = shapeland[1].cond_stage_model.clip_l.transformer.text_model.embeddings
    (tokens,) = shapeland[1].tokenize(word).values()
    token, position = embeddings.token_embedding.weight[tokens[0][1][0]], embeddings.position_embedding.weight[index]
    return token.float() + position.float()


@pytest.fixture
def vectors(monkeypatch):
    """Lets every PromptNet give the same vectors (n, D), and counts its evaluations."""
    from conceptloom.encoders.promptnet import PromptNet

    calls = []

    def fixed(*rows):
        def forward(self, reference, noisy, timestep, tokens):
            calls.append(len(noisy))
            return torch.stack(rows)[None].expand(len(noisy), -1, -1)

        monkeypatch.setattr(PromptNet, "forward", forward)
        return calls

    return fixed


class TestSplice:
    def test_the_vectors_of_words_give_the_encoding_of_those_words(self, shapeland, promptnet, vectors):
        text, shown = encode(shapeland, promptnet, "a ball @subject on a navy background")
        vectors(placed(shapeland, "house", 2))
        states = run_of(shapeland, shown).states(shown[0][0], torch.zeros(2, 8, SIDE, SIDE), torch.ones(2), 1.0)
        expected = plain(shapeland, "a house on a navy background")[0][0]
        assert states.shape == (2, 77, 128)
        torch.testing.assert_close(states, expected.expand(2, -1, -1), rtol=0, atol=1e-5)
        torch.testing.assert_close(text[0][0], plain(shapeland, "a ball on a navy background")[0][0])

    def test_several_vectors_move_the_rest_along(self, shapeland, promptnet, vectors):
        """Two regions side by side make two vectors."""
        _, shown = encode(shapeland, promptnet, "a star on a navy background")
        run = run_of(shapeland, shown)
        run.text.count = 2
        vectors(placed(shapeland, "red", 2), placed(shapeland, "house", 3))
        states = run.states(shown[0][0], torch.zeros(1, 8, SIDE, SIDE), torch.ones(1), 1.0)
        torch.testing.assert_close(
            states, plain(shapeland, "a red house on a navy background")[0][0], rtol=0, atol=1e-5
        )
        weak = run.states(shown[0][0], torch.zeros(1, 8, SIDE, SIDE), torch.ones(1), 0.25)
        changed = (weak != states).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [2, 3]
        torch.testing.assert_close(weak[:, 2:4], states[:, 2:4] * 0.25)

    def test_two_subjects_emphasis_and_a_second_chunk(self, shapeland, promptnet, monkeypatch):
        """Each subject's word is its own, wherever it is and whatever is emphasized beside it."""
        from conceptloom.encoders.promptnet import PromptNet

        long = "a (star:1.3) and " + "a red ball and " * 20 + "a (cup:0.8) on a navy background"
        _, shown = encode(shapeland, promptnet, long, [subject("star"), subject("cup", 1)])
        words = carried(shown)
        assert [chunk for chunk, _ in words.slots.places] == [0, 1]
        made = [
            placed(shapeland, "fish", words.slots.places[0][1]),
            placed(shapeland, "moon", words.slots.places[1][1]),
        ]
        monkeypatch.setattr(
            PromptNet,
            "forward",
            lambda self, reference, noisy, *_: torch.stack(made).repeat_interleave(len(noisy) // 2, 0)[:, None],
        )
        states = run_of(shapeland, shown).states(shown[0][0], torch.zeros(3, 8, SIDE, SIDE), torch.ones(3), 1.0)
        expected = plain(shapeland, long.replace("star", "fish").replace("cup", "moon"))[0][0]
        torch.testing.assert_close(states, expected.expand(3, -1, -1), rtol=0, atol=2e-5)

    def test_a_noun_of_several_tokens_is_replaced_as_a_whole(self, shapeland, promptnet, vectors):
        for prompt in ("a teddy bear on a navy background", "a zorblaxian @subject on a navy background"):
            _, shown = encode(shapeland, promptnet, prompt, [subject("teddy bear")])
            vectors(placed(shapeland, "house", 2))
            states = run_of(shapeland, shown).states(shown[0][0], torch.zeros(1, 8, SIDE, SIDE), torch.ones(1), 1.0)
            expected = plain(shapeland, "a house on a navy background")[0][0]
            torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("prompt", "noun", "expected"),
        [
            ("a football @subject on a navy background", "ball", "a house on a navy background"),
            ("a woman @subject on a navy background", "man", "a house on a navy background"),
            ("a (star:1.3) @subject on a navy background", "star", "a (house:1.3) on a navy background"),
            ("a (star: 1.3) @subject on a navy background", "star", "a (house: 1.3) on a navy background"),
            ("a ((red star)) @subject on a navy background", "star", "a ((red house)) on a navy background"),
        ],
    )
    def test_the_word_before_the_marker_is_replaced(self, shapeland, promptnet, vectors, prompt, noun, expected):
        _, shown = encode(shapeland, promptnet, prompt, [subject(noun)])
        words = carried(shown)
        vectors(placed(shapeland, "house", words.slots.places[0][1]))
        states = run_of(shapeland, shown).states(shown[0][0], torch.zeros(1, 8, SIDE, SIDE), torch.ones(1), 1.0)
        torch.testing.assert_close(states, plain(shapeland, expected)[0][0], rtol=0, atol=1e-5)

    def test_weight_zero_switches_a_subject_off(self, shapeland, promptnet):
        prompt = "a star and a cup on a navy background"
        off = subject("star", weight=0.0)
        text, shown = encode(shapeland, promptnet, prompt, [off, subject("cup", 1)])
        assert len(carried(shown).subjects) == 1 and carried(shown).slots.places == ((0, 5),)
        text, shown = encode(shapeland, promptnet, prompt, [off, subject("cup", 1, weight=0.0)])
        assert shown is text


def test_the_network_gets_what_the_unet_gets(shapeland, promptnet):
    """Latents in the model's own scale, its timestep, the picture's latents and its tokens, for each picture."""
    model, _, vae, vision = shapeland
    one, two = subject("star"), subject("cup", 1)
    _, shown = encode(shapeland, promptnet, "a star and a cup", [one, two])
    x = torch.randn(2, 8, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 4
    sigma = model.model.model_sampling.sigma(torch.tensor([700.0]))
    found = run_of(shapeland, shown)._vectors(x, sigma.repeat(2))
    noisy = x / (1 + sigma**2).sqrt()
    for j, given in enumerate((one, two)):
        reference = vae.encode(given.image[None])
        tokens = vision.encode_image(given.image[None])["last_hidden_state"]
        for b in range(2):
            expected = promptnet.module(reference, noisy[b : b + 1], torch.tensor([700.0]), tokens)
            torch.testing.assert_close(found[j, b], expected[0], rtol=0, atol=1e-4)


class TestSampling:
    @staticmethod
    def draw(shapeland, positive, model=None, batch=1, steps=3, side=SIDE, sampler="euler"):
        import comfy.sample

        latent = torch.zeros(batch, 8, side, side)
        return comfy.sample.sample(
            shapeland[0] if model is None else model,
            comfy.sample.prepare_noise(latent, 5),
            steps,
            3.0,
            sampler,
            "normal",
            positive,
            plain(shapeland, ""),
            latent,
            disable_pbar=True,
            seed=5,
        )

    @pytest.fixture
    def model(self, shapeland):
        from conceptloom.host.profusion.promptnet import prepared

        return prepared(shapeland[0])

    def test_the_word_is_in_the_picture_and_follows_the_latents(self, shapeland, promptnet, model):
        text, shown = encode(shapeland, promptnet)
        made = self.draw(shapeland, shown, model)
        assert not torch.allclose(made, self.draw(shapeland, text, model), atol=1e-2)
        _, still = encode(shapeland, promptnet, update="once")
        assert not torch.allclose(made, self.draw(shapeland, still, model), atol=1e-4)
        torch.testing.assert_close(self.draw(shapeland, shown, model), made, rtol=0, atol=0)

    def test_a_vector_of_a_word_draws_that_word(self, shapeland, promptnet, model, vectors):
        vectors(placed(shapeland, "house", 2))
        _, shown = encode(shapeland, promptnet)
        expected = self.draw(shapeland, plain(shapeland, "a house on a navy background"))
        torch.testing.assert_close(self.draw(shapeland, shown, model), expected, rtol=0, atol=1e-3)

    @pytest.mark.parametrize(("update", "calls"), [("every evaluation", 6), ("every step", 3), ("once", 1)])
    def test_how_often_it_is_made(self, shapeland, promptnet, model, vectors, update, calls):
        """With fusion, whose two stages are evaluations of one step."""
        import comfy.samplers
        from conceptloom.host.model.window import Window
        from conceptloom.host.profusion.guider import FusionGuider, Guidance
        from conceptloom.host.profusion.sampler import fusion_sampler

        counted = vectors(placed(shapeland, "house", 2))
        text, shown = encode(shapeland, promptnet, update=update)
        guider = FusionGuider(model, text, plain(shapeland, ""), [shown], Guidance(gamma=0.5))
        sampler = fusion_sampler(comfy.samplers.sampler_object("euler"), 1, 1.0, Window())
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", 3)
        latent = torch.zeros(2, 8, SIDE, SIDE)
        made = guider.sample(torch.randn(2, 8, SIDE, SIDE), latent, sampler, sigmas, None, None, True, 1)
        assert torch.isfinite(made).all() and counted == [2] * calls

    def test_gamma_weakens_the_word_in_fusion(self, shapeland, promptnet, model, vectors):
        """With the vector of a word, and that word's own states weakened, both are the same picture."""
        import comfy.samplers
        from conceptloom.host.model.window import Window
        from conceptloom.host.profusion.guider import FusionGuider, Guidance
        from conceptloom.host.profusion.sampler import fusion_sampler
        from conceptloom.host.words import SUBJECT_ROWS

        vectors(placed(shapeland, "house", 2))
        text, shown = encode(shapeland, promptnet)
        words = [
            [states, {**extras, SUBJECT_ROWS: (2,)}]
            for states, extras in plain(shapeland, "a house on a navy background")
        ]
        sampler = fusion_sampler(comfy.samplers.sampler_object("euler"), 1, 1.0, Window())
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", 3)
        noise, latent = (
            torch.randn(1, 8, SIDE, SIDE, generator=torch.Generator().manual_seed(1)),
            torch.zeros(1, 8, SIDE, SIDE),
        )
        made = [
            FusionGuider(model, text, plain(shapeland, ""), [one], Guidance(gamma=0.4)).sample(
                noise, latent, sampler, sigmas, None, None, True, 1
            )
            for one in (shown, words)
        ]
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=2e-3)

    def test_nothing_is_left_behind(self, shapeland, promptnet, model):
        text, shown = encode(shapeland, promptnet)
        before = self.draw(shapeland, text)
        keys = set(shown[0][1])
        self.draw(shapeland, shown, model)
        assert torch.equal(self.draw(shapeland, text, model), before) and torch.equal(
            self.draw(shapeland, text), before
        )
        assert set(shown[0][1]) == keys and not model.get_additional_models()

    def test_it_is_loaded_with_the_model(self, shapeland, promptnet, model, monkeypatch):
        import comfy.model_management

        loaded, true = [], comfy.model_management.load_models_gpu

        def load(models, *args, **kwargs):
            loaded.append({id(getattr(one, "model", None)) for one in models})
            return true(models, *args, **kwargs)

        monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
        _, shown = encode(shapeland, promptnet)
        loaded.clear()
        self.draw(shapeland, shown, model)
        needed = {id(shapeland[0].model), id(promptnet.module), id(shapeland[1].patcher.model)}
        assert any(needed <= one for one in loaded)


class TestRefusals:
    def test_a_model_that_is_not_prepared(self, shapeland, promptnet):
        _, shown = encode(shapeland, promptnet)
        with pytest.raises(ValueError, match="PromptNet Encode: model: expected one from Load PromptNet"):
            TestSampling.draw(shapeland, shown)

    def test_text_that_another_node_has_changed(self, shapeland, promptnet):
        """The subject's word is put in the place of the text, and would undo the change."""
        from nodes import ConditioningAverage, ConditioningConcat

        text, shown = encode(shapeland, promptnet)
        x, sigma = torch.zeros(1, 8, SIDE, SIDE), torch.ones(1)

        def write(conditioning, **entry):
            import comfy.conds

            inputs = {"c_crossattn": comfy.conds.CONDCrossAttn(conditioning[0][0])}
            return run_of(shapeland, conditioning).write(inputs, entry, x, sigma)["c_crossattn"].cond

        (half,) = ConditioningAverage().addWeighted(shown, plain(shapeland, "a moon"), 0.5)
        with pytest.raises(ValueError, match="^PromptNet Encode: subject: expected the conditioning with its text as"):
            write(half)
        (more,) = ConditioningConcat().concat(shown, text)
        assert torch.equal(write(more)[:, 77:], text[0][0]) and write(more).shape[1] == 154
        from conceptloom.host.profusion.guider import weakened
        from conceptloom.host.words import GAMMA

        whole, weak = write(shown), write(weakened(shown, 0.5), **{GAMMA: 0.5})
        (row,) = carried(shown).slots.states_rows
        assert torch.equal(weak[:, row], 0.5 * whole[:, row])
        assert torch.equal(weak[:, row + 1 :], whole[:, row + 1 :]) and torch.equal(weak[:, :row], whole[:, :row])
        # What takes its text alone gets the noun's, and not that of the word which keeps the place.
        (other,) = ConditioningConcat().concat(text, shown)
        assert torch.equal(other[0][0], torch.cat([text[0][0]] * 2, 1))

    def test_text_encoders_of_different_weights(self, shapeland, promptnet):
        model, clip, vae, vision = shapeland
        other = clip.clone()
        key = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
        other.patcher.add_patches({key: ("diff", (torch.ones(128, 128),))}, 0.1)
        _, first = encode(shapeland, promptnet)
        _, second = encode((model, other, vae, vision), promptnet)
        with pytest.raises(ValueError, match="^PromptNet Encode: clip: expected one with the same LoRAs and hooks for"):
            TestSampling.draw(shapeland, [*first, *second], TestSampling.model.__wrapped__(None, shapeland))

    def test_latents_that_are_too_small(self, shapeland, promptnet):
        from conceptloom.host.profusion.promptnet import prepared

        _, shown = encode(shapeland, promptnet)
        with pytest.raises(
            ValueError, match="latent: expected at least 64 pixels on each side for this PromptNet, got 32 x 32"
        ):
            TestSampling.draw(shapeland, shown, prepared(shapeland[0]), side=8)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"context_width": 64},
                "clip: expected the text encoder of width 64 of this PromptNet, got one of width 128",
            ),
            ({"vision_width": 96}, "clip_vision: expected the vision tower of width 96 of this PromptNet, got one"),
        ],
    )
    def test_towers_of_another_width(self, shapeland, changes, message):
        from conceptloom.host.profusion.promptnet import wrap

        with pytest.raises(ValueError, match=message):
            encode(shapeland, wrap(network(**changes)))

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("a house on a navy background", "prompt: expected @subject after each subject's word, or the noun"),
            ("a star @subject and a cup @subject", "prompt: expected one @subject per subject, got 2 for 1"),
            ("a star, @subject", "prompt: expected a word before the marker of subject 1, got ','"),
        ],
    )
    def test_places_that_do_not_fit(self, shapeland, promptnet, prompt, message):
        with pytest.raises(ValueError, match=message):
            encode(shapeland, promptnet, prompt)

    def test_vectors_that_do_not_fit_behind_a_late_word(self, shapeland, promptnet):
        """Four regions are four vectors, and the word's place is the last but one."""
        from conceptloom.host.profusion.promptnet import prepared

        _, shown = encode(shapeland, promptnet, "red " * 72 + "star")
        with pytest.raises(ValueError, match=r"prompt: expected the subjects' words earlier \(each becomes 4 vectors"):
            TestSampling.draw(shapeland, shown, prepared(shapeland[0]), side=2 * SIDE)

    def test_latents_of_other_channels(self, shapeland):
        from conceptloom.host.profusion.promptnet import prepared, wrap

        _, shown = encode(shapeland, wrap(network(latent_channels=4)))
        with pytest.raises(ValueError, match="promptnet: expected one for latents of 8 channels, got one for 4"):
            TestSampling.draw(shapeland, shown, prepared(shapeland[0]))


def test_a_file_is_loaded_with_its_heads(host, tmp_path):
    from conceptloom.encoders.promptnet import save
    from conceptloom.host.profusion.promptnet import load

    net = network(heads=(4, 4, 2, 2)).half().float()
    save(net, tmp_path / "net.safetensors", {f"promptnet.{k}": v for k, v in net.state_dict().items()})
    loaded = load(str(tmp_path / "net.safetensors")).module
    assert loaded.config == net.config
    given = torch.randn(2, 1, 8, 16, 16), torch.tensor([5]), torch.randn(1, 65, 128)
    torch.testing.assert_close(loaded(*given[0], *given[1:]), net(*given[0], *given[1:]))


def test_places_and_padding_are_those_of_stable_diffusion_2(host):
    """With the text encoder's own tokenizer: the published script finds the word's place from the same tokens."""
    from types import SimpleNamespace

    from comfy.text_encoders.sd2_clip import SD2Tokenizer
    from conceptloom.host.profusion.spliced import slots_of

    tokenizer = SD2Tokenizer()
    clip = SimpleNamespace(tokenizer=tokenizer, tokenize=tokenizer.tokenize_with_weights)
    prompt = "a holder in Ghibli style"
    slots, tokens = slots_of(clip, prompt, [len("a holder")])
    assert [token for token, _ in slots.rows[0]] == [49406, 320, 7862, 530, 40555, 1844, 49407, *[0] * 70]
    assert slots.places == ((0, 2),) and slots.states_rows == (2,) and list(tokens) == ["h"]
