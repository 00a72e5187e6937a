"""Image data sets from the Hub or a folder, through the package datasets; no code that comes with them is run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.bundled import Split


class Source(NamedTuple):
    """The name of a data set on the Hub, and its schema."""

    name: str
    image: str
    label: str
    mode: str
    """Mode of the images: "L" for one channel, "RGB" for three."""
    classes: int = 10


SOURCES = {
    "mnist": Source("ylecun/mnist", "image", "label", "L"),
    "kmnist": Source("tanganke/kmnist", "image", "label", "L"),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", "image", "label", "L"),
    "cifar10": Source("uoft-cs/cifar10", "img", "label", "RGB"),
    "cifar100": Source("uoft-cs/cifar100", "img", "fine_label", "RGB", classes=100),
}
SPLITS = ("train", "test")


def load(name: str, data_path: str | None) -> Split:
    """Load a data set with inputs ``(n, channels, height, width)`` of type uint8.

    Args:
        name: one of ``SOURCES``.
        data_path: a folder that holds parquet files in the Hub's schema whose names start with the split, the output
            of ``save_to_disk``, or images in ``train/CLASS/`` and ``test/CLASS/``. By default the set comes from the
            Hub.

    Raises:
        ValueError: if the set is not available (the message says what to download and which flag to pass), or not in
            the expected format.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"--dataset {name}: expected the package datasets. Install it: pip install datasets")
    parts = _from_hub(name) if data_path is None else _from_folder(name, Path(data_path))
    tensors: list[Tensor] = []
    for split in SPLITS:
        if split not in parts:
            raise ValueError(f"--dataset {name}: expected the splits train and test, got {', '.join(parts)}.")
        tensors += _tensors(name, parts[split], f"the {split} split")
    return Split(*tensors, num_classes=SOURCES[name].classes)


def _from_hub(name: str) -> Any:
    import datasets  # noqa: PLC0415 - slow, and needed here alone

    hub = SOURCES[name].name
    try:
        return datasets.load_dataset(hub)
    except Exception as error:  # noqa: BLE001
        # Without a network, each layer raises its own class.
        raise ValueError(
            f"--dataset {name}: expected {hub} from the Hub, but {type(error).__name__}: {error}. Online, "
            f"run\n    hf download {hub} --repo-type dataset --local-dir FOLDER\nand pass --data_path FOLDER."
        ) from None


def _from_folder(name: str, folder: Path) -> Any:
    import datasets  # noqa: PLC0415

    expected = (
        f"--data_path: expected a folder with parquet files, a data set that save_to_disk wrote, or images in "
        f"train/CLASS/ and test/CLASS/, for {name}"
    )
    if not folder.is_dir():
        raise ValueError(f"{expected}, but {folder}: No such folder.")
    parquet = {split: _parquet_files(folder, split) for split in SPLITS}
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))
        if all(parquet.values()):
            return datasets.load_dataset("parquet", data_files=parquet)
        if all((folder / split).is_dir() for split in SPLITS):
            return datasets.load_dataset("imagefolder", data_dir=str(folder))
    except Exception as error:  # noqa: BLE001 - each format and kind of damage raises its own class
        raise ValueError(f"{expected}, but {folder}: {type(error).__name__}: {error}") from None
    raise ValueError(f"{expected}, got none of them in {folder}.")


def _parquet_files(folder: Path, split: str) -> list[str]:
    paths = (path for path in folder.rglob("*.parquet") if path.name.startswith((f"{split}-", f"{split}.")))
    return [str(path) for path in sorted(paths)]


def _tensors(name: str, part: Any, where: str) -> tuple[Tensor, Tensor]:
    source = SOURCES[name]
    image = source.image if source.image in part.features else "image"
    label = source.label if source.label in part.features else "label"
    missing = [column for column in (image, label) if column not in part.features]
    if missing:
        have = ", ".join(part.features)
        raise ValueError(f"--dataset {name}: expected columns {image} and {label} in {where}, got {have}.")
    pictures = [np.asarray(picture.convert(source.mode)) for picture in part[image]]
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"--dataset {name}: expected images of one size in {where}, got {sorted(sizes)[:3]}.")
    x = torch.from_numpy(np.stack(pictures))
    x = x[:, None] if source.mode == "L" else x.permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(part[label])
    if int(y.min()) < 0 or int(y.max()) >= source.classes:
        have = f"{int(y.min())} to {int(y.max())}"
        raise ValueError(f"--dataset {name}: expected labels from 0 to {source.classes - 1} in {where}, got {have}.")
    return x, y
