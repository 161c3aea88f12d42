"""What the report says, against folders whose values are known."""

import json
import re
import runpy
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import report_folders as folders
import yaml
from PIL import Image

from sharedkd.errors import ConfigError
from sharedkd.lab.compare import summary as comparison
from sharedkd.lab.report import write_report
from sharedkd.lab.report.markup import Markup, markdown, tag
from sharedkd.lab.report.page import as_html
from sharedkd.lab.report.svg import Axis, Mark, line_plot, mark_plot, stacked_bar
from sharedkd.lab.runs import short

# Paired differences 1, 2, 3: t(2) = 4.3027, 4.3027 / sqrt(3) = 2.4841; and 0.9, 1.0, 1.1.
SCORES = {"none": [30.0, 31.0, 35.0], "wide": [31.0, 33.0, 38.0], "sure": [30.9, 32.0, 36.1]}


class Elements(HTMLParser):
    """All elements with their attributes and the text in them; it sees that they are nested."""

    EMPTY = {"meta", "link", "img", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        element = {"tag": name, "text": "", **dict(attributes)}
        self.found.append(element)
        if name not in self.EMPTY:
            self.open.append(element)

    def handle_startendtag(self, name, attributes):
        self.found.append({"tag": name, "text": "", **dict(attributes)})

    def handle_endtag(self, name):
        assert self.open.pop()["tag"] == name

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def of(self, name, **attributes):
        return [
            e
            for e in self.found
            if e["tag"] == name and all(attributes[k] == e.get(k) for k in attributes)
        ]


def part(text, key):
    """One section of the page."""
    return re.search(f'<section id="{key}".*?</section>', text, re.S).group()


def words(html):
    return " ".join(unescape(re.sub("<[^>]*>", " ", html)).split())


def rows(html):
    """Method -> its cells as (text, value), of the first sortable table."""
    table = re.search('<table class="sortable">.*?</table>', html, re.S).group()
    found = {}
    for row in re.findall("<tr.*?</tr>", table.split("<tbody>")[1], re.S):
        cells = re.findall(r'<td(?:[^>]*data-value="([^"]*)")?[^>]*>(.*?)</td>', row)
        found[words(re.search("<th.*?</th>", row).group())] = cells
    return found


@pytest.fixture
def compared(tmp_path):
    return folders.comparison(tmp_path / "cmp", SCORES)


def test_the_table_has_the_numbers_of_the_folder(compared):
    found = rows(part(as_html(compared), "results"))
    assert list(found) == ["none", "wide", "sure", "teacher"]
    assert found["none"][0][1] == "32.00 ± 6.57"  # 4.3027 * 2.6458 / sqrt(3)
    assert found["wide"][1] == ("2", "+2.00 [-0.48, +4.48]")
    assert found["wide"][2][1] == "no difference shown"
    assert found["sure"][1] == ("1", "+1.00 [+0.75, +1.25]")
    assert found["sure"][2][1] == "better"
    assert found["sure"][4] == ("53", "53.00")  # AP50
    assert found["sure"][6] == ("", "–")  # APs is null
    assert found["sure"][-3] == ("2.5", "2.5")  # minutes: 200 * 0.75 s
    assert found["teacher"][0] == ("40", "40.00")


def test_the_summary_is_three_sentences_that_claim_nothing_without_an_interval(compared):
    text = words(part(as_html(compared), "summary"))
    assert "9 arms are finished (seeds 0, 1, 2); the teacher has 40.00 box AP." in text
    # 31, 33, 38: standard deviation 3.6056, half width 4.3027 * 3.6056 / sqrt(3).
    assert (
        "Of 2 methods wide has the largest mean difference: it has 34.00 ± 8.96 box AP, "
        "2.00 more than the plain student (32.00 ± 6.57), [-0.48, +4.48] paired over 3 seeds: "
        "no difference shown; of 2 methods with an interval 1 is better, 0 worse, and 1 includes zero."
    ) in text
    assert "1.50 times the time of a step and 1.25 times the memory of the plain student." in text
    assert len(re.findall(r"\.(?= [A-Z]|$)", text)) == 3


def test_one_seed_is_no_evidence(tmp_path):
    folder = folders.comparison(tmp_path / "cmp", {"none": [30.0], "a": [50.0]})
    html = as_html(folder)
    text = (
        "a has 50.00 box AP, 20.00 more than the plain student (30.00); one seed, so no interval."
    )
    assert text in words(part(html, "summary"))
    assert "verdict better" not in html


def test_against_the_plain_student_of_equal_time(tmp_path):
    scores = {"none": [30.0, 31.0], "a": [34.0, 35.1], "none@a": [33.0, 34.0]}
    text = words(part(as_html(folders.comparison(tmp_path / "cmp", scores)), "summary"))
    # Differences 1 and 1.1: t(1) = 12.706, half width 12.706 * 0.0707 / sqrt(2) = 0.635.
    assert "trained for as long it has +1.05 [+0.41, +1.69]: better" in text
    assert "a has 34.55" in text


def test_a_student_of_equal_time_is_no_method(tmp_path):
    scores = {"none": [30.0, 31.0], "a": [34.0, 35.1], "none@a": [36.0, 37.0]}
    text = words(part(as_html(folders.comparison(tmp_path / "cmp", scores)), "summary"))
    assert "a has 34.55" in text and "Of 2 methods" not in text
    assert "trained for as long it has -1.95 [-2.59, -1.31]: worse" in text


def test_missing_arms(tmp_path):
    folder = folders.comparison(tmp_path / "cmp", {"none": [30.0, None], "a": [None, None]})
    html = as_html(folder)
    assert "1 of 4 arms is finished" in words(part(html, "summary"))
    assert "The plain student has 30.00 box AP." in words(part(html, "summary"))
    assert "No other method has a result yet." in words(part(html, "summary"))
    assert "a seed 1: missing" in words(part(html, "results"))
    nothing = folders.comparison(tmp_path / "none", {"none": [None], "a": [None]})
    assert "None of 2 arms has a result yet" in words(part(as_html(nothing), "summary"))


def test_recipes_from_folders_are_known_by_their_names(tmp_path):
    folder = folders.comparison(tmp_path / "cmp", {"none": [1.0], "some/where/recipe.py:2": [2.0]})
    folders.run(folder / "recipe:2" / "seed0", True, {"bbox": {"AP": 2.0}})
    html = as_html(folder)
    assert "recipe:2" in rows(part(html, "results"))
    assert "recipe:2: 1 stage" in words(part(html, "curves"))
    assert "some/where" not in part(html, "results")


def plots(html, caption):
    """The plots whose caption begins so."""
    figures = re.findall("<figure>.*?</figure>", html, re.S)
    return [f for f in figures if words(f).startswith(caption)]


def curve(plot, name):
    """Name of a curve -> its points in pixels."""
    path = re.search(f'<title>{name}</title><path d="M([^"]*)"', plot).group(1)
    return np.array([[float(x) for x in point.split()] for point in path.split("L")])


def x_scale(plot):
    """Pixels of an iteration, from the labels of the axis."""
    ticks = re.findall(r'data-value="([\d.]+)"><text x="([\d.]+)"', plot)
    values, pixels = np.array(ticks, float).T
    slope, offset = np.polyfit(values, pixels, 1)
    return lambda iteration: slope * iteration + offset


def test_the_schedule_is_shaded_at_its_iterations(compared):
    plot = plots(part(as_html(compared), "curves"), "Stage identical")[0]
    assert "weight 2, iterations 50 to 150 of 200" in words(plot)
    points = re.search('<polygon points="([^"]*)"', plot).group(1)
    corners = [tuple(map(float, p.split(","))) for p in points.split(" ")]
    at = x_scale(plot)
    # 20 iterations of ramp: the full weight comes at iteration 69, and 150 is the first without.
    expected = [at(50), at(69), at(150), at(150)]
    assert [x for x, _ in corners] == pytest.approx(expected, abs=0.2)
    assert corners[0][1] == corners[3][1] > corners[1][1] == corners[2][1]


def test_without_a_config_nothing_is_shaded(tmp_path):
    folder = folders.run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    html = part(as_html(folder), "curves")
    assert "<polygon" not in html
    assert "schedule is not known" in words(html)


def test_curves_are_means_over_seeds_at_their_iterations(compared):
    """The terms are 1 and 3 plus the seed: means 2 and 4, and the axis in pixels grows downwards."""
    plot = plots(part(as_html(compared), "curves"), "Stage identical")[0]
    low, high = curve(plot, "s8"), curve(plot, "s16")
    assert len(low) == 10
    assert low[:, 0] == pytest.approx([x_scale(plot)(i) for i in range(19, 200, 20)], abs=0.2)
    labels = re.findall(r'<text x="48" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', plot)
    pixels, values = np.array(labels, float).T
    slope, offset = np.polyfit(pixels - 4, values, 1)
    assert slope * low[:, 1] + offset == pytest.approx(2, abs=0.02)
    assert slope * high[:, 1] + offset == pytest.approx(4, abs=0.02)


def test_iterations_that_only_some_seeds_logged_are_left_out_of_the_mean(compared):
    """Else a curve would jump where a seed ends."""
    path = compared / "wide/seed0/metrics.json"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    plot = plots(part(as_html(compared), "curves"), "Stage identical")[0]
    assert len(curve(plot, "s8")) == 4


def test_gradient_shares(compared):
    html = part(as_html(compared), "gradients")
    bar = plots(html, "wide: mean of 10 measurements")[0]
    widths = {k: float(w) for k, w in re.findall(r'<title>(.*?): .*?width="([\d.]+)"', bar)}
    assert widths["identical/s8"] == pytest.approx(3 * widths["detector"], abs=0.3)
    assert "detector 25.0%" in words(bar) and "identical/s8 75.0%" in words(bar)
    assert not plots(html, "none")


def test_swatches_look_like_their_bars():
    shares = {f"term {i}": 1.0 for i in range(20)}
    plot = stacked_bar("label", shares)
    bars, swatches = plot.split("<ul")
    looks = [re.findall('class="(fill [^"]*)"', each) for each in (bars, swatches)]
    assert looks[0] == looks[1] and len(set(looks[0])) == 20


def test_levels_are_sorted_by_number(tmp_path):
    folder = folders.run(tmp_path / "run")
    path = folder / "metrics.json"
    path.write_text(
        path.read_text().replace(
            '"distill/identical/weight"',
            '"distill/identical/s8_s16": 1, "distill/identical/s4": 1, "distill/identical/weight"',
        )
    )
    plot = plots(part(as_html(folder), "curves"), "Stage identical")[0]
    names = [words(name) for name in re.findall("<button.*?</button>", plot)]
    assert names == ["s4", "s8", "s8_s16", "s16"]


def test_marks_of_the_cost_plot():
    marks = [Mark("a", 1.0, 10.0, 2.0, 0), Mark("b", 3.0, 20.0, float("nan"), 1)]
    plot = mark_plot("label", marks, "minutes", "AP", level=30.0)
    points = np.array(re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4.5"', plot), float)
    at = x_scale(plot)
    assert points[:, 0] == pytest.approx([at(1), at(3)], abs=0.2)
    low, high = map(float, re.search(r'd="M[\d.]+ ([\d.]+)V([\d.]+)', plot).groups())
    assert (low + high) / 2 == pytest.approx(points[0, 1], abs=0.2)
    assert (low - high) / 4 == pytest.approx((points[0, 1] - points[1, 1]) / 10, rel=0.02)


def test_names_of_marks_do_not_cover_each_other():
    marks = [Mark(f"method {i}", 1 + i / 50, 10 + i % 2 / 50, float("nan"), i) for i in range(8)]
    marks.append(Mark("far", 9.0, 20.0, float("nan"), 8))
    plot = mark_plot("label", marks, "minutes", "AP")
    spots = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="middle" class="name">', plot)
    spots = np.array(spots, float)
    for i, (x, y) in enumerate(spots):
        for other_x, other_y in spots[:i]:
            assert abs(y - other_y) >= 13 or abs(x - other_x) >= 40


@pytest.mark.parametrize(
    "low, high, log, expected",
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (0.5, 2.6, False, [0.5, 1, 1.5, 2, 2.5]),
        (1, 1000, True, [1, 10, 100, 1000]),
        (2, 40, True, [3, 10, 30]),
        (7, 7, False, [6, 6.5, 7, 7.5, 8]),
    ],
)
def test_ticks(low, high, log, expected):
    assert Axis(low, high, 0, 100, log).ticks == pytest.approx(expected)


def test_curves_of_very_different_size_share_a_logarithmic_axis_and_long_ones_are_thinned():
    series = {"small": [(i, 1e-3) for i in range(5000)], "large": [(0, 1.0), (9, float("nan"))]}
    plot = line_plot("label", series)
    assert len(curve(plot, "small")) <= 240
    assert curve(plot, "small")[:, 1] == pytest.approx(curve(plot, "small")[0, 1])
    assert line_plot("label", {"nothing": [(1, float("nan"))]}) == ""


def test_settings_that_differ(compared):
    found = part(as_html(compared), "configs")
    assert "wide: 3 differences from none" in words(found)
    assert "model.stages.identical – _target_=sharedkd.Stage, weight=2.0, start=50" in words(found)
    teacher = "_target_=sharedkd.FrozenTeacher, weights=somewhere/model.pth"
    assert f"model.teacher – {teacher}" in words(found)
    assert "model.student.depth" not in words(found)  # the same in both
    assert "train.seed" not in found


def test_what_both_have_is_told_setting_by_setting_and_paths_are_short(compared, monkeypatch):
    monkeypatch.chdir(compared)
    config = folders.config(False, lr=0.2)
    config["model"]["path"] = str(compared / "x.pth")
    path = compared / "results.json"
    record = json.loads(path.read_text())
    record["configs"]["sure"] = config
    path.write_text(json.dumps(record))
    text = words(part(as_html(compared), "configs"))
    assert "sure: 2 differences from none" in text
    assert "optimizer.lr 0.1 0.2" in text
    assert "model.student.path – x.pth" in text


def test_a_run(tmp_path):
    html = as_html(folders.run(tmp_path / "a&b", results={"bbox": {"AP": 12.3}}))
    text = words(part(html, "summary"))
    assert "a&b has trained 200 of 200 iterations, and has 12.30 box AP." in text
    assert "1 stage: identical (weight 2, iterations 50 to 150)" in text
    assert "One run cannot say what distillation gains" in text
    assert "plain config" in part(html, "configs")
    assert "model.stages.identical – " in words(part(html, "configs"))
    assert "start=50" in words(part(html, "configs"))
    assert "A CPU" in part(html, "about") and "opts=['a<b']" in words(part(html, "about"))


def test_a_run_is_compared_with_nothing(tmp_path):
    folders.run(tmp_path / "student", results={"bbox": {"AP": 12.3, "AP50": 20.0}})
    single = as_html(tmp_path / "student")
    assert "<h1>Run: student</h1>" in single
    folders.run(tmp_path / "teacher", False, {"bbox": {"AP": 20.0}})
    config = tmp_path / "student/config.yaml"
    config.write_text(config.read_text().replace("somewhere", str(tmp_path / "teacher")))
    with_teacher = as_html(tmp_path)
    for html in (single, with_teacher):
        assert rows(part(html, "results"))["student"][:2] == [("12.3", "12.30"), ("20", "20.00")]
        text = words(part(html, "results"))
        assert "baseline" not in text and "verdict" not in text
        assert 'href="#cost"' not in html and 'id="cost"' not in html
    assert rows(part(with_teacher, "results"))["teacher"][0] == ("20", "20.00")
    assert "and has 12.30 box AP; the teacher has 20.00 box AP." in with_teacher


def test_a_trial_run_says_that_its_figures_mean_nothing(compared, tmp_path):
    told = "20 iterations and 50 images (train.fast_dev_run): the figures mean nothing."
    folder = folders.run(tmp_path / "trial", results={"bbox": {"AP": 12.3}})
    config = folders.config(max_iter=20, fast_dev_run=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for key in ("summary", "results"):
        assert f"trial: {told}" in words(part(as_html(folder), key))
    assert "mean nothing" not in as_html(compared)
    (compared / "sure/seed1/config.yaml").write_text(yaml.safe_dump(config))
    assert f"sure: {told}" in words(part(as_html(compared), "summary"))


def test_the_command_of_a_run_is_the_one_of_its_record(tmp_path):
    folder = folders.run(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record.update(command="tools/lazyconfig_train_net.py x.py 'a=b c'", config_file="x.py")
    record.update(overrides=["train.seed=7", "a=b c"])
    (folder / "run.json").write_text(json.dumps(record))
    html = as_html(folder)
    assert "tools/lazyconfig_train_net.py x.py 'a=b c'" in words(part(html, "about"))
    assert "Namespace" not in html and "opts=" not in html
    features = short(folder / "features")
    command = f"--config-file x.py --output {features} train.seed=7 'a=b c'"
    moved = f"{command} train.output_dir={short(folder)}"
    assert moved in words(part(html, "features"))
    config = folders.config(output_dir=str(folder))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    stayed = words(part(as_html(folder), "features"))
    assert command in stayed and "output_dir" not in stayed


def test_a_run_in_training(tmp_path):
    html = as_html(folders.run(tmp_path / "run"))
    assert "has not been evaluated yet" in words(part(html, "summary"))
    assert "No run has been evaluated yet." in words(part(html, "results"))
    assert plots(part(html, "curves"), "Stage identical")
    config = short(tmp_path / "run/config.yaml")
    command = f"tools/analyze_features.py --config-file {config} --output "
    assert command in words(part(html, "features"))


def test_a_folder_with_nothing_but_a_config(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {max_iter: 5}")
    html = as_html(tmp_path)
    assert "has trained 0 of 5 iterations" in words(part(html, "summary"))
    assert "No run has a metrics.json yet." in words(part(html, "curves"))


def test_a_folder_of_runs(tmp_path):
    """As the demo's; its teacher is a run, too, and no method."""
    folders.run(tmp_path / "plain", False, {"bbox": {"AP": 10.0}})
    distilled = folders.run(tmp_path / "distilled", True, {"bbox": {"AP": 15.0}})
    folders.run(tmp_path / "teacher", False, {"bbox": {"AP": 20.0}})
    config = (distilled / "config.yaml").read_text()
    weights = tmp_path / "teacher" / "model_final.pth"
    (distilled / "config.yaml").write_text(config.replace("somewhere/model.pth", str(weights)))
    html = as_html(tmp_path)
    found = rows(part(html, "results"))
    assert list(found) == ["distilled", "plain", "teacher"]
    assert found["distilled"][1] == ("5", "+5.00")
    text = words(part(html, "summary"))
    assert "2 runs are finished; the teacher has 20.00 box AP. distilled has 15.00 box AP" in text
    assert "5.00 more than plain (10.00); one seed, so no interval." in text
    assert "times the memory of plain." in text
    assert "prove nothing" in words(part(html, "results"))
    assert "verdict" not in part(html, "results")


def test_the_teacher_of_runs_that_were_moved_is_the_one_beside_them(tmp_path):
    folders.run(tmp_path / "distilled", True, {"bbox": {"AP": 15.0}})
    folders.run(tmp_path / "plain", False, {"bbox": {"AP": 10.0}})
    folders.run(tmp_path / "somewhere", False, {"bbox": {"AP": 20.0}})  # as its config has it
    html = as_html(tmp_path)
    assert "the teacher has 20.00 box AP" in html
    assert list(rows(part(html, "results"))) == ["distilled", "plain", "teacher"]


def test_a_config_that_an_evaluation_left_does_not_hide_the_runs_beside_it(tmp_path):
    folders.run(tmp_path / "plain", False, {"bbox": {"AP": 10.0}})
    (tmp_path / "config.yaml").write_text("train: {max_iter: 600}")
    (tmp_path / "log.txt").write_text("an evaluation\n")
    html = as_html(tmp_path)
    assert "plain has trained 200 of 200" in html
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0}\n')
    assert "has trained 2 of 600" in as_html(tmp_path)


def test_both_tasks_are_named(tmp_path):
    results = {"bbox": {"AP": 30.0}, "segm": {"AP": 20.0}}
    folders.run(tmp_path / "plain", False, results)
    results = {"bbox": {"AP": 29.0}, "segm": {"AP": 21.5}}
    folders.run(tmp_path / "kd", True, results)
    told = (
        "kd has 21.50 mask AP, 1.50 more than plain (20.00), and 29.00 box AP, "
        "1.00 less than plain (30.00); one seed, so no interval."
    )
    assert told in words(part(as_html(tmp_path), "summary"))


def test_results_of_runs_without_a_record_are_those_of_the_last_evaluation(tmp_path):
    folder = folders.run(tmp_path / "run")
    (folder / "run.json").unlink()
    with open(folder / "metrics.json", "a") as f:
        f.write('{"iteration": 100, "bbox/AP": 5.0}\n{"iteration": 200, "bbox/AP": 7.0}\n{"torn')
    assert rows(part(as_html(folder), "results"))["run"][0][1] == "7.00"
    assert plots(part(as_html(folder), "curves"), "box AP over training")


def test_what_is_missing_comes_with_the_command_that_makes_it(compared):
    html = as_html(compared)
    here = short(compared)
    config = f"{here}/wide/seed0/config.yaml"
    command = f"tools/analyze_features.py --config-file {config} --output {here}/features"
    assert command in words(part(html, "features"))
    command = f"tools/visualize_pair.py {here} --output {here}/detections"
    assert command in words(part(html, "detections"))
    for key in ("features", "detections"):
        assert words(part(html, key)).endswith(f"tools/report.py {here}")


def test_heat_maps_before_and_after(compared):
    folders.features(compared / "features")
    html = part(as_html(compared), "features")
    assert "the inner gaps are smaller" in words(html)
    assert "there are too few for an interval" in words(html)
    assert "nan" not in words(html)
    for state, value in (("initial", "0.90"), ("final", "0.10")):
        table = re.search(f"<caption>student - student, {state}</caption>.*?</table>", html).group()
        cells = re.findall("<td[^>]*>([^<]+)(?:<small>([^<]+)</small>)?</td>", table)
        assert cells == [("0.00", "±0.01"), (value, "±0.02"), (value, "±0.03"), ("–", "")]
    # One scale of colours: 0.9 is the largest value, 0.1 is next to the smallest, 0.
    shades = dict(re.findall(r"background:(#\w+);color:[^>]*>([\d.]+)<small>±0.02", html))
    lightness = {v: sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c, v in shades.items()}
    assert lightness["0.90"] > lightness["0.50"] > lightness["0.10"]


def test_other_initial_weights_are_told(compared):
    folder = folders.features(compared / "features")
    told = "The initial weights are others than those that the run started from"
    assert told not in as_html(compared)
    path = folder / "features.json"
    path.write_text(
        path.read_text().replace('"initial_is_the_runs": true', '"initial_is_the_runs": false')
    )
    assert f"<strong>{told}</strong>" in part(as_html(compared), "features")


def test_kinds_of_mistakes_are_defined(compared):
    folders.detections(compared / "detections")
    text = words(part(as_html(compared), "detections"))
    assert "duplicate : IoU of at least 0.5 with an object that a surer detection has found" in text
    assert "The quality of an image is the sum of the IoU of right detections over" in text


def test_pictures_are_in_the_page_but_none_from_outside_the_folder(compared):
    folders.features(compared / "features")
    folders.detections(compared / "detections")
    elements = Elements(as_html(compared))
    images = elements.of("img")
    assert len(images) == 1 + 2 * 4  # secret.png beside the folder is not among them
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    gallery = elements.of("div", **{"class": "gallery"})[0]
    assert (gallery["data-left"], gallery["data-right"]) == ("plain", "distilled")


def test_text_is_escaped_and_elements_are_nested(tmp_path):
    nasty = f"{folders.NASTY}\"'&"
    scores = {"none": [1.0, 2.0], nasty.replace("/", "|"): [3.0, 4.0]}
    folder = folders.comparison(tmp_path / "<script>x", scores)
    folders.detections(folder / "detections")
    html = as_html(folder)
    elements = Elements(html)
    assert len(elements.of("script")) == 1
    assert nasty.replace("/", "|") in elements.of("section", id="results")[0]["text"]
    assert folders.NASTY in elements.of("section", id="about")[0]["text"]


def test_it_needs_nothing_from_outside(compared):
    folders.detections(compared / "detections")
    for element in Elements(as_html(compared)).found:
        assert element.get("src", "data:").startswith("data:")
        assert element.get("href", "#").startswith(("#", "data:"))
        assert "url(" not in element.get("style", "")
    assert "@import" not in as_html(compared)


def test_a_config_makes_no_objects(tmp_path):
    folder = folders.run(tmp_path / "run")
    trap = tmp_path / "trap"
    with open(folder / "config.yaml", "a") as f:
        f.write(f"x: !!python/object/apply:os.mkdir [{trap}]\n")
    assert "identical" in as_html(folder)  # the rest is read
    assert not trap.exists()


def test_the_same_files_make_the_same_bytes(compared):
    folders.detections(compared / "detections")
    first = write_report(compared).read_bytes()
    assert first == write_report(compared, compared / "deep/er.html").read_bytes()
    assert first == (compared / "report.html").read_bytes()


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(ConfigError, match="holds neither a run nor a comparison"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"arms": [')
    with pytest.raises(ConfigError, match=r"results\.json: cannot be read"):
        write_report(tmp_path)


def test_a_comparison_ends_with_its_tables_and_where_the_report_is(compared, monkeypatch, capsys):
    record = json.loads((compared / "results.json").read_text())
    end = lambda *_: comparison.write(record, str(compared))  # noqa: E731  no training
    monkeypatch.setattr("sharedkd.lab.compare.comparison.run_comparison", end)
    tool = Path(__file__).parents[3] / "tools/compare_methods.py"
    words = [str(tool), "--config-file", "x.py", "--output", str(compared)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setitem(sys.modules, "prologue", ModuleType("prologue"))  # of a process of its own
    runpy.run_path(str(tool), run_name="__main__")
    console = capsys.readouterr().out
    assert "| wide" in console and "How to read this" not in console and "![" not in console
    assert console.splitlines()[-2:] == [short(compared / f"report.{x}") for x in ("md", "html")]
    assert "9 arms are finished" in (compared / "report.html").read_text()


def test_markdown_of_our_reports():
    text = "**Warning:** `a<b` is *odd*.\n\n- `x_1`: two\n  lines\n- b * c * d"
    assert markdown(text) == (
        "<p><strong>Warning:</strong> <code>a&lt;b</code> is <em>odd</em>.</p>"
        "<ul><li><code>x_1</code>: two lines</li><li>b * c * d</li></ul>"
    )


def test_tags():
    assert tag("a", "<", Markup("<br/>"), href='"') == '<a href="&quot;">&lt;<br/></a>'
    assert tag("input", disabled=True, open=False, value=0) == '<input disabled value="0"/>'


def test_a_picture_of_a_kind_that_browsers_do_not_know_is_left_out(compared):
    folders.detections(compared / "detections")
    Image.new("RGB", (2, 2)).save(compared / "detections/ap_bars.png")
    (compared / "detections/mistakes.png").mkdir()
    assert len(Elements(as_html(compared)).of("img")) == 9
