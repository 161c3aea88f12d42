"""Whatever slips of a tool are in a file at once, a run sees what its clean twin says."""

import copy

from coco_files import GOOD, NAME, Folder, metrics, raise_errors, seen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharedkd.data.coco import read_coco

KEYS = ("data.train_json", "data.train_images")
few = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def text(row, field):
    row[field] = str(row[field])


def missing(row, field):
    row.pop(field)


def flat(row, field):
    if isinstance(row[field], list):
        row[field] = row[field][0]


def with_a_point(row, field):
    if isinstance(row[field], list):
        row[field] = [[1, 1], *row[field]]


def in_pairs(row, field):
    if isinstance(row[field], list):
        row[field] = [list(zip(p[::2], p[1::2])) for p in row[field]]


#: A slip: the list, the field, what becomes of it
SLIPS = [
    *(("annotations", f, text) for f in ("id", "image_id", "category_id", "iscrowd", "area")),
    *(("images", f, text) for f in ("id", "width", "height")),
    ("categories", "id", text),
    ("annotations", "id", missing),
    ("annotations", "id", lambda row, field: row.update(id=0)),
    ("annotations", "iscrowd", lambda row, field: row.update(iscrowd=bool(row["iscrowd"]))),
    ("annotations", "bbox", lambda row, field: row.update(bbox=[str(x) for x in row["bbox"]])),
    *(("annotations", "segmentation", slip) for slip in (flat, with_a_point, in_pairs)),
    ("images", "file_name", lambda row, field: row.update(file_name=row[field].replace("/", "\\"))),
    ("images", "file_name", lambda row, field: row.update(file_name=f"C:\\images\\{row[field]}")),
]


@st.composite
def spoiled(draw):
    """GOOD with up to five slips, each in some of the rows, and rows that mean nothing."""
    data = copy.deepcopy(GOOD)
    for part, field, slip in draw(
        st.lists(st.sampled_from(SLIPS), min_size=1, max_size=5, unique=True)
    ):
        for row in data[part]:
            if (
                draw(st.booleans())
                and field in row
                and type(row[field]) is type(GOOD[part][0][field])
            ):
                slip(row, field)
    if draw(st.booleans()):
        data["categories"].append(dict(id=0, name="root", supercategory="none"))
    if draw(st.booleans()):
        data["annotations"].append(dict(data["annotations"][0], id=50, image_id=404))
    return data


def read(folder, data):
    path = folder.write(lambda d: data)
    return path, read_coco([path], [str(folder.images)], *KEYS)


def test_spoiled_data_are_seen_like_their_clean_twin(tmp_path):
    folder = Folder(tmp_path)
    read(folder, GOOD)[1].register(NAME)
    clean, expected = seen(), metrics()

    @few
    @given(spoiled())
    def check(data):
        path, found = read(folder, data)
        raise_errors(found)
        found.register(NAME)
        assert seen() == clean and metrics() == expected
        # Repairing twice changes nothing.
        again = read_coco([found.json_file], [str(folder.images)], *KEYS)
        assert not again.errors and not again.files[0].repairs and again.document is None

    check()
