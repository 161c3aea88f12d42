import pytest
from coco_files import NAME, Folder
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def own(tmp_path):
    return Folder(tmp_path)


@pytest.fixture(autouse=True)
def unregistered():
    yield
    for name in [n for n in DatasetCatalog.list() if n.startswith(NAME)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
