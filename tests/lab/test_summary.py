import json
import math

import pytest
from PIL import Image
from records import arm, failed, make, table

from sharedkd.lab.compare.plots import plot_ap, plot_cost, plot_sizes
from sharedkd.lab.compare.summary import report, write
from sharedkd.lab.scores import (
    Difference,
    curve_of,
    difference,
    gap_closed,
    interval,
    level,
    reached,
)


@pytest.fixture
def three():
    """Three seeds: fgd gains 1, 2 and 3 points, pkd 0.9, 1.0 and 1.1; cwd loses what pkd gains."""
    plain = [30.0, 31.0, 35.0]
    arms = [arm("none", seed, ap) for seed, ap in enumerate(plain)]
    slow = {"seconds_per_step": 1.5, "peak_memory_mb": 1250.0, "parameters": {"losses": 65_000}}
    slow["gradient_share"] = 0.125
    arms += [arm("fgd", seed, ap + seed + 1, **slow) for seed, ap in enumerate(plain)]
    arms += [arm("pkd", seed, ap + 0.9 + seed / 10) for seed, ap in enumerate(plain)]
    arms += [arm("cwd", seed, ap - 0.9 - seed / 10) for seed, ap in enumerate(plain)]
    arms += [arm("none@fgd", seed, ap, iterations=450 + seed) for seed, ap in enumerate(plain)]
    teacher = {"bbox": {"AP": 40.0, "AP50": 60.0, "APl": math.nan}}
    return make(arms, ["none", "fgd", "pkd", "cwd", "none@fgd"], teacher=teacher)


DIFFERENCE = "difference to baseline [low, high]"


@pytest.mark.parametrize(
    "values, mean, half_width",
    [
        ([1, 2, 3], 2, 4.3027 / math.sqrt(3)),  # standard deviation 1, 2 degrees of freedom
        ([2, 4, 6, 8, 10], 6, 2.7764 * math.sqrt(2)),  # sqrt(10 / 5), 4 degrees of freedom
        ([3, 5], 4, 12.7062),  # sqrt(2 / 2), 1 degree of freedom
        ([7, 7, 7], 7, 0),
        ([5.0], 5, math.nan),
        ([], math.nan, math.nan),
    ],
)
def test_interval(values, mean, half_width):
    assert interval(values) == pytest.approx((mean, half_width), rel=1e-4, nan_ok=True)


def test_curves_say_how_far_and_how_fast():
    """By hand: plain ends at 30 and 32; fgd has these after 200 iterations in one seed, never in one."""
    plain = [arm("none", 0, 30.0), arm("none", 1, 32.0)]
    first = arm("fgd", 0, 33.0, curve={"bbox": [(100, 29.0), (200, 30.0), (300, 33.0)]})
    second = arm("fgd", 1, 31.5, curve={"bbox": [(100, 20.0), (300, 31.5)]})
    record = make([*plain, first, second], teacher={"bbox": {"AP": 41.0}})
    assert curve_of(record, "fgd", "bbox") == [(100, 24.5), (300, 32.25)]
    assert gap_closed(record, "fgd", "bbox") == pytest.approx(1.25 / 10)
    assert reached(record, "fgd", "bbox") == [200, None]
    assert level(record, "fgd") == {}
    weak = {**record, "teacher": {"bbox": {"AP": 32.0}}}
    assert level(weak, "fgd") == {0: 300}
    assert "`fgd` is level with the teacher after 300 iterations (1 of 2 seeds)" in report(weak)
    row = next(line for line in report(record).splitlines() if line.startswith("| fgd"))
    assert "12%" in row and "200 (1 of 2 never)" in row
    assert math.isnan(gap_closed({**record, "teacher": {"bbox": {"AP": 30.0}}}, "fgd", "bbox"))


@pytest.mark.parametrize(
    "mean, half_width, seeds, verdict",
    [
        (1.0, 0.9, 3, "better"),
        (-1.0, 0.9, 3, "worse"),
        (1.0, 1.0, 3, "no difference shown"),
        (-1.0, 1.1, 2, "no difference shown"),
        (0.0, 0.0, 2, "no difference shown"),
        (5.0, math.nan, 1, "one seed: no interval"),
        (math.nan, math.nan, 0, "no common seed"),
    ],
)
def test_verdict(mean, half_width, seeds, verdict):
    assert Difference(mean, half_width, seeds).verdict == verdict


