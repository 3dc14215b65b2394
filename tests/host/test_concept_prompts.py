"""Prompts of a concept fusion through the host's own text encoder (Shapeland's, behind SD 1.5's tokenizer)."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def clip(host):
    from conceptloom.host.shapeland import load_clip

    return load_clip()


@pytest.fixture(scope="module")
def concept(clip):
    """A concept whose token is the tokenizer's own for some words."""
    from conceptloom.encoders.concepts import Concept, Delta

    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight

    def make(words="fish", placeholder="<new1>", class_word="star", **changes):
        ids = [clip.tokenize(word)["l"][0][1][0] for word in words.split()]
        nothing = {"middle.0.0": {"k": Delta((torch.zeros(128, 128),))}}
        return Concept(
            placeholder, nothing, class_word, placeholder, tokens={"l": table[ids].detach().clone()}, **changes
        )

    return make


def states(conditioning):
    return conditioning[0][0]


class TestTokens:
    @pytest.mark.parametrize(
        ("words", "text", "same"),
        [
            ("fish", "a <new1> on a mint background", "a fish on a mint background"),
            ("fish mug", "a <new1> on a mint background", "a fish mug on a mint background"),
            ("fish", "a (<new1> star:1.3) and a mug", "a (fish star:1.3) and a mug"),
            ("fish", "red " * 80 + "<new1> star", "red " * 80 + "fish star"),
            ("fish mug", "<new1> star, <new1>", "fish mug star, fish mug"),
        ],
    )
    def test_a_token_is_a_word_of_the_vocabulary_bit_by_bit(self, clip, concept, words, text, same):
        """Oracle A2."""
        from conceptloom.host.weaver.prompts import encode_text

        with torch.inference_mode():
            spliced = encode_text(clip, text, concept(words))
            plain = clip.encode_from_tokens_scheduled(clip.tokenize(same))
        assert torch.equal(states(spliced), states(plain))
        assert torch.equal(spliced[0][1]["pooled_output"], plain[0][1]["pooled_output"])

    def test_a_model_of_two_encoders_gets_each_its_own_rows(self):
        """SDXL's tokenizer: the same places in both, with weights kept."""
        from comfy.sdxl_clip import SDXLTokenizer
        from conceptloom.host.weaver.prompts import splice

        tokenizer = SDXLTokenizer()
        clip = SimpleNamespace(tokenizer=tokenizer, tokenize=tokenizer.tokenize_with_weights)
        rows = {"l": torch.randn(2, 768), "g": torch.randn(2, 1280)}
        spliced = splice(clip, "a (<new1> cat:1.2) and <new1>", {"<new1>": rows})
        same = tokenizer.tokenize_with_weights("a (fish fish cat:1.2) and fish fish")
        fish = tokenizer.tokenize_with_weights("fish")["l"][0][1][0]
        for encoder, chunks in same.items():
            row = 0
            for wanted, found in zip(chunks[0], spliced[encoder][0], strict=True):
                assert wanted[1] == found[1]
                if wanted[0] == fish:
                    assert torch.equal(found[0], rows[encoder][row % 2])
                    row += 1
                else:
                    assert wanted[0] == found[0]
            assert row == 4

    def test_text_around_the_placeholder_may_hold_the_word_that_stands_in(self, clip, concept):
        from conceptloom.host.weaver.prompts import encode_text

        with torch.inference_mode():
            spliced = encode_text(clip, "a zebra and a <new1> star", concept("fish"))
            plain = clip.encode_from_tokens_scheduled(clip.tokenize("a zebra and a fish star"))
        assert torch.equal(states(spliced), states(plain))


