"""What trained networks have learnt, from checkpoints of this trainer: the analyses of HPFF's figures 3 to 6.

    python benchmarks/analysis.py --what probe --runs BP=runs/bp DGL=runs/dgl --data CIFAR10_FOLDER --chart probe.png
    python benchmarks/analysis.py --what cka ...

    probe  error of a linear classifier on the output of every block (figure 4)
    cka    how alike the blocks are to those of the first run (figure 5; benchmarks/similarity.py)
    tsne   images by the features before the classifier, in the plane (figure 3); needs localpipe[analysis]
    maps   where the blocks are active in an image, mean over channels (figure 6)
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from analysis_charts import draw_cka, draw_maps, draw_probe, draw_tsne
from features import Trained, labelled_images, open_trained
from linear_probe import pooled, probe_error
from runner import Report, main, option
from similarity import cka
from synthetic_images import train_two
from tables import Column, Row, Table
from torch import Tensor

from pipeline import ConfigError


@dataclass(frozen=True)
class Settings:
    what: str = option("probe", "which analysis", choices=("probe", "cka", "tsne", "maps"))
    runs: tuple[str, ...] = option(("",), "run directories or checkpoints; the first one is the reference", "TITLE=DIR")
    data: str = option("", "image folder of the same classes (train/CLASS, test/CLASS)", "DIR")
    train_images: int = option(5000, "probe: to fit on", "N")
    test_images: int = option(2000, "probe, cka, tsne: to look at", "N")
    pool: int = option(2, "probe: side of the map that the classifier sees", "N")
    batch: int = option(250, "cka: images of a minibatch", "N", above=3)
    perplexity: float = option(30.0, "tsne", "P")
    shown: int = option(5, "maps: images", "N")
    at: tuple[str, ...] = option(("",), "maps: blocks; default: a quarter, half, and all of the way", "BLOCK")
    drawn: bool = False  # look at two tiny networks trained on drawn images


def measure(settings: Settings) -> Report:
    """Open the networks and look at them."""
    if settings.drawn:
        return _on_drawn_images(settings)
    if not any(settings.runs) or not settings.data:
        raise ConfigError("--runs TITLE=DIR ... and --data DIR are needed (or --quick)")
    networks = [open_trained(given) for given in settings.runs]
    shapes = {network.image_shape for network in networks}
    if len(shapes) > 1:
        raise ConfigError(f"--runs: trained on images of the shapes {sorted(shapes)}; give runs on one data set")
    analyses: dict[str, Callable[[Settings, Sequence[Trained]], Report]] = {
        "probe": probe, "cka": similarity_to_first, "tsne": plane, "maps": maps,
    }  # fmt: skip
    report = analyses[settings.what](settings, networks)
    trained = "; ".join(f"{n.title}: {n.method}, K = {len(n.modules)}, epoch {n.epoch}" for n in networks)
    return replace(report, about=[f"{trained}.", *report.about])


def test_images(settings: Settings, network: Trained, count: int) -> tuple[Tensor, Tensor]:
    return labelled_images(Path(settings.data), "test", count, network.image_shape)


def probe(settings: Settings, networks: Sequence[Trained]) -> Report:
    """The error of a linear classifier on every block of every network."""
    shape = networks[0].image_shape
    train, train_labels = labelled_images(Path(settings.data), "train", settings.train_images, shape)
    test, test_labels = test_images(settings, networks[0], settings.test_images)
    rows: list[Row] = []
    for network in networks:
        seen = [_pooled_outputs(network, images, settings.pool) for images in (train, test)]
        for index, block in enumerate(network.blocks):
            error = probe_error((seen[0][block], train_labels), (seen[1][block], test_labels))
            rows.append({"network": network.title, "index": index, "block": block, "error": error,
                         "features": seen[0][block].shape[1]})  # fmt: skip
    about = (
        f"Error in % on {len(test):,} test images of a logistic regression on a block's output, averaged to at most "
        f"{settings.pool} x {settings.pool} positions, fitted on {len(train):,} training images without augmentation."
    )
    return Report("Linear probes of every block: error %", [_by_block(rows, "error", ".2f")], [about], rows=rows,
                  draw=lambda path: draw_probe(rows, path))  # fmt: skip


def _by_block(rows: Sequence[Row], key: str, form: str) -> Table:
    """A line per block, a column per network."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    lines: dict[str, Row] = {}
    for row in rows:
        lines.setdefault(row["block"], {"block": row["block"], **dict.fromkeys(names)})[row["network"]] = row[key]
    return Table([Column("block", "block"), *(Column(name, name, form) for name in names)], list(lines.values()))


def _pooled_outputs(network: Trained, images: Tensor, side: int) -> dict[str, Tensor]:
    parts = [{name: pooled(x, side) for name, x in each.items()} for each in network.outputs(images)]
    return {name: torch.cat([part[name] for part in parts]) for name in network.blocks}


