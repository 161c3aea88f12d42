"""Images for a training loader, and what it delivers."""

import itertools
import random

import numpy as np
import torch
from PIL import Image

from sharedkd.data.loader import build_train_loader


def pictures(folder, sizes):
    """Records of images of noise with these heights and widths."""
    generator = np.random.default_rng(0)
    records = []
    for index, (height, width) in enumerate(sizes):
        path = str(folder / f"{index}.jpg")
        noise = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, quality=95)
        records.append(dict(file_name=path, image_id=index, height=height, width=width))
    return records


def loader_of(records, **options):
    return build_train_loader(records, **{"total_batch_size": 2, "seed": 3, **options})


def take(loader, count):
    return list(itertools.islice(loader, count))


def drawn():
    """What the three generators give."""
    return random.random(), np.random.rand(), torch.rand(()).item()


def draws(record):
    """A mapper that loads nothing and shows what the generators give."""
    return record["image_id"], *drawn()
