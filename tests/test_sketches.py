"""Directions and probes depend on their keys alone."""

import pytest
import torch

from alignreg import sketches
from alignreg.sketches import random
from alignreg.sketches.directions import JoinedDirections


@pytest.mark.parametrize("make", [sketches.gaussian, sketches.rademacher])
def test_blocks_depend_on_seed_name_and_index_alone(make):
    like = torch.zeros(4, 3)
    whole = make(10, seed=1).block("a", like, 0, 10)
    state = torch.get_rng_state()
    assert torch.equal(make(10, seed=1).block("a", like, 3, 7), whole[3:7])
    assert torch.equal(make(5, seed=1).block("a", like, 0, 5), whole[:5])
    assert torch.equal(make(10, seed=1).block("a", like.double(), 0, 10), whole.double())
    assert torch.equal(state, torch.get_rng_state())
    for other in (make(10, seed=2).block("a", like, 0, 10), make(10, seed=1).block("b", like, 0, 10)):
        assert not torch.isclose(other.flatten(1).mean(1), whole.flatten(1).mean(1)).all()
    assert len({tuple(row.flatten().tolist()) for row in whole}) > 5


@pytest.mark.parametrize("make", [sketches.gaussian, sketches.rademacher])
def test_moments_of_the_entries(make):
    values = make(50, seed=0).block("w", torch.zeros(2000), 0, 50)
    assert abs(float(values.mean())) * 100_000**0.5 < 4
    assert float(values.square().mean()) == pytest.approx(1, abs=0.02)
    gram = values @ values.T / 2000
    off = gram - gram.diag().diag()
    assert float(off.square().sum() / (50 * 49)) * 2000 == pytest.approx(1, abs=0.15)  # independent directions
    if make is sketches.rademacher:
        assert values.abs().eq(1).all()
    else:
        assert float(values.pow(4).mean()) == pytest.approx(3, abs=0.1)


def test_probes():
    whole = sketches.probes(4, 7, 2, seed=0, step=3)
    assert whole.shape == (4, 7, 2)
    assert torch.equal(whole[:, 2:5], sketches.probes(4, 3, 2, seed=0, step=3, offset=2))
    assert not torch.equal(whole, sketches.probes(4, 7, 2, seed=0, step=4))
    assert not torch.equal(whole, sketches.probes(4, 7, 2, seed=1, step=3))
    assert sketches.probes(2, 3, 1, seed=0, distribution="rademacher").abs().eq(1).all()
    assert sketches.probes(2, 3, 1, seed=0, like=torch.zeros((), dtype=torch.float64)).dtype == torch.float64
    assert sketches.probes(2, 0, 3, seed=0).shape == (2, 0, 3)


@pytest.mark.parametrize("m", [0, -1, 2.5, True, "3"])
def test_bad_count(m):
    for make in (sketches.gaussian, sketches.rademacher, lambda m, seed: sketches.probes(m, 2, 2, seed=seed)):
        with pytest.raises(ValueError, match="m: expected a positive integer"):
            make(m, 0)


def test_bad_distribution():
    with pytest.raises(ValueError, match="cauchy"):
        sketches.RandomDirections(3, 0, "cauchy")
    with pytest.raises(ValueError, match="cauchy"):
        sketches.probes(3, 2, 2, seed=0, distribution="cauchy")


def test_count_sketch_is_linear_and_wraps():
    vectors = {"a": torch.randn(3, 5, 9), "b": torch.randn(3, 100), "c": torch.randn(3)}
    other = {name: torch.randn_like(value) for name, value in vectors.items()}
    both = {name: 2 * value - other[name] for name, value in vectors.items()}
    for size in (7, 64, 500):
        hashed, second, third = (sketches.count_sketch(v, size, seed=3) for v in (vectors, other, both))
        assert hashed.shape == (3, size)
        assert hashed.dtype == torch.float64
        torch.testing.assert_close(third, 2 * hashed - second, rtol=1e-5, atol=1e-5)
        assert not torch.equal(hashed, sketches.count_sketch(vectors, size, seed=4))
    # Each entry goes to one place, with its size; those of a run to different ones.
    ones = {"a": torch.eye(40), "b": torch.zeros(40, 3)}
    hashed = sketches.count_sketch(ones, 11, seed=0)
    torch.testing.assert_close(hashed.abs().sum(1), torch.ones(40, dtype=torch.float64))
    places = hashed.abs().argmax(1)
    for run in places.split(11):
        assert len(set(run.tolist())) == len(run)
    assert 4 < int((hashed.sum(1) > 0).sum()) < 36
    for bad in ({}, {"a": torch.randn(2, 3)}):
        with pytest.raises(ValueError, match=r"expected (vectors|a positive)"):
            sketches.count_sketch(bad, 5 if not bad else 0, seed=0)


def test_count_sketch_keeps_squares():
    vectors = {"a": torch.randn(1, 300).exp(), "b": torch.randn(1, 41, 7)}
    exact = sum(float(value.double().square().sum()) for value in vectors.values())
    size, draws = 50, 2000
    squares = torch.stack([sketches.count_sketch(vectors, size, seed=s).square().sum() for s in range(draws)])
    spread = float(squares.std())
    assert abs(float(squares.mean()) - exact) / (spread / draws**0.5) < 3.5
    assert 0.3 * (2 / size) ** 0.5 < spread / exact < 1.1 * (2 / size) ** 0.5


def splitmix64(key, index):
    """The generator of Steele, Lea and Flood in Python's integers."""
    mask = 2**64 - 1
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_signs_are_the_bits_of_splitmix64():
    found = random.signs("a key", 3, 5, 130, torch.device("cpu"))
    base = random.number("signs/a key")
    for row, stream in zip(found, (3, 4), strict=True):
        key = splitmix64(base, stream)
        bits = [splitmix64(key, word) >> bit & 1 for word in range(3) for bit in range(64)][:130]
        assert row.tolist() == [2.0 * bit - 1 for bit in bits]


@pytest.mark.parametrize("width", [1, 5, 64, 100, 128])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_rows_are_those_of_the_whole(distribution, width):
    S, like = sketches.RandomDirections(6, 2, distribution), torch.zeros(50, width)
    rows = torch.tensor([49, 0, 7, 7, 31])
    found = S.rows("weight", like, 1, 5, rows)
    assert torch.equal(found, S.block("weight", like, 1, 5)[:, rows])


def test_signs_in_pieces(monkeypatch):
    whole = random.signs("key", 0, 9, 700, torch.device("cpu"))
    monkeypatch.setattr(random, "_AT_ONCE", 1000)
    assert torch.equal(random.signs("key", 0, 9, 700, torch.device("cpu")), whole)


def test_joined_directions():
    one, two, like = sketches.gaussian(3, 0), sketches.rademacher(4, 1), torch.zeros(2, 5)
    S = JoinedDirections(one, two)
    whole = torch.cat([one.block("w", like, 0, 3), two.block("w", like, 0, 4)])
    assert S.m == 7
    for start, stop in ((0, 7), (0, 3), (2, 5), (3, 7), (4, 4)):
        assert torch.equal(S.block("w", like, start, stop), whole[start:stop])
