"""The cut: cut points of the papers, and even splits."""

from __future__ import annotations

import functools

import pytest

from pipeline.base.config import ModelConfig
from pipeline.base.errors import ConfigError
from pipeline.models.backbones import backbone_names
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.cut import TABLES, make_cut


@functools.cache
def names_of(name: str) -> tuple[str, ...]:
    """Of its blocks."""
    return tuple(planned_blocks(name, 3, 10))


def ends(name: str, modules: int, cuts: str = "auto", stem: str = "auto") -> list[str]:
    """Last block of every module but the last."""
    cut = make_cut(names_of(name), ModelConfig(name, modules, cuts, stem))
    assert tuple(block for names in cut.modules for block in names) == names_of(name)
    return [names[-1] for names in cut.modules[:-1]]


def short(*cut_points: str) -> list[str]:
    """"1.2" of the papers' tables -> "layer1.2"."""
    return [f"layer{point}" for point in cut_points]


def test_the_papers_cut_points() -> None:
    assert ends("resnet32", 2, "equal") == short("2.1")
    assert ends("resnet32", 4, "equal") == short("1.2", "2.1", "3.0")
    assert ends("resnet32", 8, "equal") == short("1.0", "1.2", "1.4", "2.1", "2.3", "3.0", "3.2")
    assert ends("resnet110", 2, "equal") == short("2.8")
    assert ends("resnet110", 4, "equal") == short("1.11", "2.7", "3.3")
    assert ends("resnet110", 8, "equal") == short("1.4", "1.11", "2.0", "2.7", "2.14", "3.3", "3.10")
    stages = {1: (1, 4, 7, 10, 13, 16), 2: (1, 4, 7, 11, 15), 3: (1, 5, 9, 13)}
    assert ends("resnet110", 16, "equal") == [f"layer{s}.{b}" for s, blocks in stages.items() for b in blocks]
    first = (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)
    stages = {1: first, 2: first, 3: (1, 3, 4, 6, 7, 9, 11, 13, 15)}
    assert ends("resnet110", 32, "hpff") == [f"layer{s}.{b}" for s, blocks in stages.items() for b in blocks]
    assert ends("resnet110", 4, "balanced") == short("1.6", "1.14", "2.8")
    assert ends("resnet110", 3, "balanced") == short("1.9", "2.2")
    assert ends("resnet110", 3, "balanced-stl10") == short("1.8", "2.1")


def test_the_papers_cut_points_of_imagenet() -> None:
    assert ends("resnet101", 4, "hpff") == ends("resnet152", 4, "hpff") == short("3.0", "3.9", "3.17")
    assert ends("resnext101_32x8d", 4) == short("3.0", "3.9", "3.17")
    eight = short("2.0", "3.1", "3.5", "3.9", "3.13", "3.17", "3.21")
    assert ends("resnet101", 8) == ends("resnet152", 8, "hpff") == ends("resnext101_32x8d", 8, "hpff") == eight
    assert ends("resnet34", 4) == ends("resnet50", 4, "hpff") == short("2.0", "3.0", "3.5")
    assert ends("resnet101", 2, "balanced") == short("2.0")
    assert ends("resnet152", 2, "balanced") == short("2.5")
    assert ends("resnext101_32x8d", 2, "balanced") == short("2.2")
    assert ends("resnet152", 2) == short("3.13")  # DGL: the stem and 25 blocks


def test_the_cut_points_of_dgl_for_vggs() -> None:
    """Convolutions of every local module; the classifier is in the last."""
    for name, modules, counts in (("vgg13_bn", 10, [1] * 10), ("vgg13_bn", 4, [3, 3, 3, 1]), ("vgg19_bn", 2, [8, 8])):
        *others, last = make_cut(names_of(name), ModelConfig(name, modules)).modules
        assert [*map(len, others), len(last) - 1] == counts
    assert ends("vgg19_bn", 4) == [names_of("vgg19_bn")[index] for index in (3, 7, 11)]


def test_the_stem_variants_of_sixteen_modules() -> None:
    own = ends("resnet32", 16)
    assert own[0] == "stem" and len(own) == 15
    merged = ends("resnet32", 16, "hpff")
    assert merged[0] == "layer1.0" and len(merged) == 14  # the released code builds 15 modules for K = 16
    assert len(ends("resnet110", 55, "hpff")) == 53
    assert ends("resnet32", 3, stem="own")[0] == "stem"


@pytest.mark.parametrize("name", backbone_names())
def test_any_number_of_modules_up_to_one_per_block(name: str) -> None:
    blocks = names_of(name)
    for modules in range(1, len(blocks) + 1):
        cut = make_cut(blocks, ModelConfig(name, modules, "even"))
        assert len(cut) == modules
        assert all(cut.modules)
    with pytest.raises(ConfigError, match=f"has {len(blocks)} blocks; use at most {len(blocks)}"):
        make_cut(blocks, ModelConfig(name, len(blocks) + 1))


def test_every_table_fits_its_network() -> None:
    for cuts, networks in TABLES.items():
        for name, by_modules in networks.items():
            for modules in by_modules:
                ends(name, modules, cuts)


def test_a_table_without_this_k_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model.cuts = 'balanced' has 2, 3, 4 for resnet110, not model.modules = 5"):
        make_cut(names_of("resnet110"), ModelConfig("resnet110", 5, "balanced"))
