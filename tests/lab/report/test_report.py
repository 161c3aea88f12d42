"""What the report says, against folders whose values are known."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import report_folders as folders
import tiny
import yaml
from matplotlib.figure import Figure
from PIL import Image

from sharedkd.errors import ConfigError
from sharedkd.lab.compare import summary as comparison
from sharedkd.lab.compare.plots import PALETTE
from sharedkd.lab.report import settings, training, write_report
from sharedkd.lab.report.documents import as_html as markdown
from sharedkd.lab.report.documents import read_gallery
from sharedkd.lab.report.figures import as_svg, draw_curves
from sharedkd.lab.report.page import as_html
from sharedkd.lab.report.source import read_source
from sharedkd.lab.report.summary import commands, summary, warnings
from sharedkd.lab.runs import short
from sharedkd.lab.scores import read_comparison

# Paired differences 1, 2, 3: t(2) = 4.3027, 4.3027 / sqrt(3) = 2.4841; and 0.9, 1.0, 1.1.
SCORES = {"none": [30.0, 31.0, 35.0], "wide": [31.0, 33.0, 38.0], "sure": [30.9, 32.0, 36.1]}


class Page(HTMLParser):
    """All elements with their attributes and the text in them; it checks that they are nested."""

    EMPTY = {"meta", "link", "img", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        inside = {e["id"] for e in self.open if e["tag"] == "section"}
        element = {"tag": name, "text": "", "section": inside, **dict(attributes)}
        self.found.append(element)
        if name not in self.EMPTY:
            self.open.append(element)

    def handle_startendtag(self, name, attributes):
        self.found.append({"tag": name, "text": "", "section": set(), **dict(attributes)})

    def handle_endtag(self, name):
        assert self.open.pop()["tag"] == name

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def of(self, name, section=None):
        return [
            e for e in self.found if e["tag"] == name and (not section or section in e["section"])
        ]

    def text(self, key):
        """Of one section."""
        return " ".join(next(e["text"] for e in self.of("section") if e["id"] == key).split())

    def rows(self):
        """The results, method to cells as (text, value); without values for a verdict."""
        found, cells = {}, []
        for e in (e for e in self.found if "results" in e["section"]):
            if e["tag"] == "th" and e.get("scope") == "row":
                cells = found[e["text"]] = []
            elif e["tag"] == "td":
                cells.append((e["text"], e.get("data-value")))
        return found


@pytest.fixture
def compared(tmp_path):
    return folders.comparison(tmp_path / "cmp", SCORES)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of such a comparison, and of what the analysis tools wrote to it."""
    folder = folders.comparison(tmp_path_factory.mktemp("report") / "cmp", SCORES)
    folders.features(folder / "features")
    folders.detections(folder / "detections")
    return Page(as_html(folder))


def told(folder):
    return dict(summary(read_source(folder)))


def test_the_table_has_the_numbers_of_the_folder(page):
    found = page.rows()
    assert list(found) == ["none", "wide", "sure", "teacher"]
    assert found["none"][0][0] == "32.00 ± 6.57"  # 4.3027 * 2.6458 / sqrt(3)
    assert found["wide"][1] == ("+2.00 [-0.48, +4.48]", "2")
    assert found["wide"][2] == ("no difference shown", None)
    assert found["sure"][1:3] == [("+1.00 [+0.75, +1.25]", "1"), ("better", None)]
    assert found["sure"][4] == ("53.00", "53")  # AP50
    assert found["sure"][6] == ("–", "")  # APs is null
    assert found["sure"][-3] == ("2.5", "2.5")  # minutes: 200 * 0.75 s
    assert found["teacher"][0] == ("40.00", "40")
    assert len({len(cells) for cells in found.values()}) == 1


