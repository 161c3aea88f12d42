"""docs/performance.md: numbers land in the right cells."""

from records import cells

from sharedkd.lab.performance import page, pairs, rivals, schemes, table


def result(**changes):
    around = lambda x: {"median": x, "low": x - 0.1, "high": x + 0.1}  # noqa: E731
    seconds = {"distill": 3.0, "fgd": 6.0, "student_sharedkd": 2.0, "losses/distill": 0.25}
    ratios = {"overhead": 0.8, "added": 0.7, "losses": 0.3, "distill/fgd": 0.5}
    return {
        "command": ["tools/benchmark.py", "--rounds", "3"],
        "hardware": "some CPU (AVX2), 2 thread(s)",
        "versions": {"torch": "2", "sharedkd": "abc"},
        "images": [[320, 416]] * 2,
        "precision": "float32",
        "teacher_precision": "bfloat16",
        "ratios": {name: around(x) for name, x in ratios.items()},
        "seconds": {name: around(x) for name, x in {**seconds, "losses/fgd": 0.5}.items()},
        "memory_mb": {"student_sharedkd": 1730, "distill": 1960, "fgd": 2300},
        **changes,
    }


def row(text, name):
    return next(x for x in cells(text) if x[0] == name)


def test_a_row_for_each_pair():
    assert row(pairs({"r50_r18": result()}), "r50_r18") == [
        *("r50_r18", "0.800 (0.700 to 0.900)", "0.700 (0.600 to 0.800)"),
        *("0.300 (0.200 to 0.400)", "-", "1,730", "1,960"),
    ]


def test_a_row_for_each_method():
    found = rivals(result())
    assert row(found, "Shared-KD") == ["Shared-KD", "3.000", "-", "0.250", "1,960"]
    assert row(found, "fgd") == ["fgd", "6.000", "0.500 (0.400 to 0.600)", "0.500", "2,300"]


def test_a_row_for_each_scheme():
    found = schemes(
        result(
            seconds={"plain student": {"median": 0.8}, "two peers": {"median": 1.7}},
            ratios={"two peers": {"median": 2.1, "low": 2.0, "high": 2.2}},
            memory_mb={"plain student": 1000, "two peers": 1712},
        )
    )
    assert row(found, "plain student") == ["plain student", "1", "0.800", "1,000", "+0"]
    assert row(found, "two peers")[1:] == ["2.100 (2.000 to 2.200)", "1.700", "1,712", "+712"]
    assert "some CPU" in found and "tools/benchmark.py --rounds 3" in found


def test_the_console_has_arms_and_ratios():
    found = table(result())
    assert row(found, "distill") == ["distill", "3.000 (2.900 to 3.100)", "1,960"]
    assert row(found, "losses/distill")[2] == "-"
    assert "added: 0.700 (0.600 to 0.800)" in found


def test_the_page_has_the_tables_by_hardware():
    hardware = {"first": "CPU B", "second": "CPU A", "third": "CPU B"}
    text = page({name: result(hardware=x) for name, x in hardware.items()})
    a, b = text.split("**CPU ")[1:]
    assert "second" in a and "first" not in a and "first" in b and "third" in b
    assert "2 images of 320 x 416, step in float32, teacher in bfloat16; torch 2, sharedkd abc" in a
    assert "tools/benchmark.py --rounds 3  # second" in a
