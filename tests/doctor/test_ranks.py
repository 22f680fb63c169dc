"""What the doctor says of several ranks, from numbers that have been measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import ConfigError, Diagnosis
from pipeline.doctor.finding import ClockSkew, Finding, Level, PairTimes, size
from pipeline.doctor.ranks import clock_finding, pair_findings, version_findings

MIB = 1 << 20
SAME = {"localpipe": "0.1.0+aa", "torch": "2.14.1", "NCCL": "2.30.7", "Python": "3.12.1"}


def pair(upper: int, latency_ms: float = 0.3, down: float = 2e9, up: float = 2e9, crosses: bool = False) -> PairTimes:
    return PairTimes(upper, crosses, latency_ms / 1e3, 16 * MIB, 16 * MIB, down, up)


def slow(*pairs: PairTimes) -> list[str]:
    first, *others = pair_findings(pairs)
    assert (first.subject, first.level) == ("neighbours", Level.OK)
    assert all((finding.subject, finding.level) == ("slow pair", Level.WARNING) for finding in others)
    return [str(finding) for finding in others]


def test_equal_pairs_are_one_line() -> None:
    assert slow(pair(0), pair(1), pair(2)) == []
    (line,) = pair_findings([pair(0), pair(1)])
    assert line.text == (
        "2 pairs, median: latency 0.30 ms, 2.00 GB/s down (messages of 16.0 MiB), 2.00 GB/s up (messages of 16.0 MiB)"
    )


def test_a_pair_that_is_twice_as_slow_as_the_others_is_named_with_what_is_slow() -> None:
    (line,) = slow(pair(0), pair(1), pair(2, up=0.9e9))
    assert line.startswith("slow pair: rank 2 <-> rank 3: 0.90 GB/s up, others 2.00 GB/s; ")
    (line,) = slow(pair(0), pair(1, latency_ms=4))
    assert line.startswith("slow pair: rank 1 <-> rank 2: latency 4.00 ms, others 0.30 ms; ")


def test_small_differences_are_chance() -> None:
    assert slow(pair(0, latency_ms=0.1), pair(1, latency_ms=0.5)) == []
    assert slow(pair(0, down=2e9), pair(1, down=1.1e9)) == []


def test_a_rank_whose_pairs_are_both_slow_is_named() -> None:
    lines = slow(pair(0), pair(1, latency_ms=9), pair(2, latency_ms=9), pair(3), pair(4), pair(5))
    assert len(lines) == 2 and all("both pairs of rank 2 are slow" in line for line in lines)


def test_a_pair_on_two_machines_is_compared_with_others_that_are() -> None:
    assert slow(pair(0, down=100e9, up=100e9), pair(1, crosses=True), pair(2, down=100e9, up=100e9)) == []
    lines = slow(pair(0, crosses=True), pair(1), pair(2, crosses=True, down=0.5e9))
    assert [line[:48] for line in lines] == ["slow pair: rank 2 <-> rank 3 (on two machines): "]


def test_one_pair_alone_is_held_against_a_gigabit() -> None:
    assert slow(pair(0, crosses=True, down=0.2e9)) == []
    (line,) = slow(pair(0, crosses=True, down=0.1e9))
    assert "0.10 GB/s down, less than 1 Gbit/s" in line and "GLOO_SOCKET_IFNAME" in line


def test_small_messages_say_nothing_about_a_link() -> None:
    few = [PairTimes(upper, False, 3e-4, 16 * MIB, 192, 2e9, rate) for upper, rate in enumerate((1e5, 1e6))]
    assert slow(*few) == [] and " up " not in pair_findings(few)[0].text


@pytest.mark.parametrize(("name", "level"), [("torch", Level.ERROR), ("Python", Level.WARNING)])
def test_versions_that_differ_are_named_with_who_has_which(name: str, level: Level) -> None:
    (found,) = version_findings([SAME, {**SAME, name: "9"}, SAME])
    assert found.level is level and found.text == f"{name}: ranks 0, 2 have {SAME[name]}; rank 1 has 9"
    assert version_findings([SAME, SAME])[0].level is Level.OK


def test_the_clock_that_is_furthest_off_is_named_with_its_uncertainty() -> None:
    found = clock_finding([ClockSkew(1, 0.002, 0.0001), ClockSkew(2, -2.5, 0.0001)])
    assert found.level is Level.WARNING and "NTP" in found.fix
    assert found.text == "rank 2 is 2500.00 ms behind rank 0 (+- 0.10 ms), no other more"
    assert clock_finding([ClockSkew(1, 1.5, 0.9)]).level is Level.OK  # it may be less


def test_an_error_makes_unfit_and_the_verdict_names_it(tmp_path: Path) -> None:
    fine = Finding("disk", Level.WARNING, "full")
    low = Finding("limits", Level.ERROR, "open files 64", "ulimit -n 4096")
    diagnosis = Diagnosis(1, (fine,))
    assert diagnosis.fit and diagnosis.verdict == "fit to train (1 warning)"
    assert Diagnosis(1, (fine, fine)).verdict == "fit to train (2 warnings)"
    diagnosis = Diagnosis(2, (fine, low), (pair(0),), (ClockSkew(1, 0.1, 0.01),))
    assert not diagnosis.fit
    assert diagnosis.verdict == "not fit to train (1 warning, 1 error): limits: open files 64; ulimit -n 4096"
    diagnosis.write_json(tmp_path / "found.json")
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["fit"] is False and document["findings"][1]["level"] == "error"
    assert document["pairs"][0]["latency_s"] == 0.0003 and document["clocks"][0]["rank"] == 1
    with pytest.raises(ConfigError, match="cannot be written"):
        diagnosis.write_json(tmp_path)


def test_sizes_are_read_easily() -> None:
    assert [size(n) for n in (512, 1536, 3 << 30, 5 << 40)] == ["512 B", "1.5 KiB", "3.0 GiB", "5.0 TiB"]
