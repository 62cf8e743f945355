"""`bench bulk` measures what it says, on few and tiny pictures."""

from bench.report.tables import bulk as tables
from bench.suites import bulk


def test_every_way_has_a_rate_and_the_labels_are_equal():
    result = bulk.run(sides=(32,), pictures=4, repeats=1, threads=1, progress=lambda text: None)
    ways = [row["way"] for row in result["rows"]]
    assert len(ways) == len(set(ways)) == 11 and ways[0] == "plain loop"
    assert all(row["rate"] > 0 for row in result["rows"]) and tables.sound(result)
    text = tables.tables(result)["rates"]
    assert text.count("\n") == 12 and "segvit predict, files" in text and "×)" in text
    other = {**result, "rows": [{**row, "equal": 0.9} for row in result["rows"]]}
    assert not tables.sound(other)