def test_differences_are_paired(three):
    gain = difference(three, "fgd", "none", "bbox")
    assert (gain.mean, gain.half_width, gain.count) == pytest.approx((2, 2.4841, 3), rel=1e-4)
    # The seeds differ by far more than the method gains: unpaired, nothing would be shown.
    gain = difference(three, "pkd", "none", "bbox")
    assert (gain.mean, gain.low, gain.high) == pytest.approx((1, 0.75159, 1.24841), rel=1e-4)
    assert difference(three, "fgd", "pkd", "bbox", "AP50").mean == pytest.approx(1)


def test_differences_use_the_seeds_that_both_have():
    arms = [arm("none", 0, 30.0), arm("none", 1, 90.0), failed("none", 2), arm("none", 3, 20.0)]
    arms += [arm("fgd", 3, 24.0), arm("fgd", 0, 32.0), arm("fgd", 1, math.nan), arm("fgd", 2, 1.0)]
    gain = difference(make(arms), "fgd", "none", "bbox")
    assert (gain.mean, gain.half_width, gain.count) == pytest.approx((3, 12.7062, 2), rel=1e-4)


def test_report_of_ap(three):
    text = report(three)
    rows = table(text, "Box AP")
    assert list(rows) == ["none", "fgd", "pkd", "cwd", "none@fgd", "teacher"]
    assert rows["fgd"] == {
        "AP": "34.00 ± 8.96",  # 31, 33, 38: 4.3027 * sqrt(13 / 3)
        "AP50": "54.00",
        "AP75": "36.00",
        "APs": "5.00",
        "APm": "34.00",
        "APl": "-",
        DIFFERENCE: "+2.00 [-0.48, +4.48]",
        "verdict": "no difference shown",
        "gap closed": "25%",  # 2 of the 8 between 32 and 40
        "iterations to the baseline's AP": "-",
        "seeds": "3 of 3",
        "common seeds": "3",
    }
    assert [rows[name]["verdict"] for name in ("none", "pkd", "cwd")] == [
        "baseline",
        "better",
        "worse",
    ]
    assert rows["cwd"][DIFFERENCE] == "-1.00 [-1.25, -0.75]"
    assert rows["teacher"]["AP"] == "40.00" and rows["teacher"]["APl"] == "-"
    assert "Mask AP" not in text and "Warning" not in text and "Arms to check" not in text


def test_report_of_costs(three):
    text = report(three)
    rows = table(text, "Cost")
    assert rows["fgd"] == {
        "iterations": "300",
        "s / step": "1.500",
        "its seeds": "1.500 to 1.500",
        "time ratio": "1.50",
        "training minutes": "7.5",
        "peak memory MB": "1,250",
        "memory ratio": "1.25",
        "parameters of the losses": "65,000",
        "gradient share": "12.5%",
    }
    assert rows["none"]["gradient share"] == "-"
    assert rows["none"]["time ratio"] == "1.00"
    assert rows["none@fgd"]["iterations"] == "450 to 452"
    assert (
        "`none@fgd` is the plain student trained for the time of `fgd`: 450 to 452 iterations."
        in text
    )


def test_report_says_what_the_intervals_mean(three):
    text = report(three)
    assert "Seeds: 0, 1, 2." in text
    assert "do not cover the choice of the teacher or of the validation images" in text
    assert "Methods compared with an interval: 4." in text and "4 x 0.05 = 0.20" in text
    assert "- config: `configs/custom_coco.py train.max_iter=300`" in text
    assert "- command: `tools/compare_methods.py --seeds 3`" in text
    assert "- hardware: A CPU, 1 thread" in text
    assert "- versions: numpy 2.4.6, torch 2.14.1" in text


def test_report_of_masks_and_boxes():
    arms = [arm("none", 0, 30.0), arm("fgd", 0, 31.0)]
    arms[1]["results"]["segm"] = {"AP": 28.0}
    text = report(make(arms))
    assert table(text, "Box AP")["fgd"]["AP"] == "31.00"
    assert table(text, "Mask AP")["fgd"]["AP"] == "28.00"
    assert table(text, "Mask AP")["none"]["AP"] == "-"


def test_report_of_one_seed():
    text = report(make([arm("none", 7, 30.0), arm("fgd", 7, 31.5)]))
    assert "by chance" not in text  # no interval could exclude zero
    rows = table(text, "Box AP")
    assert rows["fgd"]["AP"] == "31.50" and rows["fgd"][DIFFERENCE] == "+1.50"
    assert rows["fgd"]["verdict"] == "one seed: no interval"


