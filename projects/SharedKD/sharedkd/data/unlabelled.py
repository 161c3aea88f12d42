"""Images without labels: those below a folder, or those of them that a json lists."""

import os
from typing import Any, Collection, Dict, Iterator, List, Optional, Sequence, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from sharedkd.errors import ConfigError

from .images import check_depth, is_deep, is_thin, match_files, unreadable, upright_size
from .notes import Notes, Reading
from .repair import read_json, settle_images

__all__ = ["images_of", "read_unlabelled", "register_unlabelled"]

Record = Dict[str, Any]  #: a dataset dict of Detectron2


def read_unlabelled(
    folders: Sequence[str],
    json_file: Optional[str],
    labelled: Collection[str],
    held_out: Collection[str],
    key: str,
    json_key: str,
    reading: Reading = Reading(),
) -> Tuple[List[Record], List[ConfigError]]:
    """Find images to learn from without labels.

    Args:
        folders: their folders, and all below.
        json_file: a COCO json whose images are meant, by ``file_name`` in the one folder; annotations are not read.
            None: all images of the folders.
        labelled, held_out: absolute names of the images that are trained and evaluated on.  They are left
            out.
        key, json_key: the config keys of the two, for messages.
        reading: how the run reads images.

    Returns:
        their dataset dicts, in the order of their names, and warnings of what was left out.

    Raises:
        ConfigError: no such folder or file, no image is left, or one whose values cannot be scaled to 8 bits.
    """
    notes = Notes(key, ", ".join(folders), reading)
    listed = Notes(json_key, json_file or "", reading)
    if json_file is not None:
        found = images_of(json_file, folders[0], listed, key)
    else:
        found = sorted({path for folder in folders for path in _below(folder, key)})
    labelled, held_out = ({os.path.realpath(x) for x in some} for some in (labelled, held_out))
    left_out: Dict[str, List[str]] = {}
    records: List[Record] = []
    deep: List[Tuple[Record, str]] = []
    for path in found:
        place = os.path.realpath(path)
        if place in labelled or place in held_out:
            reason = "are trained on with their labels" if place in labelled else "are evaluated on"
            left_out.setdefault(reason, []).append(path)
            continue
        record, mode, problem = _record(path, reading.max_size)
        if record is None:
            left_out.setdefault("cannot be used", []).append(f"{path}: {problem}")
            continue
        records.append({**record, "image_id": len(records)})
        if is_deep(mode):
            deep.append((record, mode))
    check_depth(deep, "", key, notes)
    broken = left_out.get("cannot be used", [])
    if broken and not reading.repair:
        notes.refuse(broken[0], "repair or remove it, or use data.repair=True")
    if notes.errors:
        raise notes.errors[0]
    if not records:
        words = [f"{len(paths)} {reason}" for reason, paths in left_out.items()]
        problem = f"has no image without labels ({', '.join(words) or 'there is none at all'})"
        raise ConfigError(key, notes.json_file, problem, "name a folder of other images")
    for reason, paths in left_out.items():
        problem = f"{len(paths)} of {len(found)} images {reason} (the first is {paths[0]})"
        notes.warn(problem, "they are left out")
    return records, [*notes.warnings, *listed.repair_warnings]


def register_unlabelled(name: str, records: List[Record]) -> None:
    """Make ``name`` a Detectron2 data set of these dataset dicts; one of that name is replaced."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    DatasetCatalog.register(name, lambda: records)


def _below(folder: str, key: str) -> Iterator[str]:
    """The absolute names of the files below a folder that are images by their extension."""
    if not os.path.isdir(folder):
        raise ConfigError(key, folder, "no such folder", "name the folder of the images")
    extensions = {x for x, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for place, folders, files in os.walk(os.path.abspath(folder), followlinks=True):
        folders[:] = [x for x in folders if not x.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                yield os.path.join(place, name)


def images_of(json_file: str, folder: str, notes: Notes, key: str) -> List[str]:
    """The absolute names of the files that the images of a json in COCO format mean, in order.

    Args:
        json_file: its annotations are not read.
        folder: of the images.
        notes: with the key of the json, for messages.
        key: of the folder.

    Raises:
        ConfigError: no such file, no images in it, or one that is not in the folder.
    """
    document, there = read_json(notes, ["images"]), []
    if document is not None:
        settle_images(document, notes)
        there = match_files([x for x in document["images"] if x["sound"]], folder, key, notes)
    if notes.errors:
        raise notes.errors[0]
    return sorted({os.path.abspath(os.path.join(folder, x["file_name"])) for x in there})


def _record(path: str, max_size: Optional[int]) -> Tuple[Optional[Record], str, str]:
    """(dataset dict of an image, its mode, ""), or (None, "", why it cannot be used)."""
    try:
        with Image.open(path) as picture:
            (width, height), mode = upright_size(picture), picture.mode
            problem = unreadable(picture)
    except Exception as e:  # Pillow's decoders raise what they please
        return None, "", f"cannot be read as an image ({e})"
    if problem or is_thin(width, height, max_size):
        return None, "", problem or f"has no side left once its longer one is {max_size}"
    return {"file_name": path, "height": height, "width": width}, mode, ""
