"""Contact sheets of the evaluation."""

import torch
from conceptloom.evaluation.sheet import SheetRow, contact_sheet


def test_a_variant_that_a_row_lacks_is_left_blank():
    def picture(level):
        return torch.full((64, 64, 3), level)

    both = SheetRow("two", (picture(0.1), picture(0.2)), {"plain": picture(0.3), "cfg": picture(0.4)})
    more = SheetRow("one", (picture(0.5),), {"plain": picture(0.6), "tuned": picture(0.7), "cfg": picture(0.8)})
    sheet = contact_sheet([both, more]).convert("L")
    step, high = 128 + 6, 128 + 18 + 6
    middles = [[sheet.getpixel((70 + step * x, 18 + 18 + 64 + high * y)) for x in range(5)] for y in range(2)]
    levels = [[0.1, 0.2, 0.3, 0.4, 1.0], [0.5, 1.0, 0.6, 0.8, 0.7]]
    assert middles == [[round(255 * level) for level in row] for row in levels]
