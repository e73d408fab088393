"""Collapse and standstill, told with the remedy that fits; nothing where all is well."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridssl import health
from pretrain.alarms import FEWEST, alarms, thinned
from pretrain.best import Best
from pretrain.journal import Journal
from pretrain.loop import main

FINE = {"prototype_usage": 0.9, "rankme": 40.0, "target_entropy": 4.0, "marginal_entropy": 6.1, "max_entropy": 6.2}


def logged(count: int = 20, **late: float) -> list[dict[str, float]]:
    """A healthy first half, then `late`."""
    return [
        {"step": step, **{f"health/{k}": v for k, v in {**FINE, **(late if 2 * step > count else {})}.items()}}
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("late", "kind", "severe", "remedy"),
    [
        ({"prototype_usage": 0.02}, "usage", True, "optim.lr"),
        ({"marginal_entropy": 1.0}, "marginal", True, "sinkhorn"),
        ({"rankme": 15.0}, "rank", False, "objectives.spread.weight"),
        ({"rankme": 2.0}, "rank", True, "best checkpoint"),
        ({"target_entropy": 6.15}, "uniform", False, "teacher_temperature"),
    ],
)
def test_each_sign_has_its_alarm_and_remedy(late: dict, kind: str, severe: bool, remedy: str) -> None:
    (alarm,) = alarms(logged(**late))
    assert (alarm.kind, alarm.severe) == (kind, severe)
    assert remedy in str(alarm)


def test_a_healthy_run_and_a_young_one_raise_none() -> None:
    assert alarms(logged()) == []
    assert alarms(logged(FEWEST - 1, prototype_usage=0.0)) == []
    assert alarms([]) == []


def test_the_worst_comes_first() -> None:
    assert [a.kind for a in alarms(logged(target_entropy=6.19, rankme=1.0))] == ["rank", "uniform"]


def test_a_long_run_holds_few_lines_and_the_newest_all() -> None:
    lines: list = []
    for step in range(20_000):
        lines = thinned([*lines, {"step": step}], most=100)
    steps = [line["step"] for line in lines]
    assert len(steps) <= 100
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-20:] == list(range(19_980, 20_000))


def test_one_bad_line_is_no_alarm() -> None:
    lines = logged()
    lines[-1]["health/prototype_usage"] = 0.0
    assert alarms(lines) == []


def test_a_run_says_it_once_and_goes_on(tiny: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(health, "prototype_usage", lambda targets: targets.new_tensor(0.01))
    assert main([*tiny, f"out={tmp_path / 'run'}", "steps=8"]) == 0
    assert capsys.readouterr().err.count("alarm: Collapsed") == 1
    assert "Collapsed" in (tmp_path / "run" / "report.html").read_text()


def test_best_follows_the_probe_and_begins_where_the_log_ends() -> None:
    values = [(10, 0.3), (20, 0.5), (30, 0.5), (40, 0.4)]
    first = Best(2)
    assert [first.better(step, {"probe/linear": value}) for step, value in values] == [True, True, False, False]
    assert (first.step, first.enough) == (20, True)
    again = Best(2, [{"step": step, "probe/linear": value} for step, value in values[:3]] + [{"step": 31, "loss": 1.0}])
    assert (again.step, again.waited, again.enough) == (20, 1, False)
    assert not Best(0, [{"step": 1, "probe/linear": 0.1}] * 9).enough
    assert not first.better(50, {"keep/knn": 1.0})  # no probe of its own
    patient = Best(2, [{"step": step, "probe/linear": value} for step, value in values], since=30)
    assert (patient.step, patient.waited) == (20, 1)  # crops were small until step 30


def test_a_journal_keeps_what_the_disk_refused_and_drops_half_lines(tmp_path: Path, monkeypatch) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    assert journal.add({"step": 1}) is None
    with open(journal.path, "a") as file:
        file.write('{"step": 2, "lo')  # of a run that was killed
    assert [line["step"] for line in journal.cut(5)] == [1]
    (tmp_path / "a.jsonl").chmod(0o400)
    opened = open

    def half(path, mode="r", *more, **names):
        file = opened(path, mode, *more, **names)
        if "a" in mode:
            file.write('{"ste')
            file.close()
            raise OSError("No space left on device")
        return file

    monkeypatch.setattr("pretrain.journal.open", half, raising=False)
    assert "could not be written" in str(journal.add({"step": 2}))
    monkeypatch.undo()
    (tmp_path / "a.jsonl").chmod(0o600)
    assert journal.add({"step": 3}) is None
    assert [line["step"] for line in journal.lines()] == [1, 2, 3]
    assert [line["step"] for line in journal.cut(2)] == [1, 2]
