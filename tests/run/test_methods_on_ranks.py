"""Methods that are a file of their own: two ranks train the weights of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers_spawn import run_ranks
from tiny import Batches, network
from tiny_features import configured, feature_batches, transformer
from torch import nn

from pipeline import LoaderData, train

CASES: dict[str, tuple[Callable[[], nn.Sequential], Callable[[], Any], dict[str, dict[str, Any]]]] = {
    "deinforeg": (network, Batches, {"method": {"feature_dim": 8}}),
    "deinforeg, patches": (network, Batches, {"method": {"feature_dim": 8}, "patches": {"grid": 2}}),
    "lopt": (transformer, feature_batches, {}),
    "lopt, parts, async": (transformer, feature_batches, {"patches": {"grid": 3}, "schedule": {"kind": "async"}}),
}


def trained(rank: int, folder: str) -> dict[str, str]:
    """The digest of the weights of every case."""
    found = {}
    for case, (build, batches, sections) in CASES.items():
        method = {"name": case.split(",")[0], **sections.get("method", {})}
        rest = {name: section for name, section in sections.items() if name != "method"}
        config = configured(2, method, train={"epochs": 1}, checkpoint={"every_epochs": 0}, **rest)
        data = LoaderData(batches(), batches())
        summary = train(config, network=build(), data=data, run_dir=Path(folder) / case, quiet=True)
        found[case] = summary["weights_sha256"]
    return found


def test_the_weights_are_those_of_one_process_on_two_ranks(tmp_path: Path) -> None:
    alone = trained(0, str(tmp_path / "1"))
    assert len(set(alone.values())) == len(CASES)
    results = run_ranks(trained, 2, str(tmp_path / "2"), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value == alone
