"""Labels in another format than COCO json, named as what they are, with what converts them."""

import os
import re
from typing import Any, Optional, Tuple

__all__ = ["foreign_file", "foreign_json"]

_EXPORT = "export it again as COCO from the tool that wrote it"
_YOLO = "convert it: tools/convert_data.py yolo DATA.yaml OUT"
_VOC = "convert it: tools/convert_data.py voc FOLDER OUT"
_LABELME = "convert its folder by labelme2coco"
_Named = Optional[Tuple[str, str]]


def foreign_file(path: str) -> _Named:
    """(what a file or folder that is no json holds, what to do about it); None if it is not known."""
    if os.path.isdir(path):
        return _folder(path)
    with open(path, "rb") as f:
        head = f.read(4096)
    if head[:2] in (b"PK", b"\x1f\x8b"):
        return "an archive", "unpack it, and name the json in it"
    text, suffix = head.decode("utf-8", "replace").lstrip("\ufeff \r\n\t"), path.lower()
    if suffix.endswith((".yaml", ".yml")):
        return "a YOLO data.yaml" if re.search(
            r"^(names|nc|train)\s*:", text, re.M
        ) else "YAML", _YOLO
    if text.startswith("<"):
        if "<annotations" in text:
            return "CVAT's own XML", _EXPORT
        if "<annotation" in text:
            return "an XML of Pascal VOC", _VOC
        return None
    lines = text.splitlines()
    if suffix.endswith(".txt") and lines and re.fullmatch(r"\s*\d+(\s+[-\d.e]+){4,}\s*", lines[0]):
        return "a label file of YOLO", _YOLO
    if suffix.endswith((".csv", ".tsv")) or (
        lines and re.fullmatch(r"[^{\[]+([,;\t][^,;\t]*){3,}", lines[0])
    ):
        return "a table (CSV)", f"{_EXPORT}, or write COCO json from its rows"
    if len(lines) > 1 and lines[0].startswith("{") and lines[0].endswith("}"):
        return "JSON in lines (one object each)", _EXPORT
    return None


def _folder(path: str) -> _Named:
    names = os.listdir(path)
    found = sorted(n for n in names if n.lower().endswith(".json"))
    if any(n.lower().endswith(".xml") for n in names) or "Annotations" in names:
        return "a folder of Pascal VOC", _VOC
    if "labels" in names or any(n in names for n in ("data.yaml", "data.yml", "classes.txt")):
        return "a folder of YOLO", _YOLO
    if len(found) > 5:
        return "a folder of many json files, as LabelMe writes them", _LABELME
    return "a folder", f"name the json in it{': ' if found else ''}{', '.join(found)}"


def foreign_json(data: Any) -> _Named:
    """(what parsed JSON is that is not COCO's, what to do about it); None if it is not known."""
    if isinstance(data, list) and data and isinstance(data[0], dict):
        first = data[0]
        if {"image_id", "score"} <= first.keys():
            return "detections in COCO's result format", "name the json of the ground truth"
        if "image" in first and "annotations" in first:
            return "a CreateML json", _EXPORT
        if "data" in first or {"image", "label"} <= first.keys():
            return "a list of Label Studio's tasks", "export it as COCO from Label Studio"
    if not isinstance(data, dict):
        return None
    values = list(data.values())
    via = "a project of VIA", "in VIA choose Annotation, Export Annotations (COCO format)"
    if "_via_settings" in data or "_via_img_metadata" in data:
        return via
    if values and all(isinstance(v, dict) and {"filename", "regions"} <= v.keys() for v in values):
        return "VIA's own json", via[1]
    if "shapes" in data and "imagePath" in data:
        return "a LabelMe json of one image", _LABELME
    if data.get("type") == "FeatureCollection":
        return "GeoJSON", _EXPORT
    if "items" in data and "categories" in data:
        return "a Datumaro json", "convert it: datum convert -f coco"
    if isinstance(data.get("annotations"), list) and data["annotations"]:
        first = data["annotations"][0]
        if isinstance(first, dict) and "caption" in first:
            return "COCO's captions", "name a json of instances"
        if isinstance(first, dict) and "segments_info" in first:
            return "COCO's panoptic json", "name a json of instances"
    return None