class TestPrompts:
    def encode(self, clip, *concepts, base="a star and a mug", **options):
        from conceptloom.host.weaver.prompts import encode_prompts

        with torch.inference_mode():
            return encode_prompts(clip, base, "ugly", concepts, **options)

    def test_each_concept_has_its_own_text(self, clip, concept):
        from conceptloom.host.weaver.prompts import encode_text

        star, mug = concept("fish"), concept("tree", "<new2>", "mug")
        made = self.encode(clip, star, mug)
        assert made.texts == ("a <new1> star and a mug", "a star and a <new2> mug")
        with torch.inference_mode():
            for prompted, text in zip(made.concepts, made.texts, strict=True):
                assert torch.equal(states(prompted.conditioning), states(encode_text(clip, text, prompted.concept)))
            plain = clip.encode_from_tokens_scheduled(clip.tokenize("a star and a mug"))
        assert torch.equal(states(made.positive), states(plain))
        assert made.background is None

    def test_the_plain_prompt_has_no_placeholders(self, clip, concept):
        star, mug = concept("fish"), concept("tree", "<new2>", "mug")
        made = self.encode(clip, star, mug, base="a <new1> star and a <new2> mug")
        assert made.texts == ("a <new1> star and a mug", "a star and a <new2> mug")
        plain = self.encode(clip, star, mug)
        assert torch.equal(states(made.positive), states(plain.positive))

    def test_a_placeholder_may_be_part_of_other_words(self, clip, concept):
        made = self.encode(clip, concept("fish", "sks"), base="a star on two desks")
        plain = self.encode(clip, concept("fish", "<new1>"), base="a star on two desks")
        assert made.texts == ("a sks star on two desks",)
        assert torch.equal(states(made.concepts[0].conditioning), states(plain.concepts[0].conditioning))

    def test_own_texts_replace_the_made_ones_line_by_line(self, clip, concept):
        made = self.encode(clip, concept(), concept("tree", "<new2>", "mug"), texts="\njust a <new2> mug")
        assert made.texts == ("a <new1> star and a mug", "just a <new2> mug")

    def test_a_text_without_its_class_word_is_told_of(self, clip, concept, caplog):
        caplog.set_level("WARNING")
        self.encode(clip, concept(), texts="a <new1> Star in space")
        assert not caplog.records
        self.encode(clip, concept(), texts="a <new1> in starry space")
        assert "'a <new1> in starry space' does not say what <new1> is (star)" in caplog.text

    def test_a_background_is_the_last(self, clip, concept):
        behind = concept("moon", "<new3>", "meadow")
        made = self.encode(clip, concept(), base="a star on a meadow", background=behind)
        assert made.texts == ("a <new1> star on a meadow", "a star on a <new3> meadow")
        assert made.background.concept is behind
        assert len(made.concepts) == 1

    def test_what_a_concept_changes_in_the_text_encoder_acts_on_its_own_text_alone(self, clip, concept):
        own = clip.cond_stage_model.clip_l.transformer.state_dict()
        key = "text_model.encoder.layers.1.mlp.fc2.weight"
        changed = concept("fish", text_patches={"l": {key: own[key] + 0.1}})
        made, plain = self.encode(clip, changed), self.encode(clip, concept("fish"))
        assert not torch.allclose(states(made.concepts[0].conditioning), states(plain.concepts[0].conditioning))
        assert torch.equal(states(made.positive), states(plain.positive))

    def test_bad_input_gets_its_sentence(self, clip, concept):
        star, mug = concept(), concept("tree", "<new2>", "mug")
        with pytest.raises(ValueError, match="at most one line for each of the 1 concepts"):
            self.encode(clip, star, texts="a\nb")
        with pytest.raises(ValueError, match="prompt: expected 'star' or <new1> in it"):
            self.encode(clip, star, base="a dog")
        with pytest.raises(ValueError, match="expected <new1> exactly once"):
            self.encode(clip, star, texts="a star")
        with pytest.raises(ValueError, match="expected <new1> alone"):
            self.encode(clip, star, mug, texts="a <new1> star and a <new2> mug")
        with pytest.raises(ValueError, match="expected a placeholder of its own"):
            self.encode(clip, star, concept("tree", "<new1>", "mug"))
