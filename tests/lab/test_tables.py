import math

from records import rows

from sharedkd.lab.tables import results_table

METRICS = {"AP": 31.234, "AP50": 50.0, "AP75": 33.5, "APs": math.nan, "APm": 12.25, "APl": 40.0}


def test_values_are_in_their_columns():
    row = {"name": "teacher", "bbox": METRICS, "parameters": 41234567, "seconds_per_image": 0.07123}
    assert rows(results_table([row])) == [
        {
            "model": "teacher",
            "box AP": "31.23",
            "box AP50": "50.00",
            "box AP75": "33.50",
            "box APs": "-",
            "box APm": "12.25",
            "box APl": "40.00",
            "parameters": "41,234,567",
            "s / image": "0.0712",
        }
    ]


def test_mask_columns_appear_once_a_row_has_them():
    given = [
        {"name": "teacher", "bbox": METRICS, "segm": {**METRICS, "AP": 28.0}},
        {"name": "plain student", "bbox": METRICS},
        {"name": "Shared-KD student", "bbox": METRICS},
    ]
    table = rows(results_table(given))
    assert [row["model"] for row in table] == [row["name"] for row in given]
    assert [row["mask AP"] for row in table] == ["28.00", "-", "-"]
    assert {row["parameters"] for row in table} == {"-"}
