"""docs/performance.md: numbers land in the right cells."""

import json

import pytest

from sharedkd.lab.performance import (
    BEGIN,
    END,
    aims,
    document,
    growth,
    keep,
    loss_operations,
    operations,
    rivals,
    summary,
    variants,
)


def result(**changes):
    ratio = lambda x: {"median": x, "low": x - 0.1, "high": x + 0.1}  # noqa: E731
    seconds = dict(distill=3.0, fgd=6.0, student=3.0, teacher_eager=1.0)
    seconds.update({"losses/distill": 0.25, "losses/fgd": 0.5})
    return {
        "command": ["tools/benchmark.py", "--rounds", "3"],
        "device": "cpu",
        "images": [[320, 416]] * 2,
        "precision": "float32",
        "teacher_precision": "bfloat16",
        "teacher_deviation": {"4": 0.002, "8": 0.004},
        "hardware": "some CPU (AVX2), 2 thread(s)",
        "overhead": 0.8,
        "versions": {"torch": "2"},
        "ratios": {
            "overhead": ratio(0.8),
            "floor": ratio(0.7),
            "plain": ratio(0.9),
            "over_plain": ratio(1.2),
            "teacher": ratio(0.6),
            "losses": ratio(0.3),
            "copies": ratio(0.2),
            "distill/fgd": ratio(0.5),
        },
        "seconds": {name: {"median": x} for name, x in seconds.items()},
        "parts": {
            **dict(teacher=1, student_forward=1, losses=1, backward=3, optimizer=1),
            **dict(data=1, rest=0, whole=8),
        },
        "operations": {"convolutions": 0.75, "all else": 0.25},
        "loss_operations": {"calls": 1234, "shares": {"aten::sum": 0.5, "aten::mul": 0.125}},
        "memory": {
            "teacher_weights_mb": 200.4,
            "teacher_maps_mb": 20.0,
            "gradients_mb": 21.6,
            "over_student_mb": {"distill": 230.0, "fgd": 1300.0},
            "peak_mb": {"student": 1800.0, "student_sharedkd": 1730.0, "distill": 1960.0},
            "starts_mb": {
                "student_sharedkd": [1720.0, 1730.0, 1740.0],
                "distill": [1960.0, 1930.0, 1970.0],
            },
        },
        **changes,
    }


def cells(table, name):
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_summary():
    assert cells(summary({"pair": result()}), "pair") == [
        "pair",
        "0.800 (0.700 to 0.900)",
        "0.700 (0.600 to 0.800)",
        "0.900 (0.800 to 1.000)",
        "1.200 (1.100 to 1.300)",
        "0.600 (0.500 to 0.700)",
        "0.300 (0.200 to 0.400)",
        "0.200 (0.100 to 0.300)",
        "230 ± 30",
        "160",
        "200, 20, 22",
    ]


def test_aims():
    other = result(overhead=0.96, teacher_precision="float32")
    other["memory"]["over_student_mb"] = {"distill": 250.0}
    other["ratios"] = {**other["ratios"], "losses": {"median": 0.0204}}
    del other["ratios"]["distill/fgd"]
    table = aims({"pair": result(overhead=0.804), "other": other})
    assert cells(table, "overhead, teacher in float32 on a CPU")[1:] == [
        *("0.95", "0.96", "other (0.96)"),
    ]
    assert cells(table, "overhead, teacher in bfloat16 on a CPU")[1:] == ["0.80", "0.80", "-"]
    assert "on a GPU" not in table and "SemCKD" not in table
    assert cells(table, "losses / step")[1:] == ["0.020", "0.020 to 0.300", "pair (0.300)"]
    beyond = cells(table, "MB beyond weights, maps and gradients")
    assert beyond[1:] == ["0", "-12 to 8", "other (8)"]
    assert cells(table, "time of FGD")[1:] == ["1.00", "0.50", "-"]


