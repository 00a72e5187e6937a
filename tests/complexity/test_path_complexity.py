"""PathComplexity against the sum written out in plain torch."""

import copy
import io
import pickle
from itertools import pairwise

import oracles
import pytest
import torch
from notices import silent
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg.metrics import PathComplexity


class Run:
    """SGD on digits that keeps every weight vector; float64."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).double()
        pixels, labels = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(pixels[:200] / 16), torch.tensor(labels[:200])
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, 0.9)
        self.count = 0
        self.path = [self.weights()]

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()

    def step(self):
        rows = torch.arange(20 * self.count, 20 * self.count + 20) % 200
        self.optimizer.zero_grad()
        cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
        self.optimizer.step()
        self.count += 1
        self.path.append(self.weights())

    def trace(self, n):
        return float(oracles.matrix(oracles.jacobian(self.model, self.x[:n])).square().sum())


RECORDS = [0, 5, 6, 7, 10, 15, 17, 20]


@pytest.fixture(scope="module")
def trajectory():
    """Traces at the records and all weights, independently of the metric."""
    run = Run()
    traces = {}
    for step in range(21):
        if step in RECORDS:
            traces[step] = run.trace(30)
        run.step()
    return run.path, traces


def follow(metric_of, each_step=False):
    run = Run()
    metric = metric_of(run.model)
    for step in range(21):
        if step in RECORDS:
            for start in (0, 12, 25):  # several batches a moment
                metric.update(run.x[start : min(30, start + (13 if start == 12 else 12))])
        if step == 20:
            break
        run.step()
        if each_step:
            metric.step()
    return metric, run


def expected(trajectory, *, official, each_step=False, by_n=False):
    path, traces = trajectory
    total = 0.0
    for start, end in pairwise(RECORDS):
        if each_step:
            length = sum(float((path[t + 1] - path[t]).norm()) for t in range(start, end))
        else:
            length = float((path[end] - path[start]).norm())
        trace = traces[end if official else start] / (30 if by_n else 1)
        total += length * trace**0.5
    return total


@pytest.mark.parametrize("each_step", [False, True])
@pytest.mark.parametrize("convention", ["paper", "official"])
@pytest.mark.parametrize("normalize_by_n", [None, True, False])
def test_value(trajectory, convention, normalize_by_n, each_step):
    """The official convention is ‖δw‖ between records times √(tr K / n) at their end, as the paper's code logs it."""
    metric, _ = follow(
        lambda m: PathComplexity(m, convention=convention, normalize_by_n=normalize_by_n), each_step=each_step
    )
    official = convention == "official"
    by_n = official if normalize_by_n is None else normalize_by_n
    want = expected(trajectory, official=official, each_step=each_step, by_n=by_n)
    print(f"{convention}, by n {by_n}, each step {each_step}: relative error {float(metric.compute()) / want - 1:+.1e}")
    assert float(metric.compute()) == pytest.approx(want, rel=1e-9)


