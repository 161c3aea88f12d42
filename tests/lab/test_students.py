"""Comparing students: their names and keys, the front, the table, the capacity gap, on made-up records."""

import math

import pytest
import tiny
from records import arm, make, table

from sharedkd.errors import ConfigError
from sharedkd.lab.compare.plots import plot_tradeoff
from sharedkd.lab.compare.student_summary import report_students, write_students
from sharedkd.lab.compare.students import Student, run_students
from sharedkd.lab.compare.tradeoff import Point, capacity_gaps, front, points
from sharedkd.lab.report import write_report

YAML = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


def deployed(median, megabytes, form="torchscript", **more):
    spread = {"median": median, "low": median - 1, "high": median + 1}
    return {
        "format": form,
        "milliseconds": spread,
        "megabytes": megabytes,
        "method": "fgd",
        "seed": 0,
        "rounds": 20,
        "image": [320, 480],
        "hardware": "A CPU, 1 thread(s)",
        "why": "detects nothing",
        **more,
    }


def student(plain, gains, parameters, measured):
    """A record: ``plain`` AP and the gain of fgd, per seed."""
    sizes = {"parameters": {"student": parameters, "losses": 0}}
    arms = [arm("none", seed, ap, **sizes) for seed, ap in enumerate(plain)]
    both = enumerate(zip(plain, gains))
    arms += [arm("fgd", seed, ap + gain, **sizes) for seed, (ap, gain) in both]
    return {**make(arms, teacher={"bbox": {"AP": 45.0}}), "deployed": measured}


@pytest.fixture
def records():
    """Gains: small 0.5, 1, 1.5; middle 2.5, 3, 3.5; large 1, 1.4, 1.8, as it is near to the teacher."""
    return {
        "small": student([20, 21, 25], [0.5, 1, 1.5], 11_000_000, deployed(10.0, 44.0)),
        "middle": student([30, 31, 35], [2.5, 3, 3.5], 21_000_000, deployed(25.0, 84.0)),
        "slow": student([29, 30, 31], [2.8] * 3, 22_000_000, deployed(60.0, 88.0, "eager")),
        "large": student([40, 41, 42], [1, 1.4, 1.8], 41_000_000, deployed(50.0, 164.0)),
    }


def test_the_front_has_what_no_other_beats():
    def at(name, milliseconds, ap):
        return Point(name, "none", ap, math.nan, milliseconds, True)

    found = [at("c", 30, 35), at("a", 10, 20), at("d", 40, 33), at("b", 10, 25), at("e", 50, 35)]
    found += [at("x", math.nan, 90), at("y", 1, math.nan)]
    assert [p.student for p in front(found)] == ["b", "c"]
    assert front([]) == []


def test_the_table(records):
    text = report_students(records, "the command", budget=30)
    rows = table(text, "Box AP")
    assert list(rows) == ["small", "middle", "slow", "large", "teacher"]
    assert rows["middle"] == {
        "parameters": "21,000,000",
        "file MB": "84.0",
        "latency ms": "25.0",
        "AP none": "32.00 ± 6.57",  # 30, 31, 35: 4.3027 * sqrt(7 / 3)
        "method": "fgd",
        "AP": "35.00 ± 7.76",  # 32.5, 34, 38.5: 4.3027 * sqrt(9.75 / 3)
        "gain [low, high]": "+3.00 [+1.76, +4.24]",  # 4.3027 * 0.5 / sqrt(3)
        "verdict": "better",
        "seeds": "3 of 3",
        "Pareto front": "fgd",
        "within 30 ms": "yes",
    }
    assert rows["slow"]["latency ms"] == "60.0 (eager)" and rows["slow"]["Pareto front"] == "-"
    assert rows["large"]["Pareto front"] == "fgd" and rows["large"]["within 30 ms"] == "no"
    assert rows["teacher"]["AP"] == "45.00"
    assert (
        "Within 30 ms `middle` with `fgd` has the highest mean box AP, 35.00, in 25.0 ms." in text
    )
    assert "the eager model, usually slower than a file (detects nothing)" in text
    none = report_students(records, "the command", budget=5)
    assert "No student is within 5 ms: the fastest, `small`, takes 10.0 ms." in none
    assert "within" not in report_students(records, "the command").lower()


def test_where_a_method_does_harm_the_plain_student_is_on_the_front(records):
    records["small"] = student([20, 21, 25], [-1, -1, -1], 11_000_000, deployed(10.0, 44.0))
    assert table(report_students(records, ""), "Box AP")["small"]["Pareto front"] == "none"


def test_a_capacity_gap_is_said_where_the_seeds_show_it(records):
    """Small gains 2, 2, 2 less than middle, by seed, and 2.3, 1.8, 1.3 less than slow; large less than both."""
    (gap,) = capacity_gaps(records, "bbox")
    assert (gap.method, gap.student, gap.larger) == ("fgd", "small", "middle")
    assert (gap.less.mean, gap.less.half_width, gap.less.count) == pytest.approx((2, 0, 3))
    assert (
        "With `fgd`, `small` (11,000,000 parameters) gains +1.00 [-0.24, +2.24] box AP, and the larger "
        "`middle` (21,000,000) +3.00 [+1.76, +4.24]: +2.00 [+2.00, +2.00] more. The teacher may be "
        "too strong for `small`" in report_students(records, "")
    )
    for seed in (1, 2):  # one seed shows nothing
        for record in records.values():
            record["arms"] = [a for a in record["arms"] if a["seed"] != seed]
    assert capacity_gaps(records, "bbox") == []