def test_the_summary_claims_nothing_without_an_interval(compared, page):
    # 31, 33, 38: standard deviation 3.6056, half width 4.3027 * 3.6056 / sqrt(3).
    difference = "wide: 34.00 ± 8.96 box AP, +2.00 [-0.48, +4.48] against the plain student"
    assert told(compared) == {
        "Finished": "9 of 9 arms (seeds 0, 1, 2)",
        "Baseline": "the plain student: 32.00 ± 6.57 box AP",
        "Largest difference of 2": f"{difference} paired over 3 seeds: no difference shown",
        "All methods": "1 better, 1 no difference shown",
        "Cost of wide": "1.50 times the time of a step and 1.25 times the memory of the plain student",
        "Teacher": "40.00 box AP",
    }
    assert difference in page.text("summary")


def test_one_seed_is_no_evidence(tmp_path):
    folder = folders.comparison(tmp_path / "cmp", {"none": [30.0], "a": [50.0]})
    text = "a: 50.00 box AP, +20.00 against the plain student: one seed: no interval"
    assert told(folder)["Against it"] == text
    assert "verdict better" not in as_html(folder)


@pytest.mark.parametrize(
    "equal, gain",
    # Differences 1 and 1.1: t(1) = 12.706, half width 12.706 * 0.0707 / sqrt(2) = 0.635.
    [([33.0, 34.0], "+1.05 [+0.41, +1.69]"), ([36.0, 37.0], "-1.95 [-2.59, -1.31]")],
)
def test_a_student_of_equal_time_is_no_method_but_is_compared_with(tmp_path, equal, gain):
    scores = {"none": [30.0, 31.0], "a": [34.0, 35.1], "none@a": equal}
    found = told(folders.comparison(tmp_path / "cmp", scores))
    assert found["Against it"].startswith("a: 34.55")
    assert found["In the same time"].startswith(f"{gain} box AP against the plain student")


def test_arms_that_are_missing_are_shown(tmp_path):
    folder = folders.comparison(tmp_path / "cmp", {"none": [30.0, None], "a": [None, None]})
    found = told(folder)
    assert found["Finished"] == "1 of 4 arms (seeds 0, 1)"
    assert found["Other methods"] == "no result yet"
    assert "a seed 1: missing" in Page(as_html(folder)).text("results")
    nothing = folders.comparison(tmp_path / "none", {"none": [None], "a": [None]})
    assert told(nothing)["Result"] == "none yet"
    assert "No run has been evaluated yet." in Page(as_html(nothing)).text("results")


def test_recipes_from_folders_are_known_by_their_names(tmp_path):
    folder = folders.comparison(tmp_path / "cmp", {"none": [1.0], "some/where/recipe.py:2": [2.0]})
    folders.run(folder / "recipe:2" / "seed0", True, {"bbox": {"AP": 2.0}})
    page = Page(as_html(folder))
    assert "recipe:2" in page.rows()
    assert "recipe:2: 1 stage" in page.text("terms")


def test_curves_are_means_over_seeds_at_iterations_that_all_have(compared):
    """The terms are 1 plus the seed: mean 2. Else a curve would jump where a seed ends."""
    of = lambda curves: curves["distill/identical/s8"]  # noqa: E731
    x, y = training.mean_curve(read_source(compared).runs_of("wide"), of)
    assert (x, y) == (list(range(19, 200, 20)), pytest.approx([2] * 10))
    path = compared / "wide/seed0/metrics.json"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    x, _ = training.mean_curve(read_source(compared).runs_of("wide"), of)
    assert x == [19, 39, 59, 79]


def test_curves_and_their_stage_are_drawn_where_they_are():
    axes = draw_curves({"a": ([0, 9], [1, 2]), "b": ([5], [2])}, "AP", (50, 69, 150), 200).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 1], [9, 2]], [[5, 2]]]
    assert axes.lines[1].get_marker() == "o"  # a line of one point cannot be seen
    corners = axes.patches[0].get_path().vertices[:4].tolist()
    assert corners == [[50, 0], [69, 1], [150, 1], [150, 0]]
    assert axes.get_xlim() == (0, 200) and axes.get_yscale() == "linear"


