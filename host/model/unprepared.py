"""Conditionings that only work with a MODEL that a node has prepared for them."""

from __future__ import annotations


class NeedsPreparedModel:
    """Placeholder for a noise level in a conditioning, which a prepared MODEL replaces when sampling begins.

    Any comparison raises ValueError with the given sentence, because then the MODEL was not prepared.
    """

    def __init__(self, sentence: str):
        self.sentence = sentence

    def _refuse(self, _other):
        raise ValueError(self.sentence)

    __lt__ = __gt__ = __le__ = __ge__ = _refuse
