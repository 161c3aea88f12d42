"""How a run reads a COCO json, the repairs of it by kind, and the reasons to refuse it.  Nothing is raised."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from sharedkd.errors import ConfigError

__all__ = ["Kind", "Notes", "Reading"]

_LONGEST_MESSAGE = 1000  # characters


class Kind(NamedTuple):
    """One kind of repair.

    Args:
        of: what is counted: images, categories or annotations; "" where the total says nothing.
        what: what was found, in words that follow "3 of 20".
        done: what was done about it.
        most: the share from which on it is refused: so many are no slip.
    """

    of: str
    what: str
    done: str
    most: float = math.inf


IM, CAT, ANN = "images", "categories", "annotations"
ENCODING = Kind("", "file is not in plain UTF-8", "read as what it is")
TEXT_NUMBERS = Kind("", "numbers are text or have a decimal point", "read as numbers")
REPEATED = Kind("", "images or categories are listed again", "listed once")
IMAGE_IDS = Kind(IM, "images have ids that are no number of 63 bits", "numbered anew")
SAME_FILE = Kind(IM, "images are listed twice, under two ids", "taken as one, with all objects")
COPIES = Kind(ANN, "objects are listed again, of an image that is listed twice", "listed once")
SIZES = Kind(IM, "images have no width and height", "read from the image")
FILE_NAMES = Kind(IM, "images are named in another way than their files", "matched")
CATEGORY_IDS = Kind(CAT, "categories have ids that are no number of 63 bits", "numbered anew")
NO_CLASS = Kind(CAT, "categories name nothing: a root, a background, unused", "no class")
SAME_CLASSES = Kind(CAT, "classes are not listed, or have another id elsewhere", "matched by name")
ANNOTATION_IDS = Kind(ANN, "annotation ids are 0, text, repeated or missing", "numbered from 1")
NO_IMAGE = Kind(ANN, "annotations are of an image that is not listed", "left out", 0.1)
NO_CATEGORY = Kind(ANN, "annotations are of a category that is not listed", "left out", 0.1)
NO_CROWD = Kind(ANN, "annotations have no iscrowd", "taken as 0, an object")
ODD_CROWD = Kind(ANN, "annotations have an iscrowd that is not 0 or 1", "read as 0 or 1")
NO_AREA = Kind(ANN, "annotations have no area", "that of the mask, or else of the box")
NO_BOX = Kind(ANN, "annotations have no bbox", "the box around the segmentation")
CLIPPED = Kind(ANN, "boxes reached over their image's edge", "clipped")
OUTSIDE = Kind(ANN, "boxes lie outside of their image", "left out", 0.1)
FLAT = Kind(ANN, "boxes have width or height 0", "left out", 0.5)
ONE_LIST = Kind(
    ANN, "polygons are not [[x1, y1, x2, y2, ...]]", "read in the order of their numbers"
)
FEW_POINTS = Kind(ANN, "objects have polygons that show nothing beside others", "those left out")
NO_MASK = Kind(ANN, "objects have no polygon of 3 points in the image", "left out", 0.1)
UNUSED_MASK = Kind(ANN, "segmentations cannot be used", "left out: this run has boxes alone")


@dataclass(frozen=True)
class Reading:
    """How a run reads its data.

    Args:
        masks: it uses segmentations; else unusable ones are left out.
        repair: what has one meaning is repaired; False: it is refused.
        max_size: of an image's longer edge after resizing, in pixels; None: not known.
        image_range: see :func:`~sharedkd.data.images.read_image`.
        scales: whether images of more than 8 bits are read by that function; None: the mapper is not known.
    """

    masks: bool = True
    repair: bool = True
    max_size: Optional[int] = None
    image_range: Optional[Sequence[float]] = None
    scales: Optional[bool] = True


class Notes:
    """What was repaired in a file and what it is refused for, by kind, each with its first example.

    Args:
        key, json_file: the config key and its file.
        reading: how the run reads it.

    Attributes:
        totals: the number of images, categories and annotations.
        refused: how often something was found that has no repair.
        warnings: what works and is probably not meant.
    """

    def __init__(self, key: str, json_file: str, reading: Reading = Reading()):
        self.key, self.json_file, self.reading = key, json_file, reading
        self.totals: Counter = Counter()
        self.refused = 0
        self.warnings: List[ConfigError] = []
        self._first: Dict[Kind, str] = {}
        self._count: Counter = Counter()
        self._reasons: Dict[Tuple[str, str, str], List[str]] = {}

    def repair(self, kind: Kind, example: str) -> None:
        """Count a repair."""
        self._first.setdefault(kind, example[:_LONGEST_MESSAGE])
        self._count[kind] += 1

    def refuse(self, problem: str, fix: str, key: str = "", value: str = "") -> None:
        """Count a reason to refuse the file, or the ``value`` of another ``key``."""
        where = (key or self.key, value or self.json_file, fix)
        self._reasons.setdefault(where, []).append(problem[:_LONGEST_MESSAGE])
        self.refused += 1

    def warn(self, problem: str, fix: str, key: str = "", value: str = "") -> None:
        """Warn of the file, or of the ``value`` of another ``key``."""
        self.warnings.append(ConfigError(key or self.key, value or self.json_file, problem, fix))

    @property
    def repairs(self) -> Tuple[str, ...]:
        """In words, by kind, those that were made, not those that the file is refused for."""
        return tuple(f"{self._found(kind)}: {kind.done}" for kind in self._made())

    @property
    def repair_warnings(self) -> List[ConfigError]:
        """The same as warnings of the file."""
        fix = "the file on the disk stays as it is"
        return [ConfigError(self.key, self.json_file, repair, fix) for repair in self.repairs]

    @property
    def repaired(self) -> int:
        """How many they are."""
        return sum(self._count[kind] for kind in self._made())

    @property
    def errors(self) -> List[ConfigError]:
        """Why the file is refused, one for each kind of reason."""
        found = [
            ConfigError(
                key, value, first[0] + f" (and {len(first) - 1} more)" * (len(first) > 1), fix
            )
            for (key, value, fix), first in self._reasons.items()
        ]
        for kind in filter(self._is_refused, self._count):
            fix = "correct them in the json"
            fix += ", or use data.repair=True" * (not self.reading.repair and kind.most > 1)
            found.append(ConfigError(self.key, self.json_file, self._found(kind), fix))
        return found

    def _found(self, kind: Kind) -> str:
        of = f" of {self.totals[kind.of]}" if self.totals[kind.of] else ""
        return f"{self._count[kind]}{of} {kind.what} ({self._first[kind]})"

    def _made(self) -> List[Kind]:
        return [kind for kind in self._count if not self._is_refused(kind)]

    def _is_refused(self, kind: Kind) -> bool:
        share = self._count[kind] / max(self.totals[kind.of], 1)
        return not self.reading.repair or share >= kind.most