def test_values_of_very_different_size_get_a_logarithmic_axis_and_long_curves_are_thinned():
    long = list(range(5000))
    axes = draw_curves({"a": (long, [1e-3] * 5000), "b": ([0], [1.0])}, "loss").axes[0]
    x, y = axes.lines[0].get_data()
    assert len(x) <= 240 and x[0] == np.mean(range(21)) and y == pytest.approx(1e-3)
    assert axes.get_yscale() == "log"


def test_stages_are_told_with_their_schedule(compared):
    """20 iterations of ramp from 50: the full weight comes at iteration 69."""
    plots = training.terms(read_source(compared))["wide"]
    assert [p.caption for p in plots] == [
        "All losses, weighted",
        "Stage identical: weight 2, iterations 50 to 150 of 200",
    ]
    assert plots[1].names == ["s8", "s16"]  # sorted by number
    stage = read_source(compared).runs_of("wide")[0].stages["identical"]
    assert training.schedule(stage, 200)[1] == (50, 69, 150)
    (known,) = read_source(compared).runs_of("wide")[:1]
    known.config["model"]["stages"]["identical"].update(weight="auto", end="teacher", share=0.07)
    assert training.schedule(known.stages["identical"], 200)[1] == (50, 69, 200)
    known.record["outgrown"] = {"teacher": 99}
    text, band = training.schedule(known.stages["identical"], 200)
    assert text == "weight auto, share 0.07, iterations 50 to 100 of 200" and band == (50, 69, 100)
    for run in compared.glob("wide/seed*/config.yaml"):
        run.unlink()
    plots = training.terms(read_source(compared))["wide"]
    assert "schedule is not known" in plots[1].caption


def test_a_figure_has_the_colours_of_the_page_and_names_as_they_are():
    def draw():
        figure = Figure()
        figure.subplots().plot([0, 1], label="x", color="#0072B2", gid="series_0")
        figure.suptitle("$a$ <b> _c")
        return figure

    svg = as_svg(draw, 'a "label"')
    assert "$a$ &lt;b&gt; _c" in svg and 'aria-label="a &#34;label&#34;"' in svg
    assert 'data-series="0"' in svg and "var(--c1)" in svg and "var(--c0)" in svg
    assert not {"#0072b2", "#000000", "#ffffff"} & set(svg.split('"'))
    assert as_svg(draw, 'a "label"') == svg
    assert "<metadata" not in svg and "http" not in svg


def test_gradient_shares(compared, page):
    shares, count, plot = training.gradients(read_source(compared))["wide"]
    assert (shares, count) == ({"detector": 0.25, "identical/s8": 0.75}, 10)
    assert plot.names == ["detector", "identical/s8"]
    bars = [e["style"] for e in page.of("i", "gradients") if e["style"].startswith("width")][:2]
    assert [bar.split(";")[0] for bar in bars] == ["width: 25.0%", "width: 75.0%"]
    assert "none: mean" not in page.text("gradients")


def test_settings_that_differ(compared, monkeypatch):
    monkeypatch.chdir(compared)
    stage = "_target_=sharedkd.Stage, weight=2.0, start=50, ramp=20, end=0.75, "
    loss = "loss._target_=sharedkd.IdenticalLayer, loss.tap=fpn"
    assert settings.differences(read_source(compared))["wide"] == [
        ("model.teacher", "–", "_target_=sharedkd.FrozenTeacher, weights=somewhere/model.pth"),
        ("model.stages._target_", "–", "stage_dict"),
        ("model.stages.identical", "–", stage + loss),
    ]
    path = compared / "results.json"
    record = json.loads(path.read_text())
    record["configs"]["sure"] = folders.config(False, lr=0.2)
    record["configs"]["sure"]["model"]["path"] = str(compared / "x.pth")
    path.write_text(json.dumps(record))
    # What both have is told setting by setting, and a path as seen from here.
    assert settings.differences(read_source(compared))["sure"] == [
        ("model.student.path", "–", "x.pth"),
        ("optimizer.lr", "0.1", "0.2"),
    ]


