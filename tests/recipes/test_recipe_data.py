"""What recipes train on: bundled sets, image sets in the Hub's schema, noise, mixtures, augmentation."""

import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from paths import RECIPES
from PIL import Image
from recipe_runs import TINY, load, read, recipe
from safetensors.torch import load_file

SHAPES = {
    "mnist": (1, 28, 28),
    "kmnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
}
# The schemas of the Hub's versions.
COLUMNS = {**dict.fromkeys(SHAPES, ("image", "label")), "cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}


def pictures(name, count, seed=0):
    """Pixels ``(count, height, width[, 3])`` and labels, among them the largest."""
    channels, height, width = SHAPES[name]
    random = np.random.default_rng(seed)
    shape = (count, height, width) if channels == 1 else (count, height, width, 3)
    classes = 100 if name == "cifar100" else 10
    labels = [classes - 1, *random.integers(classes, size=count - 1).tolist()]
    return random.integers(256, size=shape, dtype=np.uint8), labels


def hub_like(name, sizes):
    image, label = COLUMNS[name]
    classes = 100 if name == "cifar100" else 10
    features = {image: datasets.Image(), label: datasets.ClassLabel(num_classes=classes)}
    if name == "cifar100":
        features["coarse_label"] = datasets.ClassLabel(num_classes=20)
    parts = {}
    for split, count in sizes.items():
        pixels, labels = pictures(name, count, seed=len(split))
        columns = {image: [Image.fromarray(p) for p in pixels], label: labels}
        if name == "cifar100":
            columns["coarse_label"] = [0] * count
        parts[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict(parts)


def write(name, kind, folder, train=30, test=20):
    """A small copy of a data set, in one of the three kinds of folders."""
    parts = hub_like(name, {"train": train, "test": test})
    if kind == "arrow":
        parts.save_to_disk(str(folder))
    elif kind == "parquet":
        inner = folder / ("data" if name == "mnist" else "plain_text")
        inner.mkdir(parents=True)
        half = train // 2
        parts["train"].select(range(half)).to_parquet(str(inner / "train-00000-of-00002.parquet"))
        parts["train"].select(range(half, train)).to_parquet(str(inner / "train-00001-of-00002.parquet"))
        parts["test"].to_parquet(str(inner / "test-00000-of-00001.parquet"))
    else:
        image, label = COLUMNS[name]
        for split, part in parts.items():
            for c in range(100 if name == "cifar100" else 10):
                (folder / split / f"{c:02}").mkdir(parents=True)
            for index, row in enumerate(part):
                row[image].save(folder / split / f"{row[label]:02}" / f"{index:04}.png")
        # Folders without an image have no class of their own.
        for split, part in parts.items():
            for c in set(range(100 if name == "cifar100" else 10)) - set(part[label]):
                pixels = np.zeros(SHAPES[name][1:] + ((3,) if SHAPES[name][0] == 3 else ()), np.uint8)
                Image.fromarray(pixels).save(folder / split / f"{c:02}" / "blank.png")
    return parts


@pytest.mark.parametrize("kind", ["parquet", "arrow", "imagefolder"])
@pytest.mark.parametrize("name", SHAPES)
def test_image_sets_from_folders(name, kind, tmp_path):
    module = load("data.examples")
    parts = write(name, kind, tmp_path / "set")
    data = module.load(name, data_path=str(tmp_path / "set"), seed=0)
    image, label = COLUMNS[name]
    assert data.num_classes == (100 if name == "cifar100" else 10)
    for split, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        assert x.shape[1:] == SHAPES[name]
        assert x.dtype == torch.float32
        if kind != "imagefolder":
            assert len(x) == len(parts[split])
            assert sorted(y.tolist()) == sorted(parts[split][label])
    if kind == "imagefolder":
        assert data.train_x.shape[0] >= 30
        assert set(data.train_y.tolist()) == set(range(data.num_classes))
        return
    # Normalized by channel over the training split, and each image with its own label.
    torch.testing.assert_close(data.train_x.mean((0, 2, 3)), torch.zeros(SHAPES[name][0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std((0, 2, 3)), torch.ones(SHAPES[name][0]), atol=1e-5, rtol=0)
    pixels = np.stack([np.asarray(p) for p in parts["train"][image]]).astype(np.float64) / 255
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    mean, std = (f(pixels, axis=(0, 2, 3))[:, None, None] for f in (np.mean, lambda a, axis: np.std(a, axis, ddof=1)))
    for position, row in enumerate(data.rows.tolist()):
        expected = torch.tensor((pixels[row] - mean) / std, dtype=torch.float32)
        torch.testing.assert_close(data.train_x[position], expected, atol=1e-4, rtol=1e-4)
        assert int(data.train_y[position]) == parts["train"][label][row]


def test_folders_that_are_no_data_set(tmp_path):
    load_set = load("data.examples").load
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--data_path: expected a folder with parquet files.*got none of them"):
        load_set("mnist", data_path=str(tmp_path / "empty"), seed=0)
    broken = tmp_path / "broken"
    broken.mkdir()
    for split in ("train", "test"):
        (broken / f"{split}.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"--data_path: expected a folder.*broken: "):
        load_set("mnist", data_path=str(broken), seed=0)
    write("cifar100", "parquet", tmp_path / "cifar100")
    with pytest.raises(ValueError, match="expected columns image and label in the train split, got img"):
        load_set("mnist", data_path=str(tmp_path / "cifar100"), seed=0)
    parts = hub_like("mnist", {"train": 5})
    parts.save_to_disk(str(tmp_path / "half"))
    with pytest.raises(ValueError, match="expected the splits train and test, got train"):
        load_set("mnist", data_path=str(tmp_path / "half"), seed=0)
    sizes = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(np.zeros((s, s), np.uint8)) for s in (4, 5)], "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    datasets.DatasetDict(train=sizes, test=sizes).save_to_disk(str(tmp_path / "sizes"))
    with pytest.raises(ValueError, match=r"expected images of one size in the train split, got \[\(4, 4\), \(5, 5\)\]"):
        load_set("mnist", data_path=str(tmp_path / "sizes"), seed=0)
    many = sizes.select([0, 0]).map(lambda row, i: {"label": 10 * i}, with_indices=True)
    datasets.DatasetDict(train=many, test=many).save_to_disk(str(tmp_path / "many"))
    with pytest.raises(ValueError, match="expected labels from 0 to 9 in the train split, got 0 to 10"):
        load_set("mnist", data_path=str(tmp_path / "many"), seed=0)


def test_without_network_it_says_what_to_fetch(tmp_path):
    command = f"""
from data import examples
for name in {list(SHAPES)}:
    try:
        examples.load(name, seed=0)
    except Exception as error:
        print(repr(str(error)))
"""
    result = subprocess.run(
        [sys.executable, "-c", command],
        cwd=RECIPES,
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""},
    )
    said = result.stdout.splitlines()
    assert len(said) == len(SHAPES), result.stderr
    for name, line in zip(SHAPES, said, strict=True):
        hub = load("data.images").SOURCES[name].name
        assert f"hf download {hub} --repo-type dataset --local-dir FOLDER" in line
        assert "pass --data_path FOLDER" in line


@pytest.mark.usefixtures("recipes_in_this_process")
def test_train_on_images_from_a_folder(tmp_path, monkeypatch):
    write("cifar10", "parquet", tmp_path / "set", train=130, test=30)
    flags = "--dataset cifar10 --augment --train_size 0 --model cnn --hidden 4"
    folders = ["--output_dir", tmp_path / "run", "--data_path", tmp_path / "set"]
    recipe("train", monkeypatch, *TINY.split(), *folders, *flags.split())
    assert len(read(tmp_path / "run")) == 3
    assert load_file(tmp_path / "run" / "examples.safetensors")["rows"].shape == (130,)


def test_mixture_and_difficult_examples():
    load_set = load("data.examples").load
    clean = load_set("digits", train_size=300, seed=4)
    assert not clean.difficult.any()
    mixed = load_set("digits", train_size=300, label_noise=0.2, mix="rotated_digits", mix_size=50, seed=4)
    assert mixed.train_x.shape == (350, 1, 8, 8)
    assert int(mixed.difficult[:300].sum()) == 60
    assert mixed.difficult[300:].all()
    assert torch.equal(mixed.train_x[:300], clean.train_x)
    changed = mixed.train_y[:300] != clean.train_y
    assert not (changed & ~mixed.difficult[:300]).any()
    turned = load("data.bundled").digits()
    rows = mixed.rows[300:]
    assert torch.equal(mixed.train_x[300:], turned.train_x[rows].rot90(dims=(2, 3)))
    assert torch.equal(mixed.train_y[300:], turned.train_y[rows])
    assert torch.equal(mixed.test_x, turned.test_x)
    again = load_set("digits", train_size=300, label_noise=0.2, mix="rotated_digits", mix_size=50, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(mixed, again, strict=True) if isinstance(a, torch.Tensor))


@pytest.mark.usefixtures("recipes_in_this_process")
def test_examples_held_out(tmp_path, monkeypatch):
    load_set = load("data.examples").load
    whole = load_set("digits", seed=3)
    for size in (0, 600):
        held = load_set("digits", train_size=size, val_size=300, label_noise=0.4, seed=3)
        assert (len(held.train_x), len(held.val_x)) == (size or 700, 300)
        assert not set(held.rows.tolist()) & set(held.val_rows.tolist())
        clean = dict(zip(whole.rows.tolist(), whole.train_y.tolist(), strict=True))
        for rows, labels in ((held.rows, held.train_y), (held.val_rows, held.val_y)):
            wrong = sum(clean[row] != label for row, label in zip(rows.tolist(), labels.tolist(), strict=True))
            assert wrong / len(rows) == pytest.approx(0.36, abs=0.06)
        images = dict(zip(whole.rows.tolist(), whole.train_x, strict=True))
        assert all(torch.equal(images[row], x) for row, x in zip(held.val_rows.tolist(), held.val_x, strict=True))
        assert torch.equal(held.test_y, whole.test_y)
    # Of the same seed the same examples, held out or not.
    assert torch.equal(held.rows, load_set("digits", train_size=600, seed=3).rows)
    for sizes, message in (
        ((900, 101), "--train_size: expected at most the 899 training examples of digits, 101 held out, got 900"),
        ((0, 1000), "--val_size: expected at most the 999 training examples of digits, got 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            load_set("digits", train_size=sizes[0], val_size=sizes[1], seed=3)
    flags = [*TINY.split(), "--val_size", 90, "--measure", "held_out"]
    recipe("train", monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert {"val/loss", "val/accuracy", "train/kernel_alignment", "test/kernel_alignment"} < set(
        read(tmp_path / "run")[0]
    )
    assert len(load_file(tmp_path / "run" / "examples.safetensors")["val_rows"]) == 90


def test_shapes_in_the_plane():
    sets = load("data.bundled")
    found = {name: sets.BUNDLED[name]() for name in sets.POINTS}
    x = found["disk"].train_x
    radius = (2 / np.pi) ** 0.5
    for split in found.values():
        assert torch.equal(split.train_x, x)
        assert split.train_y.unique().tolist() == [0, 1]
    inside = found["disk"].train_y.bool()
    assert torch.equal(inside, x.square().sum(1) < radius**2)
    assert torch.equal(found["half_disk"].train_y.bool()[x[:, 0] <= 0], inside[x[:, 0] <= 0])
    assert torch.equal(found["half_disk"].train_y.bool()[x[:, 0] > 0], ~inside[x[:, 0] > 0])
    # A yin and yang turned by half a turn is its own other half.
    grid = torch.rand(4000, 2) * 2 - 1
    grid = grid[grid.norm(dim=1) < radius]
    assert torch.equal(sets._dark(grid), ~sets._dark(-grid))
    eyes = found["yin_yang"].train_y != found["yin_yang_eyes"].train_y
    heads = torch.tensor([[0, radius / 2], [0, -radius / 2]])
    assert torch.equal(eyes, (torch.cdist(x, heads.float()) < radius / 5).any(1))


def test_crops_and_flips():
    crop = load("data.examples").crop_and_flip
    x = torch.arange(1, 2 * 3 * 5 * 6 + 1, dtype=torch.float32).reshape(2, 3, 5, 6)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for draw in range(300):
        out = crop(x, torch.Generator().manual_seed(draw), padding=2)
        for i in range(2):
            places = [
                (down, right, flip)
                for down in range(5)
                for right in range(5)
                for flip in (False, True)
                if torch.equal(out[i], _cut(padded[i], down, right, flip))
            ]
            assert places
            seen.add((places[0], i))
    assert {flip for (_, _, flip), _ in seen} == {False, True}
    assert len({(down, right) for (down, right, _), _ in seen}) == 25
    again = crop(x, torch.Generator().manual_seed(7), padding=2)
    assert torch.equal(again, crop(x, torch.Generator().manual_seed(7), padding=2))


def _cut(image, down, right, flip):
    part = image[:, down : down + 5, right : right + 6]
    return part.flip(-1) if flip else part
