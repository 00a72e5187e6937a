"""Losses on two gloo processes; and every loss with every kind of model in every way of training."""

import pytest
import torch
from distributed_worker import replica
from loss_cases import LOSSES, make
from loss_matrix import COLUMNS, ROWS, gradient, verdict
from loss_worker import SHARES, SYNC, WRAPPERS, normalized, whole_batch
from ranks import run_two


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_two("loss_worker.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ROWS)
def test_right_or_a_clear_error(two_ranks, name, column):
    """The gradient of the formula, or an error that says what is wrong; nothing else."""
    for found in two_ranks[: 2 if column in WRAPPERS else 1]:
        if column in WRAPPERS:
            verdicts = {kind: found["matrix"][f"{name}/{kind}/{column}"] for kind in LOSSES}
        else:
            verdicts = verdict(name, column)
        assert verdicts == dict.fromkeys(LOSSES, "right")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("options", SYNC)
@pytest.mark.parametrize("kind", LOSSES)
def test_synced_gradient_is_that_of_the_whole_batch(two_ranks, kind, options, share):
    own = dict(SYNC[options])
    dtype = own.pop("dtype", torch.float64)
    x, y, _ = whole_batch(share, dtype)
    model = replica().to(dtype)
    value = make(kind, model, weight=0.3, probes=8, **own)(x, y)
    value.backward()
    expected = gradient(model)
    bound = 1e-11 if dtype == torch.float64 else 1e-6
    for found in two_ranks:
        at = f"{kind}/{options}/{share}"
        difference = float((torch.tensor(found["synced"][at], dtype=torch.float64) - expected).norm() / expected.norm())
        print(f"{at}: {difference:.1e}")
        assert difference <= bound
        assert found["synced"][f"{at}/value"] == pytest.approx(float(value.detach()), rel=bound)
        sent, parameters = found["synced"][f"{at}/sent"]
        if LOSSES[kind].probes:
            assert sent <= (8 + LOSSES[kind].labeled) * parameters + 8 * (3 + 1) + 3 + 2 + 2
        else:
            assert sent <= max(SHARES[share]) * (4 + 3) + 1  # examples and targets, padded


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", LOSSES)
def test_statistics_over_ranks(two_ranks, kind, share):
    x, y, _ = whole_batch(share, torch.float64)
    model = normalized(torch.nn.BatchNorm1d)
    make(kind, model, weight=0.3, probes=8)(x, y).backward()
    for found in two_ranks:
        got = torch.tensor(found["normalized"][f"{kind}/{share}"], dtype=torch.float64)
        torch.testing.assert_close(got, gradient(model), rtol=1e-9, atol=1e-12)
        assert found["normalized"][f"{kind}/own"] < 1e-12


@pytest.mark.parametrize("kind", LOSSES)
def test_ranks_agree_on_what_is_not_finite(two_ranks, kind):
    one, other = (found["not finite"] for found in two_ranks)
    assert one == other
    name = "NonFiniteGradientError" if LOSSES[kind].probes else "NonFiniteOutputError"
    assert one[f"{kind}/raise"][:2] == [name, 2]
    assert one[f"{kind}/skip"][:2] == [0.0, 2]
    assert one[f"{kind}/skip"][2] != 0


@pytest.mark.parametrize("kind", LOSSES)
def test_ranks_clip_alike(two_ranks, kind):
    for found in two_ranks:
        angle, ratio = found["clipped"][kind]
        assert angle < 1e-9
        assert ratio < 0.5


def test_synced_and_accumulated(two_ranks):
    x, y, _ = whole_batch("even", torch.float64)
    model = replica()
    reg = make("alignment", model, weight=0.3, probes=8)
    (reg(x, y) + reg(x, y)).backward()
    for found in two_ranks:
        got = torch.tensor(found["synced"]["accumulated"], dtype=torch.float64)
        torch.testing.assert_close(got, gradient(model), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", ["plain", "sub-batch"])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_of_a_loss_is_the_mean_over_ranks(two_ranks, kind, options):
    for found in two_ranks:
        assert found[f"{kind}/gradient/{options}"] < 1e-12
        assert found[f"{kind}/gradient/{options}/ranks"] > 0.01  # they differ before


def test_each_rank_draws_its_own(two_ranks):
    for found in two_ranks:
        assert found["own examples"] > 0.5
        assert found["own probes"] == 1


@pytest.mark.parametrize("kind", LOSSES)
def test_replicas_stay_equal(two_ranks, kind):
    assert [found[f"{kind}/replicas"] for found in two_ranks] == [[True, 20]] * 2


@pytest.mark.parametrize("kind", LOSSES)
def test_unsynced_ways_raise_and_others_do_not(two_ranks, kind):
    for found in two_ranks:
        ways = found[f"{kind}/ways"]
        for way in ("together", "regularizer_first_no_sync", "accumulated"):
            assert ways[way] is True, way
        for way in ("alone", "task_first", "regularizer_first", "past_the_wrapper"):
            assert "call backward() once" in str(ways[way]), way


@pytest.mark.parametrize("name", ["compiled", "compiled inside", "static graph", "bucket views", "opaque output"])
def test_losses_know_ddp_in_other_forms(two_ranks, name):
    assert [found[f"wrapper/{name}"] for found in two_ranks] == [True, True]


def test_bare_model_among_several_processes_warns_once(two_ranks):
    for found in two_ranks:
        assert len(found["bare model"]) == 1


@pytest.mark.parametrize("kind", LOSSES)
def test_sharded_models_have_the_gradient_of_the_whole_batch(two_ranks, kind):
    x, y, _ = whole_batch("uneven", torch.float64)
    for times, orders in ((1, ("before", "after", "after, at once")), (2, ("accumulated",))):
        model = replica()
        reg = make(kind, model, weight=0.3, probes=8)
        sum(reg(x, y) for _ in range(times)).backward()
        for found in two_ranks:
            for order in orders:
                got = torch.tensor(found[f"sharded/{kind}/{order}"], dtype=torch.float64)
                torch.testing.assert_close(got, gradient(model), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_sharded_models_train_as_replicas_do(two_ranks, kind):
    for found in two_ranks:
        assert found[f"sharded/{kind}/trained"] < 1e-12


def test_what_sharded_models_cannot(two_ranks):
    for found in two_ranks:
        assert "sharded by fully_shard" in found["sharded/metric"]
        assert "Leave outputs out" in found["sharded/outputs"]
        assert "over 1 of 2 ranks" in found["sharded/part"]
        assert "a DTensor layout" in found["sharded/tensor parallel"]
        assert found["sharded/reused"] == [True, ["outputs:"]]
        assert found["sharded/kernel"] < 1e-12