def test_a_run_is_compared_with_nothing_but_its_teacher(tmp_path):
    folders.run(tmp_path / "a&b", results={"bbox": {"AP": 12.3, "AP50": 20.0}})
    single = Page(as_html(tmp_path / "a&b"))
    assert told(tmp_path / "a&b")["Trained"] == "200 of 200 iterations"
    assert told(tmp_path / "a&b")["Distilled in"] == "identical (weight 2, iterations 50 to 150)"
    assert told(tmp_path / "a&b")["Started with"] == "3 tensors of its teacher"
    assert single.of("h1")[0]["text"] == "Run: a&b"
    assert "a&b: 3 differences from plain config" in single.text("settings")
    folders.run(tmp_path / "somewhere", False, {"bbox": {"AP": 20.0}})  # the name in its config
    both = Page(as_html(tmp_path))
    for page in (single, both):
        assert page.rows()["a&b"][:2] == [("12.30", "12.3"), ("20.00", "20")]
        assert "baseline" not in page.text("results") and "verdict" not in page.text("results")
    assert both.rows()["teacher"][0] == ("20.00", "20")
    assert told(tmp_path)["Teacher"] == "20.00 box AP"


def test_a_folder_of_runs(tmp_path):
    """As the demo's; its teacher is a run, too, and no method."""
    folders.run(tmp_path / "plain", False, {"bbox": {"AP": 10.0}, "segm": {"AP": 30.0}})
    distilled = folders.run(
        tmp_path / "distilled", True, {"bbox": {"AP": 15.0}, "segm": {"AP": 29.0}}
    )
    folders.run(tmp_path / "teacher", False, {"bbox": {"AP": 20.0}})
    config = (distilled / "config.yaml").read_text()
    weights = tmp_path / "teacher" / "model_final.pth"
    (distilled / "config.yaml").write_text(config.replace("somewhere/model.pth", str(weights)))
    found = summary(read_source(tmp_path))
    assert found[:4] == [
        ("Finished", "2 of 2 runs"),
        ("Baseline", "plain: 30.00 mask AP and 10.00 box AP"),  # masks first
        ("Against it", "distilled: 29.00 mask AP, -1.00 against plain: one seed: no interval"),
        ("Against it", "distilled: 15.00 box AP, +5.00 against plain: one seed: no interval"),
    ]
    page = Page(as_html(tmp_path))
    assert list(page.rows()) == ["distilled", "plain", "teacher"]
    assert page.rows()["distilled"][1] == ("-1.00", "-1")  # of the last table, masks
    assert "prove nothing" in page.text("results") and "verdict" not in page.text("results")


def test_a_run_that_trains(tmp_path):
    """Its last results are in metrics.json; its last line may be torn, and others broken."""
    folder = folders.run(tmp_path / "run")
    assert told(folder)["Result"] == "not evaluated yet"
    assert "No run has been evaluated yet." in Page(as_html(folder)).text("results")
    with open(folder / "metrics.json", "ab") as f:
        f.write(b'{"iteration": 100, "bbox/AP": 5.0}\n{"iteration": 200, "bbox/AP": 7.0}\n')
        f.write(b'\xff\x00\n7\n{"lr": 1}\n{"iteration": 3, "lr": "x"}\n\n{"iteration": 21')
    page = Page(as_html(folder))
    assert page.rows()["run"][0][0] == "7.00"
    assert "5 line(s) of metrics.json cannot be read and are left out" in page.text("summary")
    assert "Box AP over training" in page.text("curves")


