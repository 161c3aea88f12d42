"""Images as people have them: found under the names of a json, of any mode and depth, upright or not."""

import copy
import math
import os
import re
import unicodedata
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple
from urllib.parse import unquote

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from .masks import shown
from .notes import FILE_NAMES, SIZES, Notes

__all__ = [
    "ImageMapper",
    "check_depth",
    "check_headers",
    "enlarged",
    "is_deep",
    "is_thin",
    "match_files",
    "read_image",
    "strong_augmentations",
    "unreadable",
    "upright_size",
]

# Image headers that are read: enough to catch a wrong folder or a resized set within seconds.
_MOST_HEADERS = 1000
_MOST_DECODED = 5  # images of more than 8 bits whose pixels are looked at before training
#: What becomes 0 and 255 of an image of more than 8 bits, by the beginning of its mode.
_RANGES = {"I;16": (0, 65535), "F": (0, 1)}
_EXIF_ORIENTATION, _EXIF_QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


_OF_ANY_SIZE = (
    T.HFlipTransform,
    T.VFlipTransform,
    T.NoOpTransform,
    T.BlendTransform,
    T.ColorTransform,
)


# --- pixels -----------------------------------------------------------------------------------------


def read_image(
    file_name: str, image_format: str, image_range: Optional[Sequence[float]] = None
) -> np.ndarray:
    """The pixels of an image, (H, W, C) uint8 of 0 to 255, turned upright as its EXIF says.

    Args:
        file_name: of a mode that Pillow reads.
        image_format: of the result: a mode of Pillow, or BGR.
        image_range: the values of an image of more than 8 bits that become 0 and 255.  None: 0 to
            65535 for 16 bits, 0 to 1 for floating point.

    Raises:
        ValueError: a TIFF of several pages, or values whose range nobody knows.
    """
    with PathManager.open(file_name, "rb") as f:
        image = Image.open(f)
        problem = unreadable(image)
        if problem:
            raise ValueError(problem)
        image = ImageOps.exif_transpose(image)
        if is_deep(image.mode):
            image = Image.fromarray(_to_8_bits(*_values(image), image_range))
        return utils.convert_PIL_to_numpy(image, image_format)


def is_deep(mode: str) -> bool:
    """Whether an image of a mode of Pillow has more than 8 bits."""
    return mode[0] in "IF"


def unreadable(image: Image.Image) -> str:
    """Why an opened image cannot be used; empty if it can be."""
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    return f"is a TIFF of {pages} pages: save the one that is meant as a file of its own" * (
        pages > 1
    )


def _values(image: Image.Image) -> Tuple[np.ndarray, str]:
    """The values of an image of more than 8 bits, (H, W) float64, and its mode."""
    return np.nan_to_num(np.asarray(image).astype(np.float64)), image.mode


def _to_8_bits(values: np.ndarray, mode: str, image_range: Optional[Sequence[float]]) -> np.ndarray:
    known = _RANGES.get(mode[:4])
    low, high = image_range or known or (0, 0)
    if not image_range and (known is None or values.min() < low or values.max() > high):
        span = f"{values.min():g} to {values.max():g}"
        raise ValueError(f"its mode {mode} has values from {span}: set data.image_range=[lo,hi]")
    scaled = np.clip((values - low) / (high - low), 0, 1) * 255
    return np.round(scaled).astype(np.uint8)


