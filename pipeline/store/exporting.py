"""A checkpoint as one file of weights that needs nothing of this package, a flat dict of tensors, or as a directory of
them and of what the network is (hub).

    checkpoint, verified --> states of all local modules --> names of the un-cut network (weights) --> weights_file, hub
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from pipeline.base.errors import ConfigError, warn
from pipeline.local.weights import HEADS, State, heads_state, model_state, weights_of
from pipeline.models.torchvision import torchvision_name
from pipeline.store import hub
from pipeline.store.atomic import remove_temporaries, write_atomically, write_directory
from pipeline.store.checkpoint import Checkpoint, open_checkpoint
from pipeline.store.weights_file import encode_pt

SUFFIXES = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}
FORMATS = ("pt", "safetensors", hub.FORMAT)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm: state, but no parameters
Encoder = Callable[[State, dict[str, str]], bytes]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file, or the directory.
        checkpoint: the step directory that it was made from.
        step: training steps done.
        parameters: numbers in all tensors but BatchNorm's statistics.
        sha256: of the file, or of that of the weights in the directory.
    """

    path: Path
    checkpoint: Path
    step: int
    parameters: int
    sha256: str

    def __str__(self) -> str:
        return (
            f"{self.path}: step {self.step} of {self.checkpoint}, {self.parameters:,} parameters, "
            f"SHA-256 {self.sha256}"
        )


def export(
    source: Path | str, output: Path | str, *, heads: bool = False, fmt: str | None = None, ema: bool = False
) -> Exported:
    """Write the ``state_dict`` of the un-cut network of a checkpoint: a file, or a directory that says what it is of.

    The keys are those of :class:`pipeline.UncutModel`, of torchvision's network for its backbones, of the
    ``nn.Sequential`` for a user's own network: each loads it with ``strict=True``. A .pt file loads with
    ``torch.load(file, weights_only=True)``, a directory with :func:`pipeline.load_exported`.

    Args:
        source: the directory of a checkpoint, or of a run, of which the newest valid checkpoint is taken.
        output: a new file: .pt, .pth or .safetensors; a new directory with ``fmt`` "hub".
        heads: add the auxiliary heads as ``heads.module<m>.<level>.<name>``.
        fmt: "pt" or "safetensors", where the name of the file does not say it; "hub" for a directory of config.json,
            model.safetensors and README.md.
        ema: the moving averages of all weights (``train.ema``) in their place.

    Raises:
        CheckpointError: the checkpoint is incomplete, a file of it has changed, or it has no averages.
        ConfigError: an ``output`` that exists or cannot be written, an unknown format.
    """
    output = Path(output)
    encode = _encoder(output, fmt)
    if output.exists():
        raise ConfigError(f"'{output}' exists already; choose another name")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"'{output}': there is no directory '{output.parent}'; make it, or choose another")
    saved = open_checkpoint(Path(source))
    if saved.older is not None:
        warn(saved.older)
    config = saved.config
    state = _uncut_state(saved, config.model.name, heads, ema)
    about = {"step": str(saved.step), "config_sha256": config.fingerprint(), "backbone": config.model.name}
    content = encode(state, about)
    if fmt == hub.FORMAT:
        _write(output, lambda: write_directory(output, hub.files(saved, config, heads, content, ema)))
    else:
        _write(output, lambda: write_atomically(output, lambda file: file.write(content)))
    parameters = sum(value.numel() for name, value in state.items() if name.rpartition(".")[2] not in _STATISTICS)
    return Exported(output, saved.path, saved.step, parameters, hashlib.sha256(content).hexdigest())


def _uncut_state(saved: Checkpoint, backbone: str, heads: bool, ema: bool) -> State:
    """Blocks in order; then, with ``heads``, all heads; with ``ema`` their averages."""
    modules = range(len(saved.module_names))
    states = [saved.averages(index) if ema else weights_of(saved.module_state(index)) for index in modules]
    blocks = {torchvision_name(backbone, name): value for name, value in model_state(states).items()}
    return blocks | (heads_state(states, HEADS) if heads else {})


def _encoder(output: Path, fmt: str | None) -> Encoder:
    """What makes bytes of a state, in the format that ``fmt`` or else the suffix of ``output`` names."""
    chosen = fmt or SUFFIXES.get(output.suffix)
    if chosen not in FORMATS:
        where = f"format '{fmt}'" if fmt else f"the suffix of '{output}'"
        formats = " or ".join(FORMATS)
        raise ConfigError(f"{where} is not known; name the file .pt, .pth or .safetensors, or give --format {formats}")
    if chosen == "pt":
        return lambda state, about: encode_pt(state)
    return lambda state, about: save(state, {"format": "pt", **about})


def _write(output: Path, write: Callable[[], None]) -> None:
    """All of it or nothing, and without what killed exports have left beside it."""
    try:
        remove_temporaries(output.absolute().parent, lambda name: name == output.name or Path(name).suffix in SUFFIXES)
        write()
    except OSError as error:
        raise ConfigError(f"'{output}' cannot be written ({error.strerror}); choose another place") from error
