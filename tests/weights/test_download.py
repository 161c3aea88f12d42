"""Weights from a URL: whole and verified in the cache, or not there at all."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch

from sharedkd import ConfigError
from sharedkd.weights.download import _cached, fetch, hash_in_name
from sharedkd.weights.loading import load_trained

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ZOO = "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl"


class Server(http.server.BaseHTTPRequestHandler):
    """/KIND/NAME: the content as KIND says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.split("/")[1]
        if kind == "missing":
            return self.send_error(404)
        self.close_connection = True
        body = self.server.files.get(self.path, CONTENT)
        self.send_response(200)
        if kind in ("whole", "half", "slow"):
            self.send_header("Content-Length", str(len(body)))
        if kind.endswith("chunks"):
            self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        if kind.endswith("chunks"):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
            if kind == "chunks":
                self.wfile.write(b"0\r\n\r\n")
        elif kind == "half":
            self.wfile.write(body[: len(body) // 2])
        elif kind == "empty":
            pass
        else:
            self.wfile.write(body[:9])
            self.wfile.flush()
            threading.Event().wait(0.5 if kind == "slow" else 0)
            self.wfile.write(body[9:])

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


@pytest.mark.parametrize("kind", ["whole", "chunks"])
def test_downloaded_once(server, cache, kind):
    url = f"{server.url}/{kind}/model.pth"
    path = fetch(url)
    assert Path(path).read_bytes() == CONTENT and Path(path).is_relative_to(cache)
    assert fetch(url) == path and server.asked == [f"/{kind}/model.pth"]
    assert files(cache) == ["model.pth"]


CUT = {
    "half": "only 524288 of 1048576 bytes",
    "cut-chunks": "",
    "unknown": "does not say how long",
    "empty": "does not say how long",
    "missing": "404",
}


@pytest.mark.parametrize("kind", CUT)
def test_what_is_not_whole_is_not_used(server, cache, kind):
    for _ in range(2):  # nor is it the second time
        with pytest.raises(Exception, match=CUT[kind]):
            fetch(f"{server.url}/{kind}/model.pth")
        assert files(cache) == []


def test_a_part_is_told_from_the_whole_by_its_hash(server, cache):
    url = f"{server.url}/unknown/model.pth"
    assert Path(fetch(url, DIGEST[:10])).read_bytes() == CONTENT
    with pytest.raises(ValueError, match=f"begins with {DIGEST[:8]}, not with 0123abcd"):
        fetch(f"{server.url}/unknown/other.pth", "0123abcd")
    assert files(cache) == ["model.pth"]


@pytest.mark.parametrize("digits", [8, 12, 64])
def test_the_name_has_the_hash(server, cache, digits):
    good = f"{server.url}/whole/model-{DIGEST[:digits]}.pth"
    assert Path(fetch(good)).read_bytes() == CONTENT
    wrong = f"{server.url}/whole/model-{'abcd1234' * 8:.{digits}}.pth"
    with pytest.raises(ValueError, match="not with abcd1234"):
        fetch(wrong)
    assert files(cache) == [os.path.basename(good)]


def test_a_cached_file_is_verified_again(server, cache):
    url = f"{server.url}/whole/model.pth"
    path = Path(fetch(url, DIGEST))
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=f"the SHA-256 of {path} begins with "):
        fetch(url, DIGEST)


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


@pytest.mark.parametrize("name", NAMES)
def test_hash_in_name(name):
    assert hash_in_name(name) == NAMES[name]


def test_the_zoo_is_where_detectron2_looks_for_it(cache):
    from detectron2.utils.file_io import Detectron2Handler
    from iopath.common.file_io import HTTPURLHandler

    url = ZOO.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX)
    path = Path(_cached(url))
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert HTTPURLHandler()._get_local_path(url) == str(path)
    assert fetch(ZOO) == str(path)  # nothing is downloaded


PLACES = ["http://a/x/m.pth", "http://b/x/m.pth", "http://a:80/x/m.pth", "http://a/x/m.pth?v=1"]


