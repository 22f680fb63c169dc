"""Where the papers cut their networks: name of the table -> network -> K -> residual blocks of every local module.

The stem is folded into the first module. Source: the released code of InfoPro, HPFF and DGL. InfoPro's K = 16 of
ResNet-32 is written with the stem as a module of its own: 0 residual blocks in module 0. Of VGGs, DGL's networks,
convolutions are counted, and the first one is the stem. HPFF cuts three ImageNet networks by one table, made for
ResNet-101, so the last module of ResNet-152 has as many blocks as two others.
"""

EQUAL: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet32": {
        2: (7, 8),
        3: (5, 5, 5),
        4: (3, 4, 4, 4),
        8: (1, 2, 2, 2, 2, 2, 2, 2),
        16: (0,) + (1,) * 15,
    },
    "resnet110": {
        2: (27, 27),
        3: (18, 18, 18),
        4: (12, 14, 14, 14),
        8: (5,) + (7,) * 7,
        16: (2,) + (3,) * 8 + (4,) * 7,
    },
    "vgg13_bn": {4: (2, 3, 3, 1), 10: (0,) + (1,) * 9},
    "vgg19_bn": {2: (7, 8), 4: (3, 4, 4, 4)},
    "resnet152": {2: (25, 25)},
}
HPFF: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet32": {8: EQUAL["resnet32"][8], 16: (1,) * 15},
    "resnet110": {
        32: (2, 1, 2, 1, 2, 2, 2, 2, 1, 2, 1) + (2, 1, 2, 1, 2, 2, 2, 2, 1, 2, 1) + (2, 2, 1, 2, 1, 2, 2, 2, 2, 2),
        55: (1,) * 54,
    },
    "resnet34": {4: (4, 4, 5, 3)},
    "resnet50": {4: (4, 4, 5, 3)},
    "resnet101": {4: (8, 9, 8, 8), 8: (4, 5, 4, 4, 4, 4, 4, 4)},
    "resnet152": {4: (12, 9, 8, 21), 8: (4, 9, 4, 4, 4, 4, 4, 17)},
    "resnext101_32x8d": {4: (8, 9, 8, 8), 8: (4, 5, 4, 4, 4, 4, 4, 4)},
}
BALANCED: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet110": {2: (15, 39), 3: (10, 11, 33), 4: (7, 8, 12, 27)},
    "resnet101": {2: (4, 29)},
    "resnet152": {2: (9, 41)},
    "resnext101_32x8d": {2: (6, 27)},
    "deeplabv3_resnet101": {2: (20, 13)},
    "deeplabv3_resnet101c": {2: (20, 13)},
}
BALANCED_STL10: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet110": {2: (15, 39), 3: (9, 11, 34), 4: (7, 8, 12, 27)},
}
TABLES = {"equal": EQUAL, "hpff": HPFF, "balanced": BALANCED, "balanced-stl10": BALANCED_STL10}


def modules_of_cut(network: str, modules: int, cuts: str | tuple[str, ...]) -> int:
    """Local modules that a cut makes: K, or what its table has for it (the released HPFF code builds 15 for K = 16)."""
    table = TABLES[cuts].get(network, {}) if isinstance(cuts, str) and cuts in TABLES else {}
    return len(table.get(modules, range(modules)))


def group_sizes(modules: int, group: int | tuple[int, ...]) -> tuple[int, ...]:
    """How many consecutive ones of ``modules`` each group has: so many, the last one what is left; or as listed, which
    may not add up."""
    if isinstance(group, tuple):
        return group
    whole, rest = divmod(modules, group)
    return (group,) * whole + ((rest,) if rest else ())