def test_a_gain_that_differs_by_chance_is_no_gap(records):
    records = {name: records[name] for name in ("small", "middle")}
    records["middle"] = student([30, 31, 35], [0, 3, 3], 21_000_000, None)
    assert capacity_gaps(records, "bbox") == []


def test_the_plot_has_front_budget_and_teacher(records):
    records["none yet"] = student([50], [1], 1, None)
    drawn = {"bbox": points(records, "bbox")}
    (axes,) = plot_tradeoff(drawn, {"bbox": 45.0}, 30.0).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["Pareto front"].get_xdata()) == [10, 25, 50]
    assert list(lines["Pareto front"].get_ydata()) == pytest.approx([23, 35, 42.4])
    assert list(lines["budget: 30 ms"].get_xdata()) == [30, 30]
    assert list(lines["teacher"].get_ydata()) == [45, 45]
    assert {text.get_text() for text in axes.texts} == {"small", "middle", "slow", "large"}
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"none", "fgd", "fgd (eager)"} <= legend


def test_the_page_has_the_table_the_plot_and_the_students_pages(records, tmp_path):
    write_students(records, tmp_path, "a <b>", 30.0)
    page = write_report(tmp_path).read_text()
    assert "<td" in page and "data:image/png;base64," in page and "a &lt;b&gt;" in page
    assert '<a href="./middle/report.html">middle</a>' in page and "too strong for" in page


def test_unfinished_students_are_shown(tmp_path):
    waiting = {**make([{"method": m, "seed": 0, "status": "missing"} for m in ("none", "fgd")])}
    records = {"a": student([20], [1], 5, None), "b": {**waiting, "deployed": None}}
    write_students(records, tmp_path, "", None)
    row = table((tmp_path / "report.md").read_text(), "Box AP")["b"]
    assert row["seeds"] == "0 of 1" and row["latency ms"] == row["AP"] == row["parameters"] == "-"


def test_warning_of_latencies_of_different_machines(records):
    records["large"]["deployed"]["hardware"] = "Another CPU"
    text = report_students(records, "")
    assert "**Warning:** the latencies are of different machines" in text and "Another CPU" in text


@pytest.mark.parametrize(
    "text, name, overrides",
    [
        ("a/small.py", "small", []),
        (f"{YAML}:SEED=1", "faster_rcnn_R_50_FPN_1x:SEED-1", ["SEED=1"]),
        ("x.y=[1,2]:train.init_checkpoint=w/r18.pkl", "base:y--1-2-:init_checkpoint-r18.pkl", None),
        (f"{YAML}:depth=18", "faster_rcnn_R_50_FPN_1x:depth-18", ["distill.depth=18"]),
        (
            f"{YAML}:width=0.5",
            "faster_rcnn_R_50_FPN_1x:width-0.5",
            [
                "MODEL.FPN.OUT_CHANNELS=128",
                "MODEL.ROI_BOX_HEAD.FC_DIM=512",
                "MODEL.ROI_BOX_HEAD.CONV_DIM=128",
                "MODEL.ROI_MASK_HEAD.CONV_DIM=128",
            ],
        ),
    ],
)
def test_names_and_keys(text, name, overrides):
    found = Student.of(text, "some/base.py")
    assert found.name == name
    assert found.overrides == (list(found.settings) if overrides is None else overrides)


@pytest.mark.parametrize(
    "students, teacher, words",
    [
        (["small.py"], [], "have no teacher"),
        (["a/small.py", "b/small.py"], ["distill.teacher=x"], "has the name of a/small.py"),
        (["depth=18"], ["distill.teacher=x"], "names no config"),
        (["{root}/configs/custom_coco_plain.py:width=0.5"], ["distill.teacher=x"], "classic yamls"),
        ([f"{YAML}:depth=half"], ["distill.teacher=x"], "depth=half is no ResNet's depth"),
        ([f"{YAML}:width=half"], ["distill.teacher=x"], "width=half is no number"),
    ],
)
def test_students_that_cannot_be_compared_are_refused(students, teacher, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        found = [Student.of(text.format(root=tiny.ROOT)) for text in students]
        run_students(tiny.ROOT, found, ["none"], [0], tmp_path / "out", teacher)
    assert not (tmp_path / "out").exists()


def test_students_whose_own_methods_differ_are_refused_without_a_list(tmp_path):
    pair = f"{tiny.ROOT}/configs/retinanet_sharedkd.py:model.stages.identical.share=0.3"
    found, teacher = [Student.of(text) for text in (YAML, pair)], [f"distill.teacher={YAML}"]
    with pytest.raises(ConfigError, match="methods=none,config; none,shared_kd: differ by student"):
        run_students(tiny.ROOT, found, [], [0], tmp_path / "out", teacher)
