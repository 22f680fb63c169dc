"""A stage without neighbours: evaluation counts every image and every head; micro-batches keep their shares."""

from __future__ import annotations

import torch
from tiny import evaluate_on, gradients, tiny_batch, tiny_config, tiny_stage, train_on, without_updates

from pipeline.local.weights import module_weights
from pipeline.stage.inlet import Batch


def test_evaluation_counts_the_errors_of_every_head_in_short_batches_too() -> None:
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2))
    train_on(stage, 1, 0, tiny_batch(0))
    batches = [tiny_batch(1, 8), tiny_batch(2, 3)]
    for index, batch in enumerate(batches):
        evaluate_on(stage, 1, index, batch)
    counted = stage.take_counters()

    assert counted.tested == 11
    expected: dict[tuple[int, str], int] = {}
    with torch.no_grad():
        for batch in batches:
            h = batch.x
            for module in modules:
                for block in module.blocks.values():
                    h = block.eval()(h)
                for name, level in module.levels.items():
                    head = level.eval().terms["task"].heads[0]
                    half = h.shape[-1] // 2
                    parts = [h[:, :, a : a + half, b : b + half] for a in (0, half) for b in (0, half)]
                    scores = sum(head.logits(part) for part in parts)
                    key = (module.plan.index, name)
                    expected[key] = expected.get(key, 0) + int((scores.argmax(dim=1) != batch.labels).sum())
            key = (modules[-1].plan.index, "final")
            expected[key] = expected.get(key, 0) + int((h.argmax(dim=1) != batch.labels).sum())
    assert {key[:2]: int(value) for key, value in counted.statistics.items()} == expected


def test_evaluation_changes_nothing() -> None:
    stage, modules, _ = tiny_stage(tiny_config("infopro", "hpff", 2))
    train_on(stage, 1, 0, tiny_batch(0))
    before = [{name: value.clone() for name, value in module_weights(module).items()} for module in modules]
    evaluate_on(stage, 1, 0, tiny_batch(1))
    for module, old in zip(modules, before, strict=True):
        for name, value in module_weights(module).items():
            assert torch.equal(value, old[name]), name


def test_uneven_micro_batches_weigh_images_equally() -> None:
    """Seven images in micro-batches of four and three: gradients are 4/7 and 3/7 of those of the two parts."""
    config = tiny_config("dgl", "plain", 1, modules=2, schedule={"micro_batches": 2})
    stage, modules, _ = tiny_stage(config, torch.float64)
    batch = tiny_batch(0, 7, torch.float64)
    train_on(without_updates(stage), 1, 0, batch)

    halves, reference, _ = tiny_stage(tiny_config("dgl", "plain", 1, modules=2), torch.float64)
    without_updates(halves)
    total: dict[str, torch.Tensor] = {}
    for rows, part in ((4, slice(0, 4)), (3, slice(4, 7))):
        train_on(halves, 1, 0, Batch(batch.x[part], batch.labels[part], batch.image[part]))
        for name, gradient in gradients(reference).items():
            assert gradient is not None
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient * rows / 7
        for module in reference:
            module.optimiser.clear()
    for name, gradient in gradients(modules).items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-10, atol=1e-12)
