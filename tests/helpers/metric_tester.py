"""What torchmetrics promises of a metric, checked for every row of metric_rows.METRICS.

As `python metric_tester.py RANK STORE OUT ROWS` it is one of two gloo processes, each of which is shown its own share:
of the rows that ROWS names, in json.
"""

import copy
import io
import json
import pickle
import traceback

import matplotlib as mpl
import pytest
import torch
from metric_rows import METRICS, numbers, same
from ranks import report
from sklearn.datasets import load_digits
from torch import nn
from torchmetrics import BootStrapper, MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers.bootstrapping import _bootstrap_sampler


class MetricTester:
    """One row of METRICS, on one process or as one of two. Each property is a method `check_...`."""

    def __init__(self, row, rank=0, world=1, device="cpu"):
        torch.manual_seed(0)
        self.row, self.rank, self.world = row, rank, world
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)
        x, y = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 7 % 3
        rows = [slice(start, start + 6) for start in range(0, 24, 6)]
        self.batches = [{"inputs": x[cut].to(device), "target": y[cut].to(device)} for cut in rows]
        if "groups" in row.options:
            for batch in self.batches:
                batch["group"] = (torch.arange(6) % 2).to(device)
        self.shares = [self.batches[r::world] for r in range(world)]
        self.mine = self.shares[rank]

    def make(self, **options):
        return self.row.make(self.model, **options)

    def alone(self):
        """A metric that knows nothing of other ranks."""
        return self.make(sync_on_compute=False)

    def moments(self):
        """As many moments as the row has, with other weights from one to the next."""
        for moment in range(self.row.of.moments):
            if moment:
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        change = 0.1 * torch.cos(torch.arange(parameter.numel()) + moment)
                        parameter.add_(change.to(parameter).view_as(parameter))
            yield moment

    def feed(self, *pairs):
        """Show batches to metrics, in step, at each moment."""
        for _ in self.moments():
            for metric, batches in pairs:
                for batch in batches:
                    metric.update(**batch)

    def fed(self, **options):
        """A metric with this rank's share, and what it should compute."""
        metric, whole = self.make(**options), self.alone()
        self.feed((metric, self.mine), (whole, self.batches))
        return metric, whole.compute()

    def check_value(self):
        metric, whole = self.make(), self.alone()
        self.feed((metric, self.mine), (whole, self.batches))
        expected = whole.compute()
        before = {k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in metric.metric_state.items()}
        same(metric.compute(), expected)
        if hasattr(metric, "standard_error"):
            same(metric.standard_error(), whole.standard_error())
        for name, state in metric.metric_state.items():  # this rank's own are back
            torch.testing.assert_close(state, before[name], rtol=0, atol=0)
        assert not any(number == 0 for number in numbers(expected)) or "exact" in self.row.options.values()

    def check_forward(self):
        metric, whole = self.make(), self.alone()
        for _ in self.moments():
            for batch in self.mine:
                one = self.alone()
                one.update(**batch)
                same(metric(**batch), one.compute())
            for batch in self.batches:
                whole.update(**batch)
        same(metric.compute(), whole.compute())
        assert metric.update_count == self.row.of.moments * len(self.mine)

    def check_reset(self):
        metric, _ = self.fed()
        metric.compute()
        metric.reset()
        with pytest.raises(ValueError, match="no examples"), pytest.warns(UserWarning, match="before the ``update``"):
            metric.compute()
        whole = self.alone()
        self.feed((metric, self.mine), (whole, self.batches))
        same(metric.compute(), whole.compute())

    def check_clone(self):
        metric, expected = self.fed()
        clone = metric.clone()
        same(clone.compute(), expected)
        clone.reset()
        assert clone._features.model is self.model
        same(metric.compute(), expected)
        with torch.no_grad():
            self.model[0].weight.mul_(2)
        fresh = self.alone()
        self.feed((clone, self.mine), (fresh, self.batches))
        same(clone.compute(), fresh.compute())
        parent = nn.Module()
        parent.net, parent.metric = self.model, metric
        copied = copy.deepcopy(parent)
        assert copied.metric._features.model is copied.net

    def check_collection(self):
        other = self.row._replace(options={**self.row.options, **self.row.different})
        single = {"one": self.make(), "twin": self.make(), "other": other.make(self.model)}
        collection = MetricCollection({name: metric.clone() for name, metric in single.items()})
        whole = {name: metric.clone() for name, metric in single.items()}
        for metric in whole.values():
            metric.sync_on_compute = metric._to_sync = False
        self.feed(
            (collection, self.mine),
            *((metric, self.mine) for metric in single.values()),
            *((metric, self.batches) for metric in whole.values()),
        )
        groups = sorted(sorted(group) for group in collection.compute_groups.values())
        assert groups == [["one", "twin"], ["other"]]
        for name, metric in single.items():
            same(metric.compute(), whole[name].compute())
            found = collection[name].compute()
            same(found, whole[name].compute())
        assert collection.compute()
        collection.reset()
        assert sorted(sorted(group) for group in collection.compute_groups.values()) == groups
        names = [frozenset(metric.metric_state) for metric in single.values()]
        assert names[0] == names[1] != names[2]

    def check_tracker(self):
        tracker = MetricTracker(self.make(), maximize=None if self.make().higher_is_better is not None else True)
        expected = []
        for _ in range(2):
            tracker.increment()
            whole = self.alone()
            self.feed((tracker, self.mine), (whole, self.batches))
            expected.append(whole.compute())
            same(tracker.compute(), expected[-1])
        everything = tracker.compute_all()
        if self.row.scalar:
            torch.testing.assert_close(everything, torch.stack(expected), rtol=1e-10, atol=0)
            best = max(expected) if tracker.maximize else min(expected)
            assert tracker.best_metric() == pytest.approx(float(best), rel=1e-10)
        elif isinstance(expected[0], dict) and isinstance(next(iter(expected[0].values())), torch.Tensor):
            for name, value in everything.items():
                torch.testing.assert_close(value, torch.stack([e[name] for e in expected]), equal_nan=True)
        else:
            same(everything, expected)

    def check_bootstrapper(self):
        """Each copy is the metric of its own resampled examples, on all ranks; what is no scalar is refused."""
        copies, batches = 3, [share[0] for share in self.shares]
        boot = BootStrapper(self.make(), num_bootstraps=copies, raw=True, sampling_strategy="multinomial")
        torch.manual_seed(self.rank)
        boot.update(**batches[self.rank])
        if not self.row.scalar:
            with pytest.raises(TypeError, match="expected Tensor as element 0"):
                boot.compute()
            return
        references = [self.alone() for _ in range(copies)]
        for rank, batch in enumerate(batches):
            torch.manual_seed(rank)
            for reference in references:
                rows = _bootstrap_sampler(6, sampling_strategy="multinomial")
                reference.update(**{name: value[rows] for name, value in batch.items()})
        expected = torch.stack([reference.compute() for reference in references])
        torch.testing.assert_close(boot.compute()["raw"], expected, rtol=1e-10, atol=0)
        assert self.row.of.moments > 1 or expected.std() > 0

    def check_pickle(self):
        metric, expected = self.fed()
        restored = pickle.loads(pickle.dumps(metric))
        with pytest.raises(RuntimeError, match="bind"):
            restored.update(**self.mine[0])
        restored.bind(self.model)
        same(restored.compute(), expected)
        restored.update(**self.mine[0])
        assert restored.update_count == metric.update_count + 1

    def check_state_dict(self):
        metric, _ = self.fed()
        assert metric.state_dict() == {}
        assert [*metric.parameters(), *metric.buffers(), *metric.children()] == []
        metric.eval()
        assert self.model.training

    def check_persistent(self):
        metric, expected = self.fed()
        metric.persistent(True)
        file = io.BytesIO()
        torch.save(metric.state_dict(), file)
        file.seek(0)
        other = self.make()
        other.persistent(True)
        other.load_state_dict(torch.load(file, weights_only=True))
        for one in (metric, other):
            one.update(**self.mine[0])
        same(other.compute(), metric.compute())
        if self.row.of.number is not None:
            assert numbers(other.compute()) != numbers(expected)

    def check_set_dtype(self):
        metric, expected = self.fed()
        metric.half().float()  # torchmetrics: without effect
        assert metric.set_dtype(torch.float32) is metric
        same(metric.compute(), expected, rtol=1e-4)
        for batch in self.mine:
            metric.update(**batch)
        metric.compute()
        # Differences of far larger sums stay in double precision.
        kept = torch.float64 if self.row.options.get("unbiased") else torch.float32
        for name, state in metric.metric_state.items():
            if name.startswith(("gram", "pullback", "unlabeled", "open")):
                assert state.dtype == (torch.float32 if name.startswith("unlabeled") else kept), name
        metric.reset()
        assert all(not v.is_floating_point() for name, v in metric.metric_state.items() if name.startswith("binding"))
        metric.set_dtype(torch.float64)
        whole = self.alone()
        self.feed((metric, self.mine), (whole, self.batches))
        same(metric.compute(), whole.compute())
        with pytest.raises(ValueError, match=r"expected torch.float32 or torch.float64"):
            metric.set_dtype(torch.bfloat16)
        assert next(self.model.parameters()).dtype == torch.float64

    def check_device(self):
        device = next(self.model.parameters()).device
        metric, whole = self.make().to(device), self.alone()
        self.feed((metric, self.mine), (whole, self.batches))
        assert all(value.device.type == device.type for value in states(metric))
        moved = metric.to("cpu")
        same(moved.compute(), _cpu(whole.compute()))

    def check_compute_on_cpu(self):
        metric, expected = self.fed(compute_on_cpu=True)
        same(metric.compute(), expected)

    def check_sync_on_compute(self):
        metric, own = self.make(sync_on_compute=False), self.alone()
        other = self.make(distributed_available_fn=lambda: False)
        self.feed((metric, self.mine), (own, self.mine), (other, self.mine))
        same(metric.compute(), own.compute())
        same(other.compute(), own.compute())
        if hasattr(metric, "standard_error"):
            same(metric.standard_error(), other.standard_error())

    def check_dist_sync_on_step(self):
        metric, whole = self.make(dist_sync_on_step=True), self.alone()
        for share in self.shares:
            whole.update(**share[0])
        same(metric(**self.mine[0]), whole.compute())

    def check_plot(self):
        metric, expected = self.fed()
        figure, axes = metric.plot()
        assert figure is not None
        self.row.of.drawn(metric, expected, axes, torch.cat([batch["inputs"] for batch in self.batches]))
        mpl.pyplot.close("all")

    def check_hash(self):
        metric, _ = self.fed()
        assert hash(metric) == hash(metric)
        assert hash(metric) != hash(self.make())
        assert len({metric, metric, self.make()}) == 2

    def check_keywords_beside_accuracy(self):
        collection = MetricCollection({"ours": self.make(), "accuracy": MulticlassAccuracy(3, average="micro")})
        whole = self.alone()
        for batch in self.mine:
            collection.update(preds=self.model(batch["inputs"]).detach(), **batch)
        for batch in self.batches:
            whole.update(**batch)
        same(collection["ours"].compute(), whole.compute())
        found = collection.compute()
        value = whole.compute()
        assert {*(value if isinstance(value, dict) else ["ours"]), "accuracy"} <= set(found)
        right = torch.cat([self.model(batch["inputs"]).argmax(1) == batch["target"] for batch in self.batches])
        assert float(found["accuracy"]) == pytest.approx(float(right.double().mean()))
        with pytest.raises(ValueError, match="grad_fn"):
            collection.update(self.model(self.mine[0]["inputs"]), self.mine[0]["target"])

    def check_merge_state(self):
        one, other, whole = self.alone(), self.alone(), self.alone()
        self.feed((one, self.batches[:1]), (other, self.batches[1:]), (whole, self.batches))
        if self.row.of.moments > 1:  # parts of a path have no order
            with pytest.raises(RuntimeError, match="merge_state"):
                one.merge_state(other)
            return
        one.merge_state(other)
        same(one.compute(), whole.compute())

    def check_inference_mode(self):
        metric, whole = self.make(), self.alone()
        for batch in self.mine:
            with torch.inference_mode():
                metric.update(**{name: value.clone() for name, value in batch.items()})
        for batch in self.batches:
            whole.update(**batch)
        with torch.inference_mode():
            same(metric.compute(), whole.compute())

    def check_class_attributes(self):
        metric = self.make()
        for name in ("higher_is_better", "is_differentiable", "full_state_update"):
            with pytest.raises(RuntimeError, match="const"):
                setattr(metric, name, not getattr(metric, name))
        assert not metric.is_differentiable
        assert not any(value.requires_grad for value in states(metric))


