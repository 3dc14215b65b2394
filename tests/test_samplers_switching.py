"""When delayed subject conditioning switches (spec section 2 and oracle O8)."""

import math

import pytest
from conceptloom.samplers.switching import NEAREST, PUBLISHED, PUBLISHED_PNDM, boundary_sigma, first_subject_step

ALPHAS = (1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.25, 0.0)


@pytest.mark.parametrize(
    "counting, steps",
    [
        (PUBLISHED, (1, 5, 10, 13, 16, 21, 26, 31, 38, 50)),
        (PUBLISHED_PNDM, (1, 4, 9, 12, 15, 20, 25, 30, 37, 50)),
        (NEAREST, (0, 5, 10, 13, 15, 20, 25, 30, 38, 50)),
    ],
)
def test_tables_of_fifty_steps(counting, steps):
    assert tuple(first_subject_step(alpha, 50, counting) for alpha in ALPHAS) == steps


def pndm_times(steps):
    """The times that PNDM without its Runge-Kutta start asks the model for: the second one twice."""
    times = [1 + i * (1000 // steps) for i in range(steps)][::-1]
    return [times[0], times[1], *times[1:]]


@pytest.mark.parametrize("start, first", [(10, 781), (15, 681), (20, 581), (25, 481)])
def test_published_counting_on_pndm_is_the_effective_step(start, first):
    times = pndm_times(50)
    assert len(times) == 51
    texts = [t for i, t in enumerate(times) if i <= start]
    assert times[len(texts)] == first
    step = sorted(set(times), reverse=True).index(first)
    # 1 - start / 50 rounds up or down; the published comparison of floats falls on one of two neighbors.
    assert first_subject_step(1 - start / 50, 50, PUBLISHED_PNDM) in (step, step - 1)
    assert step == start


def test_boundary_parts_neighbors():
    sigmas = [14.6, 5.13443089, 4.69167137, 0.03, 0.0]
    for step in (1, 2, 3):
        assert sigmas[step - 1] > boundary_sigma(sigmas, step) > sigmas[step]
    assert boundary_sigma(sigmas, 2) < math.sqrt(sigmas[1] * sigmas[2])