def test_hosts_do_not_share_a_place_in_the_cache(cache):
    assert len({_cached(url) for url in PLACES}) == len(PLACES)


@pytest.mark.parametrize(
    "url",
    ["http://a/../../m.pth", "http://a/%2e%2e/m.pth", "http://a/x%2f..%2f..%2fm.pth", "http://a/"],
)
def test_a_url_does_not_lead_out_of_the_cache(url):
    with pytest.raises(ValueError, match="names no file"):
        _cached(url)


DOWNLOAD = """
import os, sys
from sharedkd.weights.download import fetch
children = []
for _ in range(4):
    children.append(os.fork())
    if not children[-1]:
        os.write(1, f"{fetch(sys.argv[1])}\\n".encode())
        os._exit(0)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children))
"""


def test_four_processes_at_once(server, cache):
    url = f"{server.url}/slow/model-{DIGEST[:8]}.pth"
    left = Path(f"{_cached(url)}.dead.part")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a process that was killed")
    os.utime(left, (0, 0))
    command = [sys.executable, "-W", "ignore", "-c", DOWNLOAD, url]
    said = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    ).stdout
    paths = said.splitlines()
    assert len(paths) == 4 and set(paths) == {_cached(url)}
    assert Path(paths[0]).read_bytes() == CONTENT
    assert len(server.asked) == 1 and files(cache) == [f"model-{DIGEST[:8]}.pth"]


def test_processes_that_cannot_lock_do_not_harm_each_other(server, cache, monkeypatch):
    """On file systems without locks each of them downloads."""
    from contextlib import nullcontext

    monkeypatch.setattr("sharedkd.weights.download.file_lock", lambda path: nullcontext())
    url = f"{server.url}/slow/model.pth"
    os.makedirs(os.path.dirname(_cached(url)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and Path(found[0]).read_bytes() == CONTENT and len(server.asked) > 1
    assert files(cache) == ["model.pth"]


# --- as the weights of a detector ----------------------------------------------------------------


def test_weights_from_a_url(server, cache, tmp_path):
    source = tiny.detector("retinanet", seed=3)
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    server.files["/whole/a.pth"] = data
    url, digest = f"{server.url}/whole/a.pth", hashlib.sha256(data).hexdigest()
    model = tiny.detector("retinanet")
    load_trained(model, url, "model.teacher.weights", False, digest.upper())
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(
        ConfigError, match=f"^model.teacher.weights={url}: cannot be read .*SHA-256"
    ):
        load_trained(model, url, "model.teacher.weights", False, "0" * 64)
    with pytest.raises(ConfigError, match="^train.init_checkpoint=.*only .* bytes arrived"):
        load_trained(model, f"{server.url}/half/a.pth", "train.init_checkpoint")


def test_a_local_file_is_verified(tmp_path):
    state = tiny.detector("retinanet").state_dict()
    path = tmp_path / "teacher.pth"
    torch.save({"model": state}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = tiny.detector("retinanet", seed=1)
    load_trained(model, str(path), "train.init_checkpoint", False, digest[:8])
    with pytest.raises(ConfigError, match=f"begins with {digest[:8]}, not with deadbeef"):
        load_trained(model, str(path), "train.init_checkpoint", False, "deadbeef")
    renamed = path.rename(tmp_path / "teacher-0a1b2c3d.pth")
    with pytest.raises(ConfigError, match="not with 0a1b2c3d as its name or the config says"):
        load_trained(model, str(renamed), "train.init_checkpoint")


@pytest.mark.parametrize("wrong", ["1a2b3c", "xyz" * 5, 12345678, "a" * 65])
def test_no_sha256(tmp_path, wrong):
    keys = {
        "model.teacher.weights": "model.teacher.sha256",
        "train.init_checkpoint": "train.init_sha256",
    }
    for key, sha256_key in keys.items():
        with pytest.raises(ConfigError, match=f"^{sha256_key}={wrong}: is no SHA-256"):
            load_trained(tiny.detector("retinanet"), "a.pth", key, False, wrong)
