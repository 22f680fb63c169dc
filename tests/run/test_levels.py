"""``hierarchy.levels = "auto"`` in whole runs: the weights of the form that was chosen, the same after a resume."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from tiny import Batches, network, tiny_config

from pipeline import LoaderData, train
from pipeline.plan import measured_placement
from pipeline.plan.simulate import ModuleCost

# Both levels together are cheaper, and what the cascade sends upstream leaves 3 s later.
COST = ModuleCost(forward_s=1.0, cascade_s=2.0, independent_s=4.0, relay_s=1.0, backward_s=2.0, together_s=5.0)
DEARER = dataclasses.replace(COST, together_s=7.0)
COSTS = {
    "nobody waits": [COST] * 5,
    "rank 0 waits": [dataclasses.replace(COST, forward_s=4.0)] * 5,  # for module 3 on rank 1
    "dearer": [DEARER] * 5,
    "dearer in module 3": [COST, COST, COST, DEARER, COST],
}
KINDS = ("exact", "async")


def run(folder: Path, name: str, levels: str, kind: str, costs: str = "", **settings: Any) -> str:
    """Train the tiny network in float64, two processes owning modules 0-2 and 3-4; the digest of its weights."""
    patch = pytest.MonkeyPatch()
    patch.setattr(measured_placement, "counted_costs", lambda *_: COSTS[costs])
    ranks = settings.pop("ranks")
    config = tiny_config(
        "infopro", "hpff", 2, 5,
        hierarchy={"levels": levels},
        schedule={"kind": kind},
        partition={"kind": "given", "stages": [3, 2]} if ranks == 2 else {},
        precision={"compute": "fp64"},
        train={"epochs": 1},
        checkpoint={"every_steps": 3},
    )  # fmt: skip
    data = LoaderData(Batches(), [next(iter(Batches()))])
    try:
        summary = train(config, network=network(), data=data, run_dir=folder / name, quiet=True, **settings)
    finally:
        patch.undo()
    return str(summary.get("weights_sha256", ""))


def run_all(rank: int, folder: str, ranks: int) -> dict[str, str]:
    """The digests of all runs, by name."""
    root, found = Path(folder), {}
    for kind in KINDS:
        for levels in ("separate", "together"):
            name = f"{levels} {kind}"
            found[name] = run(root, name, levels, kind, ranks=ranks)
        for costs in ("nobody waits", "rank 0 waits"):
            name = f"{costs} {kind}"
            found[name] = run(root, name, "auto", kind, costs, ranks=ranks)
        resume, name = str(saved(root / f"nobody waits {kind}")), f"resumed {kind}"
        found[name] = run(root, name, "auto", kind, "dearer", ranks=ranks, resume=resume)
    for costs in ("dearer", "dearer in module 3"):
        found[f"{costs} exact"] = run(root, f"{costs} exact", "auto", "exact", costs, ranks=ranks)
    return found


def saved(folder: Path) -> Path:
    """The checkpoint in the middle of a run."""
    return folder / "checkpoints" / "step-00000003"


Runs = tuple[dict[str, str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Runs]:
    """Digests and run directories, by number of processes."""
    folders = {ranks: tmp_path_factory.mktemp("levels") for ranks in (1, 2)}
    with ThreadPoolExecutor(2) as pool:
        jobs = {n: pool.submit(run_ranks, run_all, n, str(folder), n, timeout_s=150) for n, folder in folders.items()}
    found: dict[int, Runs] = {}
    for ranks, job in jobs.items():
        results = job.result()
        assert all(result.exit_code == 0 for result in results), [result.stderr for result in results]
        found[ranks] = results[0].value, folders[ranks]
    return found


def together(folder: Path) -> list[int]:
    return list(json.loads((folder / "plan.json").read_text())["levels_together"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_runs_the_form_that_was_chosen_bit_for_bit(runs: dict[int, Runs], kind: str) -> None:
    for digests, folder in runs.values():
        assert together(folder / f"nobody waits {kind}") == [1, 2, 3]
        assert digests[f"nobody waits {kind}"] == digests[f"together {kind}"]
        assert digests[f"separate {kind}"] != digests[f"together {kind}"]
        assert together(folder / "dearer exact") == []
        assert digests["dearer exact"] == digests["separate exact"]


def test_the_choice_is_one_of_the_placement(runs: dict[int, Runs]) -> None:
    for ranks, kind, expected in ((1, "exact", [1, 2, 3]), (2, "exact", [1, 2]), (2, "async", [1, 2, 3])):
        assert together(runs[ranks][1] / f"rank 0 waits {kind}") == expected
    assert runs[1][0]["rank 0 waits exact"] != runs[2][0]["rank 0 waits exact"]
    assert together(runs[1][1] / "dearer in module 3 exact") == [1, 2]  # the same choice as on the two ranks above
    assert runs[1][0]["dearer in module 3 exact"] == runs[2][0]["rank 0 waits exact"]
    for levels in ("separate", "together"):
        assert runs[1][0][f"{levels} exact"] == runs[2][0][f"{levels} exact"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_weights_are_those_of_separate_levels_but_for_rounding(
    runs: dict[int, Runs], ranks: int, kind: str
) -> None:
    _, folder = runs[ranks]
    for file in ("model.pt", "heads.pt"):
        expected = torch.load(folder / f"separate {kind}" / file)
        for costs in ("nobody waits", "rank 0 waits"):
            found = torch.load(folder / f"{costs} {kind}" / file)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=f"{costs} {file} {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_on_as_many_ranks_keeps_the_choice(runs: dict[int, Runs], kind: str) -> None:
    for digests, folder in runs.values():
        assert together(folder / f"resumed {kind}") == [1, 2, 3]
        assert digests[f"resumed {kind}"] == digests[f"together {kind}"]


def test_a_resume_on_other_ranks_chooses_anew(runs: dict[int, Runs], tmp_path: Path) -> None:
    resume = str(saved(runs[2][1] / "nobody waits exact"))
    run(tmp_path, "one", "auto", "exact", "dearer", ranks=1, resume=resume)
    assert together(tmp_path / "one") == []
