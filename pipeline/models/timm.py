"""Networks of timm by name, ``model.name = "timm/vit_small_patch16_224"``, cut by their traced forward at their blocks.

timm is optional (``pip install localpipe[timm]``). Weights keep its names and are drawn as it draws them.
"""

from __future__ import annotations

import difflib
from typing import Any

from pipeline.base.errors import ConfigError, shown
from pipeline.models.backbones import Blocks, Sides, SizedFunction, register_library
from pipeline.models.custom import network_blocks

LIBRARY = "timm"


def timm_network(name: str) -> SizedFunction:
    """The function that builds timm's network ``name``, without trained weights, as blocks; for the images that it gets
    where the network takes one size only.

    Raises:
        ConfigError: timm is not installed or has no such network.
    """
    library = _timm(name)
    if not library.is_model(name):
        near = difflib.get_close_matches(name, library.list_models(), n=1)
        hint = f"did you mean '{LIBRARY}/{near[0]}'?" if near else "timm.list_models() has the names"
        raise ConfigError(f"model.name = {shown(f'{LIBRARY}/{name}')}: timm has no network of this name; {hint}")
    try:
        known = library.get_pretrained_cfg(name)
    except RuntimeError as error:  # of a tag, behind a dot
        raise ConfigError(f"model.name = {shown(f'{LIBRARY}/{name}')}: {error}; leave the tag out") from error

    def build(in_channels: int, classes: int, sides: Sides | None) -> Blocks:
        options: dict[str, Any] = {}
        if sides is not None and known is not None and known.fixed_input_size:
            options["img_size"] = tuple(sides)
        try:
            network = library.create_model(
                name, pretrained=False, num_classes=classes, in_chans=in_channels, **options
            )
        except (AssertionError, TypeError, ValueError) as error:
            size = " x ".join(map(str, (in_channels, *(sides or ()))))
            raise ConfigError(
                f"model.name = '{LIBRARY}/{name}' cannot be built for images of {size} ({error}); use others, or "
                "another network"
            ) from error
        return network_blocks(network)

    return build


def _timm(name: str) -> Any:
    try:
        import timm  # its import takes seconds, and most do without
    except ImportError as error:
        raise ConfigError(
            f"model.name = {shown(f'{LIBRARY}/{name}')} needs timm, which cannot be imported ({error}); run: "
            "pip install localpipe[timm]"
        ) from error
    return timm


register_library(LIBRARY, timm_network)