def test_files_that_are_missing_or_damaged_are_told(tmp_path):
    folder = folders.run(tmp_path / "run")
    (folder / "metrics.json").unlink()
    (folder / "run.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    (folder / "detections").mkdir()
    (folder / "detections/detections.md").write_text("# Detections\n\nWords.\n")
    (folder / "detections/detections.json").write_text("{")
    page = Page(as_html(folder))
    for text in ("no metrics.json", "run.json cannot be read", "config.yaml is missing"):
        assert text in page.text("summary").replace(f"={folder / 'run.json'}:", "")
    assert "No run has values" in page.text("curves") and "Words." in page.text("detections")
    assert "detections.json has none, or cannot be read" in page.text("detections")
    assert "config of run is missing" in page.text("settings")


def test_what_was_repaired_in_the_data_is_listed_once(compared):
    assert "Repaired" not in Page(as_html(compared)).text("summary")
    lines = ["a.json: 3 of 9 boxes reached over <b>: clipped", "b.json: 1 of 2 images"]
    for seed, found in ((0, lines[:1]), (1, lines)):
        path = compared / "none" / f"seed{seed}" / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "repairs": found}))
    page = Page(as_html(compared))
    assert [e["text"] for e in page.of("li", "summary")] == lines


def test_a_folder_with_nothing_but_a_config(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {max_iter: '${x}'}\nmodel: {stages: 3, student: x}")
    assert told(folder)["Trained"] == "0 iterations"
    shutil.rmtree(folder)
    (tmp_path / "config.yaml").write_text("train: {max_iter: 5}")
    assert told(tmp_path)["Trained"] == "0 of 5 iterations"
    assert "No run has values" in Page(as_html(tmp_path)).text("curves")
    # An evaluation leaves one in the folder that holds the runs.
    folders.run(tmp_path / "plain", False, {"bbox": {"AP": 10.0}})
    assert told(tmp_path)["Trained"] == "200 of 200 iterations"
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0}\n')
    assert told(tmp_path)["Trained"] == "2 of 5 iterations"


def test_a_trial_run_says_that_its_figures_mean_nothing(compared):
    assert warnings(read_source(compared)) == []
    config = folders.config(max_iter=20, fast_dev_run=True)
    (compared / "sure/seed1/config.yaml").write_text(yaml.safe_dump(config))
    text = "sure: 20 iterations and 50 images (train.fast_dev_run): the figures mean nothing."
    assert warnings(read_source(compared)) == [text]


def test_what_is_not_measured_comes_with_its_command(tmp_path):
    """It starts from what the run was started with, and from its folder if that was moved."""
    folder = folders.run(tmp_path / "run")
    here, where = short(folder), (folder / "features", folder / "detections")
    config = f"--config-file {here}/config.yaml --output {here}/features"
    found = " ".join(commands(read_source(folder), *where).values())
    assert config in found and f"visualize_pair.py {here} --output {here}/detections" in found
    record = json.loads((folder / "run.json").read_text())
    record.update(command="train.py x.py", config_file="x.py", overrides=["train.seed=7", "a=b c"])
    (folder / "run.json").write_text(json.dumps(record))
    config, output = "--config-file x.py train.seed=7 'a=b c'", f"--output {here}/features"
    page = Page(as_html(folder))
    assert f"{config} train.output_dir={here} {output}" in page.text("next")
    assert "train.py x.py" in page.text("origin") and "A CPU" in page.text("origin")
    (folder / "config.yaml").write_text(yaml.safe_dump(folders.config(output_dir=str(folder))))
    folders.detections(folder / "detections")
    found = " ".join(commands(read_source(folder), *where).values())
    assert (
        f"{config} {output}" in found
        and "output_dir" not in found
        and "visualize_pair" not in found
    )


def test_what_other_tools_wrote_is_in_the_page_but_nothing_from_outside_of_their_folder(
    page, tmp_path
):
    # Of features one picture, not secret.png beside the folder; 4 models on 2 images; of plots one.
    images = [image["src"].partition(";")[0] for image in page.of("img") if "src" in image]
    assert images == ["data:image/jpeg"] * 8 + ["data:image/png", "data:image/jpeg"]
    assert "yes in 3 of 3 measures." in page.text("features")
    assert "duplicate: IoU of at least 0.5" in page.text("detections")
    options = [e for e in page.of("option") if "selected" in e]
    assert [e["text"] for e in options] == ["plain", "distilled"]
    path = folders.detections(tmp_path / "detections") / "detections.json"
    Image.new("RGB", (2, 2)).save(path.parent / "images/0_0.gif", "GIF")
    path.write_text(path.read_text().replace("0_0.jpg", "0_0.gif"))
    _, shots = read_gallery(path.parent)
    assert [len(shot) for shot in shots.values()] == [3, 4]


