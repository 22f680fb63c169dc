"""A run cut by cost: rank 0 counts, all ranks train the same modules, and the cut is kept as names from then on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import run_ranks
from tiny import Batches, network, tiny_config

from pipeline import Config, ConfigError, LoaderData, evaluate, load_config, train
from pipeline.plan import cost_cut
from pipeline.store.resume import choose_start


def config(cuts: str | list[str] = "cost", **sections: dict[str, Any]) -> Config:
    return tiny_config("infopro", "hpff", 2, 3, model={"cuts": cuts}, **sections)


def run(settings: Config, folder: Path, seed: int = 7, **settings_of_train: Any) -> dict[str, Any]:
    data = LoaderData(Batches(), [next(iter(Batches()))])
    return train(settings, network=network(seed), data=data, run_dir=folder, **settings_of_train)


def stop_and_go_on(rank: int, folder: str) -> tuple[str, str, list[str]]:
    """Digests of a run that is not disturbed and of one that goes on with another network; what both have said."""
    whole, halves, said = Path(folder) / "whole", Path(folder) / "halves", []
    count = cost_cut.flops_by_kind
    cost_cut.flops_by_kind = lambda *given: said.append("counted") or count(*given)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        undisturbed = run(config(train={"epochs": 2}), whole)
        run(config(train={"epochs": 2, "max_steps": 7}), halves)
        first = list(said)
        resumed = run(config(train={"epochs": 2}), halves, seed=8)
    assert said == first  # what goes on is not counted
    return undisturbed["weights_sha256"], resumed["weights_sha256"], [*said, printed.getvalue()]


def test_all_ranks_train_what_rank_0_has_counted_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    results = run_ranks(stop_and_go_on, 2, str(tmp_path), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    (undisturbed, resumed, said), (_, _, others) = (result.value for result in results)
    assert undisturbed == resumed
    assert said[:4] == ["counted"] * 4 and "counted" not in others  # two networks in each of two runs
    assert said[4].count("cut by FLOPs: ") == 2
    for name in ("whole", "halves"):
        kept = load_config(file=tmp_path / name / "config.toml")
        assert isinstance(kept.model.cuts, tuple) and len(kept.model.cuts) == 2
    evaluated = evaluate(tmp_path / "halves", network=network(), data=LoaderData(Batches(), Batches()))
    assert evaluated.step == 10

    with pytest.raises(ConfigError, match=r"a change of .*model\.cuts \(\('b', 'c'\) there, 'even' now\)"):
        choose_start("auto", tmp_path / "whole", False, config("even"))


def test_a_run_that_was_cut_otherwise_goes_on_with_its_own_cuts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of the default job, when it was cut by number."""
    run(config("even", train={"max_steps": 2}), tmp_path)
    summary = run(config(train={"max_steps": 4}), tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert summary["steps"] == 4
    assert "model.cuts = 'even' of the checkpoint stays: 'cost' chooses only when a run begins" in printed
    one = dataclasses.replace(config(), model=dataclasses.replace(config().model, modules=1))
    with pytest.raises(ConfigError, match=r"cannot go on with a change of .*model\.modules \(3 there, 1 now\)"):
        choose_start("auto", tmp_path, False, one)
