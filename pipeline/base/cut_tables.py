"""Where the papers cut their networks: name of the table -> network -> K -> residual blocks of every local module.

The stem is folded into the first module. Source: the released code of InfoPro and HPFF. InfoPro's K = 16 of ResNet-32
is written with the stem as a module of its own: 0 residual blocks in module 0.
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
}
HPFF: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet32": {8: EQUAL["resnet32"][8], 16: (1,) * 15},
    "resnet110": {
        32: (2, 1, 2, 1, 2, 2, 2, 2, 1, 2, 1) + (2, 1, 2, 1, 2, 2, 2, 2, 1, 2, 1) + (2, 2, 1, 2, 1, 2, 2, 2, 2, 2),
        55: (1,) * 54,
    },
}
BALANCED: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet110": {2: (15, 39), 3: (10, 11, 33), 4: (7, 8, 12, 27)},
}
BALANCED_STL10: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet110": {2: (15, 39), 3: (9, 11, 34), 4: (7, 8, 12, 27)},
}
TABLES = {"equal": EQUAL, "hpff": HPFF, "balanced": BALANCED, "balanced-stl10": BALANCED_STL10}