def test_report_names_a_detector_that_finds_nothing():
    collapsed = {**arm("fgd", 0, 0.0), "collapsed": ["bbox"]}
    text = report(make([arm("none", 0, 30.0), collapsed], ["none", "fgd"]))
    assert "- `fgd` seed 0: finds nothing; its box AP counts as 0 in the means." in text
    assert table(text, "Box AP")["fgd"]["AP"] == "0.00"


def test_report_says_what_the_time_would_have_brought():
    scores = {"none": (30, 31), "fgd": (33, 34), "none@fgd": (32, 32.5)}
    arms = [arm(m, seed, x) for m, both in scores.items() for seed, x in enumerate(both)]
    text = report(make(arms, list(scores)))
    # fgd - none@fgd: 1 and 1.5, mean 1.25; t(1) = 12.706, s / sqrt(2) = 0.25
    assert (
        "In that time `fgd` has +1.25 [-1.93, +4.43] box AP against it: no difference shown."
        in text
    )


def test_report_lists_arms_without_a_result():
    arms = [arm("none", 0, 30.0), arm("none", 1, 31.0), arm("fgd", 0, math.nan), failed("fgd", 1)]
    arms += [failed("pkd", 0, "missing", None), failed("pkd", 1)]
    text = report(make(arms, ["none", "fgd", "pkd"]))
    assert "- `fgd` seed 1: failed: `term s8 is 'nan'`\n" in text
    assert "- `pkd` seed 0: missing\n" in text
    assert "- `fgd` seed 0: has no box AP; it is in none of the means." in text
    rows = table(text, "Box AP")
    assert rows["fgd"]["AP"] == "-" and rows["fgd"]["seeds"] == "0 of 2"
    assert rows["pkd"]["verdict"] == "no common seed" and rows["pkd"][DIFFERENCE] == "-"
    assert table(text, "Cost")["pkd"]["training minutes"] == "-"


@pytest.mark.parametrize("baseline", ["absent", None])
def test_no_baseline(baseline):
    record = make([arm("none", 0, 30.0), arm("fgd", 0, 31.0)], baseline=baseline)
    text = report(record)
    assert {row["verdict"] for row in table(text, "Box AP").values()} == {"no common seed"}
    assert {row["time ratio"] for row in table(text, "Cost").values()} == {"-"}
    (axes,) = plot_ap(record).axes
    assert axes.get_legend() is None and len(errorbars(axes)) == 2


def test_what_methods_add_to_a_student_that_only_starts_from_the_teacher():
    aps = {"none": (30.0, 31.0), "inherit": (33.0, 35.0), "pkd": (34.0, 36.0)}
    arms = [arm(method, seed, ap) for method, of in aps.items() for seed, ap in enumerate(of)]
    for each in arms[2:]:
        each.update(initial_weights=f"other{each['seed']}", inherited=26)
    text = report(make(arms, methods=[*aps]))
    assert "- `inherit` starts from the teacher, and learns without it." in text
    assert "\n  `pkd` has +1.00 [+1.00, +1.00] box AP against it: " in text
    assert "`none` has" not in text and "**Warning:**" not in text


def test_report_warns_of_arms_that_do_not_compare(three):
    three["arms"][4]["initial_weights"] = "other"
    three["arms"][7]["hardware"] = "B"
    three["arms"][8]["versions"] = {"torch": "2.15.0"}
    warnings = [line for line in report(three).split("\n") if line.startswith("**Warning:**")]
    weights, hardware, versions = warnings
    assert "initial weights of seed 1 differ" in weights
    assert "`fgd` seed 1: other; the rest: digest1." in weights
    assert "hardware differ" in hardware and "`pkd` seed 1: B;" in hardware
    assert "versions differ" in versions and "`pkd` seed 2: torch 2.15.0;" in versions
    assert "not comparable" in hardware and "not comparable" in versions


def errorbars(axes):
    """(x, y, low, high) of each; the ends are along the bar, NaN without an interval."""
    found = []
    for mark, _, (bar,) in axes.containers:
        (x,), (y,) = mark.get_data()
        segment = bar.get_segments()[0]
        start, stop = segment if len(segment) else [(math.nan, math.nan)] * 2
        along = 0 if start[1] == stop[1] else 1
        found.append((x, y, start[along], stop[along]))
    return found