def test_markdown_makes_no_markup_links_or_pictures_of_its_own():
    html = markdown(
        "**W:** `a<b`\n\n- x_1\n\n<b>c</b> [d](http://e) ![f](http://g) <http://h>\n\n## i"
    )
    assert html == (
        "<p><strong>W:</strong> <code>a&lt;b</code></p>\n<ul>\n<li>x_1</li>\n</ul>\n"
        "<p>&lt;b&gt;c&lt;/b&gt; [d](http://e)  &lt;http://h&gt;</p>\n<h3>i</h3>\n"
    )


def test_text_is_escaped_and_nothing_is_loaded(tmp_path):
    nasty = f"{folders.NASTY}\"'&".replace("/", "|")
    folder = folders.comparison(tmp_path / "<script>x", {"none": [1.0, 2.0], nasty: [3.0, 4.0]})
    folders.detections(folder / "detections")
    html = as_html(folder)
    page = Page(html)
    assert len(page.of("script")) == 1
    for key in ("results", "curves", "terms", "settings", "next"):
        assert nasty in page.text(key)
    assert folders.NASTY in page.text("origin") and folders.NASTY in page.text("detections")
    for element in page.found:
        assert element.get("src", "data:").startswith("data:")
        assert element.get("href", "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in element)
    assert "http://" not in html and "https://" not in html and "@import" not in html


def test_the_browser_runs_the_script_and_knows_every_colour_on_light_and_on_dark(tmp_path):
    html = as_html(folders.comparison(tmp_path / "cmp", {"none": [1.0], "a": [2.0]}))
    script = re.search("<script>(.*)</script>", html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        in html
    )
    used = set(re.findall(r"var\((--\w+)\)", html)) - {"--at", "--width"}
    defined = re.findall(r"(--\w+): light-dark\(#\w+, #\w+\);", html)
    assert {"--c1", "--ink", "--paper"} <= used <= set(defined)
    assert {f"--c{i}" for i in range(len(PALETTE))} <= set(defined)


def test_the_same_files_make_the_same_bytes(tmp_path):
    folder = folders.comparison(tmp_path / "cmp", {"none": [1.0], "a": [2.0]})
    first = write_report(folder).read_bytes()
    assert first == write_report(folder, tmp_path / "deep/er.html").read_bytes()
    assert first == (folder / "report.html").read_bytes()


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(ConfigError, match="holds neither a run nor a comparison"):
        write_report(tmp_path)
    for text, match in (('{"arms": [', "cannot be read"), ('{"AP": 1}', "is not of a comparison")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"results\.json: {match}"):
            write_report(tmp_path)
    with pytest.raises(ConfigError, match="holds no comparison"):
        read_comparison(tmp_path / "nothing", "--tensorboard")


def test_a_comparison_ends_with_its_tables_and_where_the_report_is(compared, monkeypatch, capsys):
    record = json.loads((compared / "results.json").read_text())
    done = SimpleNamespace(prepare=lambda: None, run=lambda _: comparison.write(record, compared))
    monkeypatch.setattr("sharedkd.lab.compare.comparison.Comparison", lambda *_: done)
    options = ("--config-file", "x.py", "--output", compared)
    assert tiny.run_tool("compare_methods.py", *options) is None
    console = capsys.readouterr().out
    assert "| wide" in console and "How to read this" not in console and "![" not in console
    assert console.splitlines()[-2:] == [short(compared / f"report.{x}") for x in ("md", "html")]
    assert "9 of 9 arms" in (compared / "report.html").read_text()