class ImageMapper(DatasetMapper):
    """Detectron2's mapper for images of any depth: those beyond 8 bits are scaled, not cut off.

    Args:
        image_range: see :func:`read_image`.
        larger: a record also has a ``larger_image``, which is ``image`` so many times as large, resized from
            the file's own pixels; for a teacher with this ``scale``.
        strong_augmentation: in training, apply :func:`strong_augmentations` before the others.
        options: of Detectron2's DatasetMapper.
    """

    def __init__(
        self,
        *,
        image_range: Optional[Sequence[float]] = None,
        larger: float = 1,
        strong_augmentation: bool = False,
        **options: Any,
    ):
        strong = strong_augmentation and options["is_train"]
        if strong:
            grey = options["image_format"] == "L"
            options["augmentations"] = [*strong_augmentations(grey), *options["augmentations"]]
        self._cuts_masks = strong and options.get("use_instance_mask", False)
        if self._cuts_masks:
            options["instance_mask_format"] = "bitmask"  # of polygons that leave the image
        super().__init__(**options)
        self.image_range, self.larger = image_range, larger

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        if self.proposal_topk is not None or "sem_seg_file_name" in dataset_dict:
            return super().__call__(dataset_dict)  # which has more to transform; of 8 bits only
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format, self.image_range)
        utils.check_image_size(record, image)
        inputs = T.AugInput(image)
        transforms = self.augmentations(inputs)
        record["image"] = _tensor(inputs.image)
        again = None if self.larger == 1 else enlarged(transforms, self.larger)
        if again is not None:
            record["larger_image"] = _tensor(again.apply_image(image))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, inputs.image.shape[:2])
            instances = record["instances"]
            if self._cuts_masks and instances.has("gt_masks"):  # the box of what is left of a mask
                instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        return record


def strong_augmentations(grey: bool = False) -> List[T.Augmentation]:
    """For long runs: half of the images are cropped, and all change in brightness, contrast and saturation.

    They come before the resizing, so that a teacher with a scale sees the file's own pixels.

    Args:
        grey: images of one channel, without saturation.
    """
    crop = _RandomCrop("relative_range", [0.6, 0.6])
    colours = [T.RandomBrightness, T.RandomContrast, *([] if grey else [T.RandomSaturation])]
    return [T.RandomApply(crop, prob=0.5), *(colour(0.6, 1.4) for colour in colours)]


