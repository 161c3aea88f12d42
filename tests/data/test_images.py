"""Images of any mode and depth: the pixels that a model gets, and what is refused."""

import re

import numpy as np
import pytest
import torch
from coco_files import GOOD, HEIGHT, NAME, WIDTH, all_of, setter
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from PIL import Image

from sharedkd.data.coco import read_coco
from sharedkd.data.images import ImageMapper, read_image
from sharedkd.data.notes import Reading

KEYS = ("data.train_json", "data.train_images")
RED, GREY = (200, 10, 30), 120


def saved(path, image, **options):
    image.save(path, **options)
    return str(path)


def filled(mode, colour, **options):
    return lambda path: saved(path, Image.new(mode, (4, 3), colour), **options)


def of_array(values, **options):
    return lambda path: saved(path, Image.fromarray(np.full((3, 4), *values)), **options)


def palette(path):
    image = Image.new("RGB", (4, 3), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    return saved(path, image)


def phone(path):
    """Of two pictures, as phones write them for 3D: the first one is the picture."""
    image = Image.new("RGB", (4, 3), RED)
    return saved(path, image, format="MPO", save_all=True, append_images=[image], quality=100)


#: mode -> (file name, how it is written, the pixel as RGB), by what the formats say
PIXELS = {
    "L": ("a.png", filled("L", GREY), (GREY,) * 3),
    "LA": ("a.png", filled("LA", (GREY, 255)), (GREY,) * 3),
    "P": ("a.png", palette, RED),
    "RGBA": ("a.png", filled("RGBA", (*RED, 255)), RED),
    "CMYK": ("a.tif", filled("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "1": ("a.png", filled("1", 1), (255,) * 3),
    "I;16": ("a.png", of_array((257 * GREY, np.uint16)), (GREY,) * 3),
    "I;16 of 65535": ("a.png", of_array((65535, np.uint16)), (255,) * 3),
    "I;16B": ("a.tif", of_array((257 * GREY, ">u2")), (GREY,) * 3),
    "F": ("a.tif", of_array((0.2, np.float32)), (51,) * 3),
    "MPO": ("a.jpg", phone, RED),
}


@pytest.mark.parametrize("mode", PIXELS)
def test_pixels(tmp_path, mode):
    name, write, rgb = PIXELS[mode]
    path = write(tmp_path / name)
    pixels = read_image(path, "RGB")
    assert pixels.shape == (3, 4, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - rgb).max() <= (mode == "MPO") * 3  # JPEG
    assert (read_image(path, "BGR") == pixels[..., ::-1]).all()
    record = {"file_name": path, "height": 3, "width": 4}
    mapper = ImageMapper(is_train=False, augmentations=[], image_format="RGB")
    assert (mapper(record)["image"].permute(1, 2, 0).numpy() == pixels).all()


def test_the_range_of_deep_images_can_be_named(tmp_path):
    values = np.array([[-1000, 0, 500, 9000]], np.float32)
    path = saved(tmp_path / "a.tif", Image.fromarray(values))
    # (0 + 1000) / 2000 and 1500 / 2000 of 255; beyond the range it is 0 or 255.
    assert read_image(path, "L", (-1000, 1000))[0, :, 0].tolist() == [0, 128, 191, 255]
    with pytest.raises(
        ValueError, match="mode F has values from -1000 to 9000: set data.image_range"
    ):
        read_image(path, "L")
    path = saved(tmp_path / "b.tif", Image.fromarray(values.astype(np.int32)))
    with pytest.raises(ValueError, match="mode I has values from"):
        read_image(path, "L")
    assert read_image(path, "L", (-1000, 1000))[0, :, 0].tolist() == [0, 128, 191, 255]


def test_a_tiff_of_several_pages_is_refused(tmp_path):
    page = Image.new("L", (4, 3))
    path = saved(tmp_path / "a.tif", page, save_all=True, append_images=[page, page])
    with pytest.raises(ValueError, match="TIFF of 3 pages"):
        read_image(path, "RGB")


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_mapper_does_what_detectron2s_does(tmp_path, orientation):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    path = saved(tmp_path / "a.jpg", Image.fromarray(noise), exif=exif(orientation))
    height, width = detection_utils.read_image(path, "RGB").shape[:2]
    box = {"bbox": [2, 3, 15, 17], "bbox_mode": 0, "category_id": 1}
    record = {"file_name": path, "height": height, "width": width, "annotations": [box]}
    options = dict(
        is_train=True,
        augmentations=[T.ResizeShortestEdge([16, 20, 24], 64, "choice"), T.RandomFlip()],
        image_format="BGR",
    )
    results = []
    for mapper in (ImageMapper(**options), DatasetMapper(**options)):
        np.random.seed(3)
        results.append(mapper(record))
    ours, theirs = results
    assert ours.keys() == theirs.keys() and torch.equal(ours["image"], theirs["image"])
    boxes = [x["instances"].gt_boxes.tensor for x in results]
    assert torch.equal(*boxes)


# Before training


def test_the_larger_image_is_the_same_view_of_the_files_own_pixels(tmp_path):
    """Cropped, halved and flipped, and twice as large as that: the pixels of the file, cropped and flipped."""
    pixels = np.random.RandomState(0).randint(0, 256, (64, 80, 3), np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels))
    size = T.ResizeShortestEdge([24], sample_style="choice")
    views = [T.RandomCrop("absolute", (48, 64)), size, T.RandomFlip(prob=1.0)]
    options = dict(is_train=False, image_format="RGB", augmentations=views)
    record = ImageMapper(larger=2, **options)({"file_name": str(path)})
    assert record["image"].shape == (3, 24, 32)
    found = record["larger_image"].permute(1, 2, 0).numpy()[:, ::-1]
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (48, 64, 3)).reshape(-1, 48, 64, 3)
    assert (windows == found).all((1, 2, 3)).sum() == 1
    # Not at another size: a rotation, and a mixture with the grey image.
    for after in (T.RandomRotation([30.0, 30.0]), T.RandomSaturation(0.5, 0.5)):
        mapper = ImageMapper(larger=2, **{**options, "augmentations": [size, after]})
        assert "larger_image" not in mapper({"file_name": str(path)})


def test_strong_augmentation_keeps_boxes_on_their_objects(tmp_path):
    """A bright rectangle, cropped, recoloured and halved: the box is where the rectangle is."""
    pixels = np.full((64, 80, 3), (40, 50, 60), np.uint8)
    pixels[20:44, 24:60] = 210, 220, 180
    path = saved(tmp_path / "a.png", Image.fromarray(pixels))
    box = {"bbox": [24, 20, 36, 24], "bbox_mode": 1, "category_id": 0}
    record = {"file_name": path, "height": 64, "width": 80, "annotations": [box]}
    halved = T.Resize((32, 40))
    options = dict(image_format="RGB", strong_augmentation=True, larger=2)
    mapper = ImageMapper(is_train=True, augmentations=[halved], **options)
    colours = set()
    for seed in range(20):
        np.random.seed(seed)
        found = mapper(record)
        assert found["larger_image"].shape == (3, 64, 80)
        red = found["image"][0].float()
        rows, columns = torch.nonzero(red > (red.min() + red.max()) / 2).T
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        (gt,) = found["instances"].gt_boxes.tensor
        assert (gt - torch.tensor(seen)).abs().max() <= 1
        colours.add(int(red.max()))
    assert len(colours) > 10
    plain = ImageMapper(is_train=False, augmentations=[halved], **options)(record)["image"]
    assert plain.amax((1, 2)).tolist() == [210, 220, 180]


def test_strong_augmentation_of_masks_and_of_grey_images(tmp_path):
    """The box of a cropped triangle is that of its rest, not the rest of its box."""
    path = saved(tmp_path / "a.png", Image.fromarray(np.full((64, 64), 9, np.uint8)))
    triangle = {"segmentation": [[0, 0, 64, 0, 0, 64]], "bbox": [0, 0, 64, 64]}
    record = {"file_name": path, "height": 64, "width": 64}
    record["annotations"] = [{**triangle, "bbox_mode": 1, "category_id": 0}]
    options = dict(image_format="L", strong_augmentation=True, use_instance_mask=True)
    mapper = ImageMapper(is_train=True, augmentations=[], instance_mask_format="bitmask", **options)
    tighter = 0
    for seed in range(20):
        np.random.seed(seed)
        found = mapper(record)
        for box, mask in zip(found["instances"].gt_boxes, found["instances"].gt_masks.tensor):
            rows, columns = torch.nonzero(mask).T
            assert box.tolist() == [
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            ]
            tighter += box[2:].tolist() != list(found["image"].shape[:0:-1])
    assert tighter
    assert len(mapper({**record, "annotations": []})["instances"]) == 0


def read(own, change=None, **reading):
    return read_coco([own.write(change)], [str(own.images)], *KEYS, reading=Reading(**reading))


def test_deep_images_are_told_once_with_file_and_range(own):
    values = np.linspace(50, 4000, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)
    for name in ("a.png", "many.png"):
        Image.fromarray(values).save(own.images / name)
    data = read(own)
    assert data.errors == [] and [w.key for w in data.warnings] == ["data.train_images"]
    assert (
        "mode I;16: 0 to 65535 become 0 to 255 (the first is 'a.png', whose values reach from 50 to 4000)"
        in str(data.warnings[0])
    )
    assert "50 to 4000 become 0 to 255" in str(read(own, image_range=(50, 4000)).warnings[0])
    (error,) = read(own, scales=False).errors
    assert "'a.png' is of mode I;16, which this mapper cuts off at 255" in str(error)
    data.register(NAME)
    Image.fromarray(values.astype(np.float32)).save(own.images / "a.tif")
    (error,) = read(own, setter("images", 0, file_name="a.tif")).errors
    assert "'a.tif' cannot be scaled to 8 bits: its mode F has values from 50 to 4000" in str(error)


@pytest.mark.parametrize(
    "orientation, said, words",
    [
        (6, (HEIGHT, WIDTH), None),  # of the upright image
        (6, (WIDTH, HEIGHT), "turned to 40x60 by its EXIF orientation.*remove the orientation"),
        (8, (WIDTH, HEIGHT + 1), "is 40x60 once upright as its EXIF says, not 60x41"),
        (6, (None, None), "turned to 40x60 by its EXIF orientation"),
        (3, (WIDTH, HEIGHT), None),
        (1, (WIDTH, HEIGHT + 1), "'a.jpg' is 60x40, not 60x41; correct the image, or its width"),
    ],
)
def test_images_turned_by_exif(own, orientation, said, words):
    own.picture("a.jpg", exif=exif(orientation))
    width, height = said
    change = setter("images", 0, file_name="a.jpg", width=width, height=height)
    errors = [str(e).replace("\n", " ") for e in read(own, change).errors if e.key == KEYS[1]]
    assert len(errors) == bool(words)
    if words:
        assert re.search(words, errors[0])


def test_turned_images_whose_size_says_nothing_are_told_of(own):
    """By half a turn; unless another image shows that the json has upright sizes."""
    own.picture("a.jpg", exif=exif(3))
    name = setter("images", 0, file_name="a.jpg")
    (warning,) = read(own, name).warnings
    assert "1 images are turned upright as their EXIF says (the first is 'a.jpg')" in str(warning)
    own.picture("b.jpg", exif=exif(6))
    other = setter("images", 2, file_name="b.jpg", width=HEIGHT, height=WIDTH)
    assert not [w for w in read(own, all_of(name, other)).warnings if "EXIF" in str(w)]


def test_a_tiff_is_turned_once_and_told_of_alike(own):
    """Red above, black below, stored with red at the right: orientation 8 turns a quarter to the left."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, WIDTH // 2 :, 0] = 255
    Image.fromarray(pixels).save(own.images / "a.tif", exif=exif(8))
    seen = read_image(str(own.images / "a.tif"), "RGB")
    assert seen.shape == (WIDTH, HEIGHT, 3)
    assert seen[: WIDTH // 2, :, 0].min() == 255 and seen[WIDTH // 2 :].max() == 0
    (error,) = [
        e for e in read(own, setter("images", 0, file_name="a.tif")).errors if e.key == KEYS[1]
    ]
    assert "stored as 60x40 and turned to 40x60 by its EXIF orientation" in str(error)


def test_the_remedy_for_exif_leaves_boxes_on_their_objects(own):
    """Stored 60x40 with the object at x 5 to 25, y 5 to 15, drawn by a tool that ignores EXIF."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[5:15, 5:25] = 255
    Image.fromarray(pixels).save(own.images / "a.png", exif=exif(6))
    assert len(read(own).errors) == 1
    with Image.open(own.images / "a.png") as stored:
        Image.fromarray(np.asarray(stored)).save(own.images / "a.png")  # without its EXIF
    assert read(own).errors == []
    x, y, w, h = GOOD["annotations"][0]["bbox"]
    seen = read_image(str(own.images / "a.png"), "L")
    assert seen[y : y + h, x : x + w].min() == 255 and (seen > 0).sum() == w * h


def test_files_that_are_no_images(own):
    (own.images / "a.png").write_bytes(b"text")
    (error,) = read(own).errors
    assert "'a.png' cannot be read as an image" in str(error)


def test_headers_are_read_from_a_spread_sample(own, monkeypatch):
    def change(data):
        for i in range(2500):
            own_name = f"{i}.png"
            data["images"].append({"id": 100 + i, "file_name": own_name, "width": 60, "height": 40})
            (own.images / own_name).touch()

    opened = []
    monkeypatch.setattr(Image, "open", lambda p: opened.append(p) or Image.new("L", (1, 1)))
    (error,) = read(own, change).errors
    assert 500 <= len(opened) <= 1000 and f"(and {len(opened) - 1} more)" in str(error)