def test_loss_operations():
    assert cells(loss_operations({"pair": result()}), "pair")[1:] == [
        *("250", "1,234", "sum 50 %, mul 12 %"),
    ]


def test_operations():
    table = operations({"pair": result()})
    assert cells(table, "of a distillation step")[1:] == ["convolutions", "all else"]
    assert cells(table, "pair")[1:] == ["75.0 %", "25.0 %"]


def test_rivals():
    table = rivals(result())
    assert cells(table, "Shared-KD") == ["Shared-KD", "3.000", "-", "0.250", "230"]
    assert cells(table, "fgd") == ["fgd", "6.000", "0.500 (0.400 to 0.600)", "0.500", "1,300"]


def test_variants():
    found = result()
    found["seconds"]["model.teacher.fold=False"] = {"median": 3.5}
    found["ratios"]["model.teacher.fold=False"] = found["ratios"]["over_plain"]
    found["memory"]["over_student_mb"]["model.teacher.fold=False"] = 310.0
    table = variants(found)
    assert cells(table, "the step as it is")[1:] == ["3.000", "-", "230"]
    assert cells(table, "`model.teacher.fold=False`")[1:] == [
        "3.500",
        "1.200 (1.100 to 1.300)",
        "310",
    ]
    assert "teacher.fold" not in rivals(found) and "fgd" not in table


def test_growth():
    seconds = {"student_sharedkd": 2.0, "distill": 3.0, "losses/distill": 0.25}
    case = dict(batch_size=4, image_size=320, levels=5, seconds=seconds)
    case.update(overhead=0.81, over_student_mb=123.4)
    table = growth(result(growth=[case]))
    assert cells(table, "4") == [
        *("4", "320", "5", "0.81", "2.000", "1.000", "0.250", "1.500", "123"),
    ]


def test_document_is_filled_between_its_markers_and_can_be_filled_again(tmp_path):
    measured, records = tmp_path / "measured", tmp_path / "records"
    measured.mkdir()
    (measured / "pair.json").write_text(json.dumps(result()))
    keep(measured, records)
    path = tmp_path / "performance.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end\n")
    document(records, path)
    text = path.read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\n\nThe end\n") and "old" not in text
    assert "### some CPU (AVX2), 2 thread(s)\n" in text
    assert "teacher in bfloat16 (its maps of a random image change by 0.4 % at most)" in text
    assert "`tools/benchmark.py --rounds 3`" in text
    plot = "images/benchmark_some_cpu_avx2_2_thread_s.png"
    assert f"]({plot})" in text and (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    document(records, path)
    assert path.read_text() == text


def test_machines_keep_their_records_side_by_side(tmp_path):
    measured, records, path = tmp_path / "measured", tmp_path / "records", tmp_path / "page.md"
    measured.mkdir()
    path.write_text(f"{BEGIN}{END}")
    for hardware, overhead in (("CPU A", 0.8), ("CPU B", 0.6), ("CPU A", 0.7)):
        found = result(hardware=hardware)
        found["ratios"]["overhead"] = {"median": overhead, "low": 0.5, "high": 1.0}
        (measured / "pair.json").write_text(json.dumps(found))
        keep(measured, records)
    document(records, path)
    first, second = path.read_text().split("### CPU ")[1:]
    assert cells(first, "pair")[1] == "0.700 (0.500 to 1.000)"  # the later one
    assert cells(second, "pair")[1] == "0.600 (0.500 to 1.000)"


def test_nothing_to_write(tmp_path):
    path, records = tmp_path / "performance.md", tmp_path / "records"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="no .*json in"):
        keep(tmp_path, records)
    path.write_text(f"{BEGIN}{END}")
    with pytest.raises(ValueError, match="no .*json in"):
        document(records, path)
    path.write_text("no markers")
    (tmp_path / "pair.json").write_text(json.dumps(result()))
    keep(tmp_path, records)
    with pytest.raises(ValueError, match="no <!-- benchmark"):
        document(records, path)
    assert path.read_text() == "no markers"