def test_plot_ap(three):
    three["arms"][14] = failed("none@fgd", 2)
    figure = plot_ap(three)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == three["methods"]
    bars = errorbars(axes)
    assert [bar[0] for bar in bars] == pytest.approx([32, 34, 33, 31, 30.5])
    assert [bar[1] for bar in bars] == [0, 1, 2, 3, 4]
    assert bars[4][2:] == pytest.approx((30.5 - 6.3531, 30.5 + 6.3531), rel=1e-4)
    seeds = [line for line in axes.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in seeds] == [3, 3, 3, 3, 2]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["baseline (none): 32.00", "teacher: 40.00"]
    low, high = axes.get_xlim()
    assert low < 40 < high


def test_a_far_teacher_does_not_squeeze_the_methods(three):
    three["teacher"]["bbox"]["AP"] = 95.0
    (axes,) = plot_ap(three).axes
    assert axes.get_xlim()[1] < 60
    assert axes.get_legend().get_texts()[1].get_text() == "teacher: 95.00, outside the axis"


def test_plot_cost(three):
    del three["arms"][6]["seconds_per_step"]
    (axes,) = plot_cost(three).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == three["methods"]
    minutes, means, low, _ = zip(*errorbars(axes))
    assert minutes == pytest.approx((5, 7.5, 5, 5, 451 / 60))
    assert means == pytest.approx((32, 34, 33, 31, 32))
    assert low[1] == pytest.approx(34 - 8.9567, rel=1e-4)


def test_every_method_has_its_own_mark():
    methods = [f"method_{i}" for i in range(20)]
    arms = [arm(name, 0, 30 + i / 40) for i, name in enumerate(methods)]
    (axes,) = plot_cost(make(arms, methods)).axes
    marks = [container.lines[0] for container in axes.containers]
    assert len({(mark.get_color(), mark.get_marker()) for mark in marks}) == 20


def test_plot_sizes(three):
    (axes,) = plot_sizes(three).axes
    bars = [c for c in axes.containers if c.get_label() in ("APs", "APm", "APl")]
    widths = {c.get_label(): [patch.get_width() for patch in c.patches] for c in bars}
    assert widths["APs"] == [5] * 5
    assert widths["APm"] == pytest.approx([32, 34, 33, 31, 32])
    assert len(widths["APl"]) == 5 and all(math.isnan(width) for width in widths["APl"])
    assert axes.get_xlim()[0] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "arms",
    [
        [],
        [failed("none", 0), failed("fgd", 0, "missing")],
        [arm("none", 0, 30.0), failed("fgd", 0)],
        [arm("none", 0, math.nan), arm("fgd", 0, 31.0)],
        [arm("none", 0, 30.0, results=None), arm("fgd", 0, 31.0, "segm")],
    ],
    ids=["no arms", "none finished", "one finished", "not a number", "no results"],
)
def test_gaps_do_not_stop_the_report(arms, tmp_path):
    write(make(arms), tmp_path / "new" / "folder")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["ap.png", "cost.png", "curves.png", "report.md", "results.json", "sizes.png"]


def test_plots_name_the_methods_without_a_result():
    (axes,) = plot_ap(make([arm("none", 0, 30.0), failed("fgd", 0)])).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "fgd (no result)"]


def test_written_files(three, tmp_path):
    three["arms"][0]["seconds_per_step"] = math.inf
    write(three, str(tmp_path))

    def refuse(constant):
        raise ValueError(constant)

    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert read["arms"][0]["seconds_per_step"] is None
    assert read["arms"][0]["results"]["bbox"]["APl"] is None
    assert math.isnan(three["arms"][0]["results"]["bbox"]["APl"])
    assert read["arms"][4]["results"]["bbox"]["AP"] == 33.0
    # What was written says the same as what was measured.
    assert report(read) == report(three)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(report(three))
    for name in ("ap.png", "cost.png", "sizes.png"):
        with Image.open(tmp_path / name) as image:
            assert f"({name})" in text and image.format == "PNG" and image.width > 700


def test_a_failed_write_keeps_the_old_file(three, tmp_path):
    (tmp_path / "results.json").write_text("old")
    three["extra"] = object()  # no JSON
    with pytest.raises(TypeError):
        write(three, tmp_path)
    assert (tmp_path / "results.json").read_text() == "old"
