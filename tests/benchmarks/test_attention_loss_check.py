"""The comparison of measured ratios with the committed ones, on made-up and on the committed records."""

from dataclasses import replace

import pytest

from benchmarks.attention_loss import __main__ as driver
from benchmarks.attention_loss import report
from benchmarks.attention_loss.check import check, compare
from benchmarks.attention_loss.measure import ATTENTION, open_records
from benchmarks.attention_loss.methods import GATHERED, LOSS_OURS, LOSS_PLAIN, OURS, PUBLISHED, RECOMPUTED

COMMITTED = list(open_records(report.HERE / report.CSV).records.values())
POINT = "4,096 tokens, 8 rows: "


def quick(**factors):
    """The committed records that `make bench-quick` measures, on a machine half as fast; `time` … multiply ours."""
    points = {(4096, 0, ATTENTION), *((4096, 8, method) for method in (OURS, GATHERED, RECOMPUTED, PUBLISHED))}
    points |= {(16384, 8, LOSS_OURS), (16384, 8, LOSS_PLAIN)}
    found = [record for record in COMMITTED if (record.length, record.rows, record.method) in points]
    assert len(found) == 7
    slow = [replace(record, seconds=2 * record.seconds) for record in found]
    change = {name: factors.get(key, 1) for name, key in (("seconds", "time"), ("peak_bytes", "peak"))}
    return [
        replace(record, **{name: getattr(record, name) * factor for name, factor in change.items()})
        if record.method == factors.get("method", OURS)
        else record
        for record in slow
    ]


def test_every_ratio_is_compared():
    names = {comparison.name for comparison in compare(quick(), COMMITTED)}
    assert names == {
        *(
            POINT + f"{what}, of {method}"
            for method in (PUBLISHED, RECOMPUTED, GATHERED)
            for what in ("time", "peak", "saved by autograd")
        ),
        POINT + "time, of the flash attention of six layers",
        "16,384 tokens, 8 rows: mask loss alone: peak, of a plain one",
        "16,384 tokens, 8 rows: mask loss alone: time, of a plain one",
    }


@pytest.mark.parametrize("factor", [0.5, 1, 1.19])
def test_better_equal_and_little_worse_pass(factor, capsys):
    assert check(quick(time=factor, peak=factor), COMMITTED) == 0
    assert "lost" not in capsys.readouterr().out.lower()


def test_a_quarter_worse_fails_and_names_the_ratio(capsys):
    assert check(quick(peak=1.25), COMMITTED) == 1
    table, _, lost = capsys.readouterr().out.partition("missing, or lost more than 20%:\n")
    assert [line.strip() for line in lost.splitlines()] == [
        POINT + "peak, of all text rows",
        POINT + "peak, of recomputed q and k",
        POINT + "peak, of gathered rows",
    ]
    (line,) = (line for line in table.splitlines() if POINT + "peak, of gathered rows" in line)
    assert line.split()[-4:] == ["0.0161", "0.0129", "+25.0%", "LOST"]


def test_the_mask_loss_counts_by_itself(capsys):
    assert check(quick(time=1.25, method=LOSS_OURS), COMMITTED) == 1
    assert capsys.readouterr().out.count("mask loss alone: time") == 2


def test_what_is_missing_fails(capsys):
    assert check([record for record in quick() if record.method != GATHERED], COMMITTED) == 1
    assert capsys.readouterr().out.count("missing  ") >= 3
    assert check([], COMMITTED) == 1
    assert check([replace(record, length=5000) for record in quick()], COMMITTED) == 1
    assert capsys.readouterr().out.count("nothing to compare") == 2


@pytest.mark.parametrize(("factor", "status"), [(1, 0), (1.25, 1)])
def test_command(factor, status, tmp_path, monkeypatch, capsys):
    open_records(tmp_path / "now.csv").put(*quick(time=factor))
    monkeypatch.setattr("sys.argv", ["attention_loss", "--check", str(tmp_path / "now.csv")])
    with pytest.raises(SystemExit) as ended:
        driver.main()
    assert ended.value.code == status and "ratio committed" in capsys.readouterr().out


def test_a_missing_file_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attention_loss", "--check", "nowhere.csv"])
    with pytest.raises(SystemExit):
        driver.main()
    assert "nowhere.csv: no such file" in capsys.readouterr().err