def similarity_to_first(settings: Settings, networks: Sequence[Trained]) -> Report:
    """CKA of every block with every block of the first network."""
    first, *others = networks
    images, _ = test_images(settings, first, settings.test_images)
    images = images[: len(images) // settings.batch * settings.batch]
    if not len(images):
        raise ConfigError(f"--batch {settings.batch}: there are not so many test images")
    rows: list[Row] = []
    for network in others:
        pairs = zip(network.outputs(images, settings.batch), first.outputs(images, settings.batch), strict=True)
        matrix = cka((list(a.values()), list(b.values())) for a, b in pairs)
        for block, values in zip(network.blocks, matrix.tolist(), strict=True):
            same = values[first.blocks.index(block)] if block in first.blocks else math.nan
            rows.append({"network": network.title, "block": block, "same": same, "all": [round(v, 4) for v in values],
                         "reference": first.title, "reference_blocks": list(first.blocks)})  # fmt: skip
    about = (
        f"Linear CKA with the same block of {first.title}, unbiased, from {len(images):,} test images in minibatches "
        f"of {settings.batch}: 1 = the same up to rotation and scale, 0 = nothing in common."
    )
    return Report(f"Similarity to {first.title}: CKA", [_by_block(rows, "same", ".3f")], [about], rows=rows,
                  draw=lambda path: draw_cka(rows, path))  # fmt: skip


def plane(settings: Settings, networks: Sequence[Trained]) -> Report:
    """t-SNE of the features before the classifier."""
    try:
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise ConfigError("--what tsne needs scikit-learn; run: pip install localpipe[analysis]") from error
    images, labels = test_images(settings, networks[0], settings.test_images)
    perplexity = min(settings.perplexity, (len(images) - 1) / 3)
    rows: list[Row] = []
    for network in networks:
        last = network.blocks[-1]
        features = _pooled_outputs(network, images, 1)[last].numpy()
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
        rows.append({
            "network": network.title, "block": last, "silhouette": float(silhouette_score(features, labels.numpy())),
            "points": [[round(float(x), 2), round(float(y), 2)] for x, y in points], "labels": labels.tolist(),
        })  # fmt: skip
    about = (
        f"{len(images):,} test images by the output of the last block, averaged over positions; perplexity "
        f"{perplexity:g}, from principal components, seed 0. Distances between groups mean nothing in such a picture; "
        "the silhouette coefficient is of the features themselves: 1 = classes far apart, 0 = in one another."
    )
    columns = (Column("network", "network"), Column("block", "block"), Column("silhouette", "silhouette", ".3f"))
    return Report("Test images in the plane (t-SNE)", [Table(columns, rows)], [about],
                  draw=lambda path: draw_tsne(rows, path))  # fmt: skip


def maps(settings: Settings, networks: Sequence[Trained]) -> Report:
    """Where blocks are active: mean over channels, scaled to [0, 1] in every map."""
    images, labels = test_images(settings, networks[0], settings.shown)
    rows: list[Row] = []
    for network in networks:
        (outputs,) = network.outputs(images, len(images))
        for block in _blocks_shown(settings, network):
            for index, image in enumerate(outputs[block].mean(1)):
                low, high = image.min(), image.max()
                scaled = ((image - low) / (high - low).clamp(min=1e-12)).tolist()
                rows.append({
                    "network": network.title, "block": block, "image": index, "label": int(labels[index]),
                    "area": _active_area(image - low), "map": [[round(v, 2) for v in line] for line in scaled],
                })  # fmt: skip
    means = [
        {"network": title, "block": block, "area": sum(found) / len(found)}
        for title, block in dict.fromkeys((row["network"], row["block"]) for row in rows)
        if (found := [row["area"] for row in rows if (row["network"], row["block"]) == (title, block)])
    ]
    about = (
        "Mean over channels of a block's output, darkest to brightest position of each map; active area: exp of the "
        f"entropy of the map as shares of its sum, as a share of all positions, mean over {len(images)} images."
    )
    columns = (Column("network", "network"), Column("block", "block"), Column("active area", "area", ".2f"))
    pixels = images.permute(0, 2, 3, 1).tolist()
    return Report("Activation maps", [Table(columns, means)], [about], rows=rows,
                  draw=lambda path: draw_maps(rows, pixels, path))  # fmt: skip


def _blocks_shown(settings: Settings, network: Trained) -> list[str]:
    wanted = [name for name in settings.at if name]
    for name in wanted:
        if name not in network.blocks:
            raise ConfigError(f"--at {name}: {network.title} has the blocks {', '.join(network.blocks)}")
    count = len(network.blocks)
    return wanted or [network.blocks[i] for i in sorted({count // 4, count // 2, count - 1})]


def _active_area(image: Tensor) -> float:
    share = image.flatten().double() / image.sum().clamp(min=1e-12)
    entropy = -torch.xlogy(share, share).sum().item()
    return math.exp(entropy) / share.numel()


def _on_drawn_images(settings: Settings) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        data, runs = train_two(Path(folder))
        small = replace(settings, train_images=60, test_images=40, batch=20, shown=2)
        return measure(replace(small, drawn=False, data=str(data), runs=runs))


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"drawn": True}, chart="the figure")
