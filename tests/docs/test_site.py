"""The site builds in strict mode: every link, anchor and reference leads somewhere."""

import os
import re
import subprocess
import sys

import pytest
import tiny

pytestmark = pytest.mark.nightly


def build(output, *options, source=tiny.ROOT):
    command = [sys.executable, "-W", "ignore", "-m", "sphinx", "-b", "html", "-q", "-W"]
    command += ["--keep-going", "-c", str(tiny.ROOT / "docs"), *options, str(source), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    output = tmp_path_factory.mktemp("site")
    result = build(output)
    assert result.returncode == 0, result.stderr
    return output


def test_it_opens_at_its_root(site):
    target = re.search(r"url=([^\"]+)", (site / "index.html").read_text())[1]
    assert (site / target).exists()


def test_every_page_is_listed(site):
    index = (site / "docs/index.html").read_text()
    for page in (tiny.ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f'href="{page.stem}.html' in index, page


def test_formulas_are_drawn_without_a_script(site):
    page = (site / "docs/method.html").read_text()
    assert "<math" in page and "\\mathrm" not in re.sub(r"<annotation.*?</annotation>", "", page)


def test_tables_are_filled_in(site):
    page = (site / "docs/config.html").read_text()
    for key in ("train.max_iter", "model.teacher.weights", "data.train_json"):
        assert f">{key}<" in page
    assert "{{" not in page
    assert not re.search(r"<td>(<p></p>)?</td>", page)  # a key without a meaning


def test_nothing_is_loaded_from_elsewhere(site):
    loads = r'<(?:script|img|iframe)[^>]+src="(https?:|//)|<link[^>]+rel="stylesheet"[^>]+href="(?:https?:|//)'
    for page in site.rglob("*.html"):
        assert not re.search(loads, page.read_text()), page


def test_a_broken_link_and_a_broken_anchor_are_errors(site, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Title\n\n[file](none.md) [anchor](#none)\n")
    result = build(tmp_path / "out", source=tmp_path)
    assert result.returncode != 0
    assert "none.md" in result.stderr and "'none'" in result.stderr