class _RandomCrop(T.RandomCrop):
    """Detectron2's, whose polygons leave the image uncut: cutting them needs another package."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        x = super().get_transform(image)
        return _Crop(x.x0, x.y0, x.w, x.h, x.orig_w, x.orig_h)


class _Crop(T.CropTransform):
    def apply_polygons(self, polygons: List[np.ndarray]) -> List[np.ndarray]:
        return [self.apply_coords(x) for x in polygons]


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def enlarged(transforms: T.Transform, scale: float) -> Optional[T.TransformList]:
    """The transforms that make the same image ``scale`` times as large.

    Args:
        transforms: what was drawn for an image.

    Returns:
        None if they resize nothing, or change the geometry after that by other than crops and flips.
    """
    found, resized = [], False
    for x in getattr(transforms, "transforms", [transforms]):
        before = scale if resized else 1
        if isinstance(x, T.ResizeTransform):
            sides = [round(n * before) for n in (x.h, x.w)]
            sides += [round(n * scale) for n in (x.new_h, x.new_w)]
            x, resized = T.ResizeTransform(*sides, x.interp), True
        elif isinstance(x, T.CropTransform) and resized:
            x = T.CropTransform(*(round(n * scale) for n in (x.x0, x.y0, x.w, x.h)))
        elif resized and not (
            isinstance(x, _OF_ANY_SIZE) and np.ndim(getattr(x, "src_image", 0)) < 2
        ):
            return None  # or blends the image with another, of its own size
        found.append(x)
    return T.TransformList(found) if resized else None


def is_thin(width: int, height: int, max_size: Optional[int]) -> bool:
    """Whether no side is left of an image whose longer one becomes ``max_size``, if that is known."""
    sides = sorted((width, height))
    return bool(max_size) and int(sides[0] * max_size / sides[1] + 0.5) < 1


# --- files ------------------------------------------------------------------------------------------


class _Folder:
    """The files below a folder; each subfolder is listed once, as look-ups on a network are slow."""

    def __init__(self, root: str):
        self.root = root
        self._listings: Dict[str, Tuple[Set[str], Set[str]]] = {}

    def _list(self, folder: str) -> Tuple[Set[str], Set[str]]:
        """Names of the files and of the folders in it."""
        if folder not in self._listings:
            files, folders = set(), set()
            try:
                with os.scandir(os.path.join(self.root, folder)) as entries:
                    for e in entries:
                        (files if e.is_file() else folders).add(e.name)
            except (OSError, ValueError):
                pass
            self._listings[folder] = files, folders
        return self._listings[folder]

    def has(self, name: str) -> bool:
        folder, base = os.path.split(name)
        return base in self._list(folder)[0]

    def find(self, name: str) -> Optional[str]:
        """The one file that ``name`` means, relative to the folder.

        It may be written for another system or as part of a URL, and begin with folders above this one:
        the last of them has this folder's name or that of one above it, as other images may have the
        same names.
        """
        above = os.path.abspath(self.root).split(os.sep)
        for form in dict.fromkeys([name, unquote(name)]):
            parts = re.sub(r"^[A-Za-z]:", "", form.replace("\\", "/")).split("/")
            parts = [part for part in parts if part not in ("", ".")]
            for start in range(len(parts)):
                if start == 0 or parts[start - 1] in above:
                    found = self._walk(parts[start:])
                    if found is not None:
                        return found
        return None

    def _walk(self, parts: List[str]) -> Optional[str]:
        at = ""
        for i, part in enumerate(parts):
            names = self._list(at)[i < len(parts) - 1]
            fitting = {part} & names or {n for n in names if _normal(n) == _normal(part)}
            if not fitting and i == len(parts) - 1:
                fitting = {n for n in names if _any_case(n) == _any_case(part)}
            if len(fitting) != 1:
                return None
            at = os.path.join(at, *fitting)
        return at


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _any_case(name: str) -> str:
    stem, extension = os.path.splitext(_normal(name))
    return stem + extension.lower()


def match_files(
    images: Sequence[Dict[str, Any]], root: str, images_key: str, notes: Notes
) -> List[Dict[str, Any]]:
    """Set each ``file_name`` to that of the file which it means.  Returns the images that are there."""
    if not os.path.isdir(root):
        notes.refuse("no such folder", f"name the folder of {notes.key}'s images", images_key, root)
        return []
    folder, prefix = _Folder(root), os.path.join(os.path.abspath(root), "")
    correct = f"correct {images_key} or the file_name in {notes.json_file}"
    refuse = partial(notes.refuse, key=images_key, value=root)

    def is_inside(name: str) -> bool:  # a json from someone else must not read what it likes
        return os.path.abspath(os.path.join(root, name)).startswith(prefix)

    there = [i for i in images if is_inside(i["file_name"]) and folder.has(i["file_name"])]
    meant = {os.path.normpath(image["file_name"]): image["file_name"] for image in there}
    exact = {image["file_name"] for image in there}
    for image in images:
        name = image["file_name"]
        if name in exact:
            continue
        found = folder.find(name)
        if found is None and is_inside(name):
            refuse(f"no image file {name!r}", f"put the file there, or {correct}")
        elif found is None:
            refuse(
                f"image file {name!r} lies outside of it", f"name the folder of it, or {correct}"
            )
        elif meant.setdefault(found, name) != name:
            refuse(f"{meant[found]!r} and {name!r} both fit one file, {found!r}", correct)
        else:
            form = " in another Unicode form" * (_normal(found) == _normal(name))
            notes.repair(FILE_NAMES, f"{name!r} is {found!r}{form}")
            image["file_name"] = found
            there.append(image)
    return there


def check_headers(
    images: Sequence[Dict[str, Any]], root: str, images_key: str, notes: Notes
) -> None:
    """Compare up to 1000 images with what the json says of them, and fill in sizes that it lacks.

    Warns of what a user should know of how images are read.
    """
    every = max(1, math.ceil(len(images) / _MOST_HEADERS))
    deep: List[Tuple[Dict[str, Any], str]] = []
    turned: List[str] = []  # of a size that does not show whether the boxes are turned, too
    knows = False  # whether another image shows it
    for i, image in enumerate(images):
        if i % every and image["width"] is not None:
            continue
        name = image["file_name"]
        try:
            with Image.open(os.path.join(root, name)) as picture:
                (stored, upright, is_turned), mode = _sizes(picture), picture.mode
                problem = unreadable(picture)
        except Exception as e:  # Pillow's decoders raise what they please
            problem, fix = f"cannot be read as an image ({e})", "repair or replace the image"
        else:
            fix = f"correct {notes.json_file} too"
            if is_deep(mode):
                deep.append((image, mode))
            if is_turned and stored == upright:
                turned.append(name)
            knows |= stored != upright
        if not problem:
            problem, fix = _wrong_size(image, stored, upright, notes)
        if problem:
            notes.refuse(f"{name!r} {problem}", fix, images_key, root)
    if turned and not knows:
        notes.warn(
            f"{len(turned)} images are turned upright as their EXIF says (the first is "
            f"{shown(turned[0])}), and their size does not show whether the boxes are, too",
            "if boxes lie beside their objects, remove the orientation (exiftool -Orientation= FOLDER)",
            images_key,
            root,
        )
    check_depth(deep, root, images_key, notes)


def _wrong_size(
    image: Dict[str, Any], stored: Tuple[int, int], upright: Tuple[int, int], notes: Notes
) -> Tuple[str, str]:
    """(what is wrong with the size that the json has, the fix); fills in one that it lacks."""
    said, turned = (image["width"], image["height"]), upright != stored
    sizes = [f"{w}x{h}" for w, h in (stored, upright)]
    if said == (None, None) and not turned:
        notes.repair(SIZES, f"{image['file_name']!r} is {sizes[0]}")
        image["width"], image["height"] = stored
    elif turned and said in (stored, (None, None)):
        return (
            f"is stored as {sizes[0]} and turned to {sizes[1]} by its EXIF orientation, which the "
            "boxes do not know of",
            "remove the orientation from the images, so that boxes stay on their objects "
            "(exiftool -Orientation= FOLDER), or export boxes and sizes of upright images; another "
            "size in the json alone would leave the boxes beside the objects",
        )
    elif said != upright:
        how = " once upright as its EXIF says" if turned else ""
        fix = f"correct the image, or its width and height in {notes.json_file}"
        return f"is {sizes[1]}{how}, not {said[0]}x{said[1]}", fix
    return "", ""


def _sizes(picture: Image.Image) -> Tuple[Tuple[int, int], Tuple[int, int], bool]:
    """(width, height) of an opened image as stored and once upright, and whether its EXIF turns it."""
    orientation, is_tiff = None, picture.format == "TIFF"
    try:
        # Without the test, getexif() decodes the whole of a PNG in search of a late EXIF chunk.
        if is_tiff or "exif" in picture.info:
            tags = picture.tag_v2 if is_tiff else picture.getexif()
            orientation = tags.get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF, which Detectron2 ignores too
        pass
    sizes = [picture.size, picture.size]
    if orientation in _EXIF_QUARTER_TURNS:
        # Pillow itself turns TIFFs upright, the size of an opened one included.
        sizes[0 if is_tiff else 1] = picture.size[::-1]
    return sizes[0], sizes[1], orientation in range(2, 9)


def upright_size(picture: Image.Image) -> Tuple[int, int]:
    """(width, height) of an opened image once it is upright as its EXIF says, as Detectron2 reads it."""
    return _sizes(picture)[1]


def check_depth(
    deep: List[Tuple[Dict[str, Any], str]], root: str, images_key: str, notes: Notes
) -> None:
    """Check that images of more than 8 bits can be scaled to 8, and warn of how they are.

    Args:
        deep: each with its mode.
    """
    if not deep or notes.reading.scales is None:
        return
    refuse = partial(notes.refuse, key=images_key, value=root)
    if not notes.reading.scales:
        name, mode = deep[0][0]["file_name"], deep[0][1]
        fix = "use sharedkd.data.images.ImageMapper as the loaders' mapper, which scales them"
        refuse(f"{name!r} is of mode {mode}, which this mapper cuts off at 255", fix)
        return
    said = set()
    for image, mode in deep[:_MOST_DECODED]:
        try:
            with Image.open(os.path.join(root, image["file_name"])) as picture:
                values, mode = _values(picture)
            _to_8_bits(values, mode, notes.reading.image_range)
        except Exception as e:
            fix = "name the values that are black and white"
            refuse(f"{image['file_name']!r} cannot be scaled to 8 bits: {e}", fix)
            continue
        if mode not in said:
            low, high = notes.reading.image_range or _RANGES[mode[:4]]
            notes.warn(
                f"images of mode {mode}: {low:g} to {high:g} become 0 to 255 (the first is "
                f"{shown(image['file_name'])}, whose values reach from {values.min():g} to {values.max():g})",
                "data.image_range=[lo,hi] sets another range",
                images_key,
                root,
            )
        said.add(mode)
