"""What a module costs: measured without a trace in the network, stored as a file, refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_blocks, tiny_config, tiny_plan, train_on

from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.local.task import Classification
from pipeline.models.backbones import Blocks
from pipeline.plan.assembly import Plan, build_modules, make_plan
from pipeline.plan.cost_profile import Profile
from pipeline.plan.profiling import profile_modules
from pipeline.plan.rank_memory import device_memory, rank_memory, refuse_too_large
from pipeline.plan.simulate import ModuleCost
from pipeline.stage.inlet import BatchInlet
from pipeline.stage.schedule import Kind
from pipeline.stage.stage import Stage

CPU = Numerics(torch.device("cpu"), torch.float32, False)


def profiled(plan: Plan, blocks: Blocks | None = None) -> Profile:
    return profile_modules(plan, blocks or tiny_blocks(), CPU, warmup=1, steps=1)


@pytest.mark.parametrize("method", ["dgl", "infopro", "predsim"])
@pytest.mark.parametrize("variant", ["hpff", "released"])
def test_every_action_of_every_module_has_a_time_and_no_other(method: str, variant: str) -> None:
    plan = tiny_plan(tiny_config(method, variant, span=3))
    profile = profiled(plan)
    for role, cost in zip(plan.modules, profile.modules, strict=True):
        there = {action.kind for action in plan.schedules[0] if action.module == role.index}
        for kind in set(Kind) - {Kind.SHARE, Kind.ADOPT}:  # a copy every n steps, not timed
            seconds = getattr(cost, f"{kind.name.lower()}_s")
            assert (seconds > 0) == (kind in there), (role.index, kind)


def test_sums_of_accumulated_gradients_are_measured_too() -> None:
    plan = tiny_plan(tiny_config("dgl", train={"accumulate": 2}))
    modules = build_modules(plan, 0, tiny_blocks(), CPU, fresh=True)
    stage = Stage(modules, plan.schedules[0], BatchInlet(), Edges())
    for step in range(3):  # an update, and the first batch of the next one
        train_on(stage, 0, step, tiny_batch())
    for module, cost in zip(modules, profiled(plan).modules, strict=True):
        parts = [*module.blocks.values(), *module.levels.values()]
        weights = [parameter for part in parts for parameter in part.parameters()]
        held = [*weights, *(b for part in parts for b in part.buffers()), *module.kept_tensors()]
        assert cost.state_bytes == sum(tensor.nbytes for tensor in (*held, *weights))  # and a gradient of each weight


def test_late_modules_can_be_measured_too() -> None:
    plan = tiny_plan(tiny_config(span=2, schedule={"kind": "async"}))
    assert all(cost.backward_s > 0 for cost in profiled(plan).modules)


def test_neither_the_network_nor_any_random_state_changes() -> None:
    blocks, plan = tiny_blocks(), tiny_plan(tiny_config("infopro", "hpff", span=2))
    before = {name: block.state_dict() for name, block in blocks.items()}
    before = {name: {k: v.clone() for k, v in state.items()} for name, state in before.items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    profiled(plan, blocks=blocks)
    assert torch.equal(torch.rand(4), expected)
    for name, block in blocks.items():
        assert all(torch.equal(value, before[name][key]) for key, value in block.state_dict().items())
        assert all(parameter.grad is None for parameter in block.parameters())


def test_memory_counts_weights_gradients_momentum_and_what_autograd_keeps() -> None:
    plan = tiny_plan(tiny_config(modules=6))
    cost = profiled(plan).modules[-1]  # pool, flatten, linear 6 -> 4
    assert cost.state_bytes == 3 * 4 * (6 * 4 + 4)
    assert cost.graph_bytes >= 4 * 8 * 6  # the pooled features of 8 images
    twice = profiled(tiny_plan(tiny_config(modules=6, data={"batch_size": 16})))
    for small, large in zip(profiled(plan).modules, twice.modules, strict=True):
        assert small.state_bytes == large.state_bytes
        assert 1.5 < large.graph_bytes / small.graph_bytes <= 2.0


def test_micro_batches_make_graphs_smaller_and_messages_add_up() -> None:
    whole = profiled(tiny_plan(tiny_config(span=2))).modules
    halves = profiled(tiny_plan(tiny_config(span=2, schedule={"micro_batches": 2}))).modules
    for one, other in zip(whole, halves, strict=True):
        assert other.graph_bytes < one.graph_bytes
        assert one.activation_bytes <= other.activation_bytes <= one.activation_bytes + 4 * 192  # headers, padding
        assert one.gradient_bytes <= other.gradient_bytes <= one.gradient_bytes + 4 * 192


def test_the_image_travels_only_as_far_as_somebody_reconstructs_it() -> None:
    plain, infopro = (profiled(tiny_plan(tiny_config(name))).modules for name in ("dgl", "infopro"))
    image = 8 * 3 * 8 * 8
    more = [b.activation_bytes - a.activation_bytes for a, b in zip(plain, infopro, strict=True)]
    assert more == [image, image, image, 0, 0]


def test_a_rank_needs_more_with_more_modules_and_more_when_it_is_late() -> None:
    config = tiny_config(span=2)
    costs = [ModuleCost(state_bytes=10**6, graph_bytes=10**7, work_bytes=10**5) for _ in range(5)]
    alone = rank_memory(tiny_plan(config, ranks=5), costs, CPU)
    together = rank_memory(tiny_plan(config), costs, CPU)
    assert max(alone) < together[0] == 5 * 10**6 + 2 * 10**7 + 10**5  # two graphs at a time: one per cascade level
    late = tiny_plan(tiny_config(span=2, schedule={"kind": "async"}), ranks=5)
    assert rank_memory(late, costs, CPU)[1] > alone[1] + 9 * 10**6


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = profiled(tiny_plan(tiny_config()))
    profile.write(tmp_path / "p.json")
    assert Profile.read(tmp_path / "p.json") == profile
    assert profile.versions["torch"] == torch.__version__ and profile.device_bytes > 0


def test_a_profile_can_be_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"format": "localpipe-profile-1", "batch_size": 8, "modules": [{"forward_s": 1}, {}]}')
    assert Profile.read(path) == Profile((ModuleCost(forward_s=1.0), ModuleCost()), 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, 'is no profile; it must be an object with "format": "localpipe-profile-1"'),
        ({"modules": []}, "has no modules; give a list with one object for each local module"),
        ({"modules": [3]}, "module 0: 3 must be an object"),
        ({"modules": [{"foward_s": 1}]}, "module 0: unknown name 'foward_s'; did you mean 'forward_s'?"),
        ({"modules": [{}, {"update_s": -1}]}, "module 1: update_s = -1 must be a number of seconds, 0 or more"),
        ({"modules": [{"state_bytes": "x"}]}, "state_bytes = 'x' must be a number of bytes"),
        ({"batch_size": 0}, "batch_size = 0 must be a number of images"),
        ({"bach_size": 1}, "unknown name 'bach_size'; did you mean 'batch_size'?"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"format": "localpipe-profile-1", "batch_size": 8, "modules": [{}], **change}))
    with pytest.raises(ConfigError) as caught:
        Profile.read(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("no json")
    with pytest.raises(ConfigError, match="is no JSON"):
        Profile.read(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Profile.read(tmp_path / "q.json")


def test_a_profile_of_another_cut_or_batch_is_refused() -> None:
    profile = Profile((ModuleCost(),) * 3, 8, 8, work=("dgl", "32 images at a time"))
    profile.check(3, 8, ("dgl", "32 images at a time"))
    with pytest.raises(ConfigError, match="the profile is of dgl, the configuration has infopro"):
        profile.check(3, 8, ("infopro", "32 images at a time"))
    with pytest.raises(ConfigError, match=r"for 3 local modules, the configuration has 4 \(model.modules\)"):
        profile.check(4, 8, ())
    with pytest.raises(ConfigError, match=r"for 8 images per batch, the configuration has 16 \(data.batch_size\)"):
        profile.check(3, 16, ())


def test_a_rank_that_does_not_fit_is_named() -> None:
    refuse_too_large([5, 7], 7)
    with pytest.raises(ConfigError, match="rank 1 needs 3.00 GiB, its device has 2.00 GiB for it; start more"):
        refuse_too_large([1, 3 * 2**30, 2], 2 * 2**30)


def test_ranks_share_the_memory_of_a_machine() -> None:
    whole = device_memory(torch.device("cpu"))
    assert whole > 2**26 and device_memory(torch.device("cpu"), 4) == whole // 4


def test_a_rank_of_one_machine_is_promised_its_share() -> None:
    config = tiny_config()
    two = make_plan(config, tiny_blocks(), Classification(4, (3, 8, 8)), 2)
    shared = profile_modules(two, tiny_blocks(), CPU, warmup=1, steps=1, sharing=2)
    assert shared.device_bytes == device_memory(torch.device("cpu"), 2)
