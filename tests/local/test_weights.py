"""Names of weights: in a module's state, in the files of the whole network, in the digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tiny import network, tiny_batch, tiny_blocks, tiny_config, tiny_stage, train_on

from pipeline.local.module_state import module_state
from pipeline.local.weights import heads_state, model_state, module_weights, weights_of, weights_sha256
from pipeline.models.backbones import UncutModel
from pipeline.store.weights_file import write_weights

STATES = [
    {"blocks.stem.0.weight": torch.arange(4.0), "heads.cascade.terms.0.bias": torch.tensor([7])},
    {"optimiser.0.momentum_buffer": torch.ones(2), "blocks.layer1.0.conv1.weight": torch.ones(1, 2).bfloat16()},
    {"heads.independent.terms.0.bias": torch.tensor(1.5), "blocks.end.weight": torch.ones(1)},
]


def test_blocks_have_the_names_of_the_uncut_network_and_heads_those_of_their_module() -> None:
    assert list(model_state(STATES)) == ["stem.0.weight", "layer1.0.conv1.weight", "end.weight"]
    assert list(heads_state(STATES)) == ["module0.cascade.terms.0.bias", "module2.independent.terms.0.bias"]
    assert list(heads_state(STATES, "heads."))[1] == "heads.module2.independent.terms.0.bias"


def test_the_digest_is_of_names_types_shapes_and_bytes_of_weights_only() -> None:
    """Blocks, then heads of every module, in order. Written out: runs of different versions must be comparable."""
    digest = hashlib.sha256()
    for name, value in (
        ("stem.0.weight torch.float32 (4,);", torch.arange(4.0)),
        ("module0.cascade.terms.0.bias torch.int64 (1,);", torch.tensor([7])),
        ("layer1.0.conv1.weight torch.bfloat16 (1, 2);", torch.ones(2).bfloat16().view(torch.int16)),
        ("end.weight torch.float32 (1,);", torch.ones(1)),
        ("module2.independent.terms.0.bias torch.float32 ();", torch.tensor(1.5)),
    ):
        digest.update(name.encode() + value.numpy().tobytes())
    assert weights_sha256(STATES) == digest.hexdigest()


def test_all_names_of_a_module_are_made_in_one_place() -> None:
    """What a checkpoint holds of its weights has the names and the bytes of what a run ends with."""
    stage, modules, _ = tiny_stage(tiny_config("infopro", "hpff", 2, 3))
    train_on(stage, 1, 0, tiny_batch())
    weights = [module_weights(module) for module in modules]
    saved = [module_state(module) for module in modules]
    for mine, state in zip(weights, saved, strict=True):
        assert list(mine) == list(weights_of(state)) and len(state) > len(mine)
    assert weights_sha256(weights) == weights_sha256(saved)
    UncutModel(tiny_blocks()).load_state_dict(model_state(weights), strict=True)
    network().load_state_dict(model_state(saved), strict=True)
    levels = {".".join(name.split(".")[:2]) for name in heads_state(weights)}
    assert levels == {"module0.independent", "module1.independent", "module1.cascade"}


def test_a_file_of_weights_holds_tensors_only(tmp_path: Path) -> None:
    state = model_state(STATES)
    write_weights(tmp_path / "model.pt", state)
    read = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(read) == list(state) and all(torch.equal(read[name], value) for name, value in state.items())