def states(metric):
    return [t for value in metric.metric_state.values() for t in (value if isinstance(value, list) else [value])]


def _cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: _cpu(part) for name, part in value.items()}
    return type(value)(*(_cpu(part) for part in value))


PROPERTIES = [name.removeprefix("check_") for name in vars(MetricTester) if name.startswith("check_")]


def digits(row, batches):
    """Feed batches of the 1,797 digits, here with one output, to a metric."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    options = {**row.options, "target_mean": [0.5]} if "target_mean" in row.options else row.options
    more = {"max_examples": len(x)} if "max_examples" in row.different else {}
    metric = row._replace(options=options).make(model, num_outputs=1, **more)
    for moment in range(row.of.moments):
        with torch.no_grad():
            model[0].weight += 0.01 * moment
        for start in range(0, len(x), 100):
            if start // 100 in batches:
                cut = slice(start, start + 100)
                group = {"group": torch.arange(len(x[cut])) % 2} if "groups" in row.options else {}
                metric.update(inputs=x[cut], target=y[cut] % 2, **group)
    return numbers(metric.compute())


SHARES = {"1000 and 797": [range(10), range(10, 18)], "1797 and none": [range(18), []]}


def work(rank, _, rows):
    found = {}
    for name in json.loads(rows):
        row = METRICS[name]
        for wanted in PROPERTIES:
            try:
                getattr(MetricTester(row, rank, 2), f"check_{wanted}")()
                found[f"{name}/{wanted}"] = "right"
            except Exception:  # noqa: BLE001 - the test reports it
                found[f"{name}/{wanted}"] = traceback.format_exc()
        for share, batches in SHARES.items():
            found[f"{name}/digits/{share}"] = digits(row, batches[rank])
    return found


if __name__ == "__main__":
    report(work)
