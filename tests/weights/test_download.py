"""Weights from a URL: downloaded once by Detectron2's own code, complete, and verified."""

import hashlib
import http.server
import os
import threading
from pathlib import Path

import pytest
import tiny
import torch
from detectron2.utils.file_io import PathManager
from iopath.common import file_io

from sharedkd import ConfigError
from sharedkd.weights.download import fetch, hash_in_name
from sharedkd.weights.loading import load_trained

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ZOO = "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl"


class Server(http.server.BaseHTTPRequestHandler):
    """/KIND/NAME: the content, as KIND says."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.split("/")[1]
        if kind == "missing":
            return self.send_error(404)
        body = self.server.files.get(self.path, CONTENT)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        if kind == "half":
            return
        threading.Event().wait(0.5 if kind == "slow" else 0)
        self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.asked, server.files = [], {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache):
    return [p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_downloaded_once_and_verified_each_time(server, cache):
    url = f"{server.url}/all/model-{DIGEST[:12]}.pth"
    path = Path(fetch(url, DIGEST[:8].upper()))
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache)
    assert fetch(url) == str(path) and len(server.asked) == 1 and files(cache) == [path.name]
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=f"the SHA-256 of {path} begins .* delete it to download"):
        fetch(url)
    path.unlink()
    assert Path(fetch(url)).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "kind, problem", [("half", "got only 524288 out of 1048576"), ("missing", "404")]
)
def test_what_is_not_complete_is_not_used(server, cache, kind, problem):
    for _ in range(2):  # nor is it the second time
        with pytest.raises(Exception, match=problem):
            fetch(f"{server.url}/{kind}/model.pth")
        assert files(cache) == []


def test_another_hash_is_an_error(server):
    for url, sha256 in [("all/model.pth", "0123abcd"), ("all/model-0123abcd.pth", None)]:
        with pytest.raises(ValueError, match=f"begins with {DIGEST[:8]}, not with 0123abcd"):
            fetch(f"{server.url}/{url}", sha256)


NAMES = {
    "resnet18-f37072fd.pth": "f37072fd",
    "a/b-19c8e357.safetensors?x=1": "19c8e357",
    ZOO: "",
    "model-20240131.pth": "",  # a date
    "model-1700000000.pth": "",  # seconds
    "model-abcdef1.pth": "",  # too few
    "student-deadbeefs.pth": "",
    "model_final_f10217aa.pkl": "",
}


def test_hash_in_name():
    assert {name: hash_in_name(name) for name in NAMES} == NAMES


def test_the_zoo_is_where_detectron2_looks_for_it(cache):
    path = cache / "detectron2" / ZOO.removeprefix("detectron2://")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert PathManager.get_local_path(ZOO) == fetch(ZOO) == str(path)  # nothing is downloaded
    assert fetch("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml") == str(path)
    with pytest.raises(RuntimeError, match="own.yaml is not available"):
        fetch("own.yaml")


def test_hosts_and_queries_do_not_share_a_place(monkeypatch):
    """iopath's would: it looks the path up in its cache."""
    monkeypatch.setattr(file_io, "download", lambda url, dir, filename: os.path.join(dir, filename))
    urls = [
        "http://{}a/x/m.pth",
        "http://{}b/x/m.pth",
        "http://{}a:80/x/m.pth",
        "http://{}a/x/m.pth?v=1/m.pth",
    ]
    assert len({fetch(url.format("places.")) for url in urls}) == len(urls)


@pytest.mark.parametrize("url", ["http://a/../../m.pth", "http://a/x/..", "http://a/"])
def test_a_url_does_not_lead_out_of_the_cache(url):
    with pytest.raises(ValueError, match="names no file"):
        fetch(url)


def test_four_processes_at_once(server, cache):
    """One downloads, the others wait; what a killed one left is not taken for the file."""
    url = f"{server.url}/slow/model-{DIGEST[:8]}.pth"
    path = Path(fetch(url))
    path.rename(f"{path}.tmp").write_bytes(CONTENT[:9])
    said, say = os.pipe()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            try:
                os.write(say, f"{fetch(url)}\n".encode())
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    os.close(say)
    with open(said) as lines:
        assert lines.read().splitlines() == [str(path)] * 4 and path.read_bytes() == CONTENT
    assert len(server.asked) == 2 and files(cache) == [path.name]


# --- as the weights of a detector ----------------------------------------------------------------


def test_weights_from_a_url(server, tmp_path):
    source = tiny.detector("retinanet", seed=3)
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    server.files["/all/a.pth"] = data
    url, digest = f"{server.url}/all/a.pth", hashlib.sha256(data).hexdigest()
    model = tiny.detector("retinanet")
    load_trained(model, url, "model.teacher.weights", False, digest)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(
        ConfigError, match=f"^model.teacher.weights={url}: cannot be read .*SHA-256"
    ):
        load_trained(model, url, "model.teacher.weights", False, "0" * 64)
    server.files["/all/cut.pth"] = data[:-9]  # as from a server that says no length
    with pytest.raises(ConfigError, match="cannot be read .* its copy is .*cut.pth;"):
        load_trained(model, f"{server.url}/all/cut.pth", "model.teacher.weights")


def test_a_local_file_is_verified(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": tiny.detector("retinanet").state_dict()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = tiny.detector("retinanet", seed=1)
    load_trained(model, str(path), "train.init_checkpoint", False, digest[:8])
    with pytest.raises(
        ConfigError, match=f"begins with {digest[:8]}, not with 0a1b2c3d as its name"
    ):
        load_trained(model, str(path), "train.init_checkpoint", False, "0a1b2c3d")
    commit = path.rename(tmp_path / "teacher-0a1b2c3d.pth")  # a name of one's own
    load_trained(model, str(commit), "train.init_checkpoint")


@pytest.mark.parametrize(
    "key, sha256_key, wrong",
    [
        ("train.init_checkpoint", "train.init_sha256", "1a2b3c"),
        ("model.teacher.weights", "model.teacher.sha256", "xyz" * 5),
        ("model.teacher.weights", "model.teacher.sha256", 12345678),
        ("model.teacher.weights", "model.teacher.sha256", "a" * 65),
    ],
)
def test_no_sha256(key, sha256_key, wrong):
    with pytest.raises(ConfigError, match=f"^{sha256_key}={wrong}: is no SHA-256"):
        load_trained(torch.nn.Linear(1, 1), "a.pth", key, False, wrong)