def test_history(trajectory):
    metric, _ = follow(PathComplexity)
    path, traces = trajectory
    history = metric.history()
    chords = [float((path[b] - path[a]).norm()) for a, b in pairwise(RECORDS)]
    torch.testing.assert_close(history.lengths, torch.tensor([*chords, 0.0], dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        history.traces, torch.tensor(list(traces.values()), dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert history.examples.tolist() == [30.0] * len(RECORDS)


def test_open_interval_counts_from_its_start():
    metric, run = follow(PathComplexity)
    closed, trace = float(metric.compute()), run.trace(30)
    run.step()
    metric.step()
    way = float((run.path[-1] - run.path[-2]).norm())
    assert float(metric.compute()) == pytest.approx(closed + way * trace**0.5, rel=1e-9)
    official, run = follow(lambda m: PathComplexity(m, convention="official"))
    closed = float(official.compute())
    run.step()
    official.step()
    assert float(official.compute()) == closed  # it has no end yet


def test_unchanged_weights_add_to_the_moment():
    run = Run()
    metric = PathComplexity(run.model)
    metric.update(run.x[:10])
    metric.step()
    metric.update(run.x[10:30])
    assert metric.compute() == 0
    history = metric.history()
    assert history.examples.tolist() == [30.0]
    assert float(history.traces) == pytest.approx(run.trace(30), rel=1e-12)


def test_reset_begins_a_new_path():
    metric, run = follow(PathComplexity)
    metric.reset()
    run.step()
    metric.step()  # no path yet
    metric.update(run.x[:30])
    assert metric.compute() == 0
    trace = run.trace(30)
    run.step()
    metric.update(run.x[:30])
    way = float((run.path[-1] - run.path[-2]).norm())
    assert float(metric.compute()) == pytest.approx(way * trace**0.5, rel=1e-9)


def test_params():
    run = Run()
    metric = PathComplexity(run.model, params="2.*")
    metric.update(run.x[:5])
    trace = float(oracles.matrix(oracles.jacobian(run.model, run.x[:5], names={"2.weight", "2.bias"})).square().sum())
    run.step()
    metric.update(run.x[:5])
    way = float((run.path[1] - run.path[0])[-130:].norm())
    assert float(metric.compute()) == pytest.approx(way * trace**0.5, rel=1e-9)


@pytest.mark.parametrize("at", [0, 7, 13, 20])
def test_resume_is_exact(at):
    """The path goes on in a new process: through bytes that are loaded without running code."""
    whole, _ = follow(PathComplexity, each_step=True)
    run = Run()
    metric = PathComplexity(run.model)
    metric.persistent(True)
    for step in range(21):
        if step in RECORDS:
            metric.update(run.x[:12])
            metric.update(run.x[12:25])
            metric.update(run.x[25:30])
        if step == at:
            file = io.BytesIO()
            torch.save(metric.state_dict(), file)
            file.seek(0)
            metric = PathComplexity(run.model)
            metric.persistent(True)
            metric.load_state_dict(torch.load(file, weights_only=True))
        if step < 20:
            run.step()
            metric.step()
    metric.update(run.x[:1])
    whole.update(run.x[:1])
    assert float(metric.compute()) == float(whole.compute())
    for mine, theirs in zip(metric.history(), whole.history(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_pickled_path_goes_on():
    metric, run = follow(PathComplexity)
    before = float(metric.compute())
    restored = pickle.loads(pickle.dumps(metric))
    restored.bind(run.model)
    run.step()
    for one in (metric, restored):
        one.update(run.x[:10])
    assert restored.compute() == metric.compute() > before


def test_nothing_changes_on_bad_input():
    metric, run = follow(PathComplexity)
    before, states = float(metric.compute()), copy.deepcopy(metric.metric_state)
    run.step()
    cases = [
        (run.x[:0], ValueError, "at least one example"),
        (run.model(run.x[:5]), ValueError, "grad_fn"),
        (run.x[:5] * torch.nan, ValueError, "NaN or inf"),
        ("digits", TypeError, "got str"),
    ]
    for inputs, error, message in cases:
        with pytest.raises(error, match=message):
            metric.update(inputs)
        torch.testing.assert_close(metric.metric_state, states, rtol=0, atol=0)
    metric._computed = None
    assert float(metric.compute()) == before
    with pytest.raises(ValueError, match="no examples"), pytest.warns(UserWarning, match="before the ``update``"):
        PathComplexity(run.model).compute()
    with pytest.raises(ValueError, match="'paper' or 'official'"):
        PathComplexity(run.model, convention="mine")


def test_a_step_before_the_first_update_warns():
    net = torch.nn.Linear(2, 1)
    path = PathComplexity(net)
    with pytest.warns(UserWarning, match="the path begins with the first update"):
        path.step()
    path.update(torch.ones(3, 2))
    with silent():
        path.step()
