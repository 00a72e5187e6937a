"""Models as training hands them over: DDP, torch.compile, Accelerate; and the metric on each."""

import copy

import pytest
import torch
from cases import build
from oracles import call, double, jacobian, kernel, matrix
from torch import nn

from alignreg import TangentFeatures, sketches
from alignreg.distributed.wrappers import unwrap
from alignreg.metrics import TangentAlignment


@pytest.fixture
def _one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_products_match(features, x, oracle, tolerance=1e-9):
    n, c = next(iter(oracle.values())).shape[:2]
    omega = torch.randn(2, n, c, dtype=torch.float64)
    S = sketches.gaussian(3, seed=0)
    back = features.pullback(x, omega.to(features.outputs(x)))
    worst = 0.0
    for key, value in oracle.items():
        expected = torch.einsum("mnc,nc...->m...", omega, value)
        worst = max(worst, float((back[key] - expected).norm() / matrix(oracle).norm()))
    whole = {key: S.block(key, value[0, 0], 0, 3) for key, value in oracle.items()}
    expected = sum(torch.einsum("nc...,m...->ncm", oracle[key], whole[key]) for key in oracle)
    worst = max(worst, float((features.pushforward(x, S) - expected).norm() / expected.norm()))
    print(f"largest relative difference to the float64 oracle: {worst:.1e}")
    assert worst < tolerance


@pytest.mark.usefixtures("_one_process_group")
def test_ddp():
    model, x, _ = build("mlp")
    oracle = jacobian(model, x)
    wrapped = nn.parallel.DistributedDataParallel(model.double())
    features = TangentFeatures(wrapped)
    assert features.model is model
    assert_products_match(features, double(x), oracle)
    wrapped(double(x)).sum().backward()  # hooks of DDP still fire once
    features.kernel(double(x))


@pytest.mark.parametrize("name", ["mlp", "resnet, batchnorm", "transformer, dict output"])
def test_compiled(name):
    model, x, forward_fn = build(name)
    model = model.double().eval()
    oracle = jacobian(model, x, forward_fn or call)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(double(x))
    features = TangentFeatures(compiled, forward_fn=forward_fn)
    assert features.model is model
    assert_products_match(features, double(x), oracle)


def test_compiled_parts_run_eagerly():
    model, x, _ = build("mlp")
    oracle = jacobian(model, x)
    model = model.double()
    model[0] = torch.compile(model[0], backend="aot_eager")
    model[2].compile(backend="aot_eager")
    model(double(x))
    features = TangentFeatures(model)
    oracle = {
        key: oracle[key.replace("_orig_mod.", "")] for key in features.parameters
    }  # torch.compile renames the parameters of the part
    assert_products_match(features, double(x), oracle)
    torch.testing.assert_close(features.kernel(double(x)), kernel(oracle), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet, batchnorm", "transformer, dict output", "lstm"])
def test_accelerate_bf16(name, monkeypatch):
    """Accelerate patches `forward` with autocast; ours runs in full precision and leaves the patch in place."""
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model, x, forward_fn = build(name)
    oracle = jacobian(model, x, forward_fn or call)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    patched = model.forward
    assert "_original_forward" in model.__dict__
    features = TangentFeatures(prepared, forward_fn=forward_fn)
    assert_products_match(features, x, oracle, tolerance=1e-5)
    assert model.forward is patched
    logits = prepared(x) if forward_fn is None else prepared(x)["logits"]
    full = features.outputs(x)
    assert not torch.equal(logits, full)  # the training forward pass is still bf16
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_unwrap_nested_and_data_parallel():
    net = nn.Linear(2, 1)
    assert unwrap(torch.compile(nn.DataParallel(net))) is net
    assert unwrap(net) is net


@pytest.mark.usefixtures("_one_process_group")
def test_fsdp_is_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model, _, _ = build("mlp")
    with pytest.raises(TypeError, match="FullyShardedDataParallel"):
        TangentFeatures(FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu")))
    inner = nn.Sequential(FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu")))
    with pytest.raises(TypeError, match=r"0 is sharded by FullyShardedDataParallel"):
        TangentAlignment(inner, 3)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(TypeError, match="sharded by fully_shard"):
        TangentAlignment(fully_shard(copy.deepcopy(model), mesh=mesh), 3, method="exact")


def test_deepcopy_and_pickle_of_features():
    import pickle

    model, x, _ = build("mlp")
    features = TangentFeatures(model, params="0.*")
    assert copy.deepcopy(features).model is model
    holder = nn.Module()
    holder.net, holder.features = model, features
    copied = copy.deepcopy(holder)
    assert copied.features.model is copied.net  # copied along: follows the copy
    lost = pickle.loads(pickle.dumps(features))
    with pytest.raises(RuntimeError, match="bind"):
        lost.kernel(x)
    lost.bind(model)
    torch.testing.assert_close(lost.kernel(x), features.kernel(x))
    with pytest.raises(ValueError, match="differ"):
        lost.bind(nn.Sequential(nn.Linear(3, 2)))
    model[0] = nn.Linear(4, 7)
    with pytest.raises(RuntimeError, match="changed shape"):
        features.kernel(x)
