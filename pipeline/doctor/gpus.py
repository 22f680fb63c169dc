"""GPUs and the links between them, as the driver tells: nothing here makes a CUDA context.

    nvidia-smi --query-gpu=...    index, name, memory, compute capability, driver
    nvidia-smi topo -m            GPU0 to GPU1: NV18 (NVLink), PIX, PXB, PHB, NODE (PCIe), SYS (between sockets)
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from dataclasses import dataclass

from pipeline.doctor.finding import Finding, Level, size

SMI_S = 20.0
"""After which a driver that does not answer counts as broken."""
QUERY = "index,uuid,name,memory.total,memory.used,compute_cap,driver_version"
MIB = 1024 * 1024
MAX_USED = 0.05
"""Share of a GPU's memory in use before training above which somebody else is taken to be at work there."""
ORDER = ("X", "NV", "PIX", "PXB", "PHB", "NODE", "SYS")
"""From fast to slow, as the legend of ``nvidia-smi topo -m`` describes them."""
PATHS = {
    "PIX": "one PCIe bridge",
    "PXB": "several PCIe bridges",
    "PHB": "a PCIe host bridge",
    "NODE": "several PCIe host bridges",
    "SYS": "the interconnect between CPU sockets",
}
LONGEST_SEARCH = 8
"""GPUs whose orders are all tried: 40,320."""


@dataclass(frozen=True)
class Gpu:
    """One line of ``nvidia-smi --query-gpu``."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    capability: str
    driver: str


def parse_gpus(text: str) -> list[Gpu]:
    """The output of ``--query-gpu=QUERY --format=csv,noheader,nounits``. Raises ValueError: it is something else."""
    found = []
    for line in text.strip().splitlines():
        index, uuid, name, total, used, capability, driver = (part.strip() for part in line.split(","))
        found.append(Gpu(int(index), uuid, name, _mib(total), _mib(used), capability, driver))
    return found


def _mib(text: str) -> int:
    """0 where the driver says ``[N/A]``: memory that the GPU shares with the CPU."""
    return int(text) * MIB if text.isdigit() else 0


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """Links by pair of GPUs, of the output of ``nvidia-smi topo -m``. Raises ValueError: there is no such table."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    titles = next((row for row in rows if row[:1] == ["GPU0"]), None)
    if titles is None:
        raise ValueError("no table of links")
    columns = [int(name[3:]) for name in titles if re.fullmatch(r"GPU\d+", name)]
    links: dict[tuple[int, int], str] = {}
    for name, *cells in filter(None, rows):
        if re.fullmatch(r"GPU\d+", name) and [name, *cells] != titles:
            links |= {(int(name[3:]), column): cell for column, cell in zip(columns, cells, strict=False)}
    return links


def visible(gpus: list[Gpu], environment: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order; None: all of them. What comes after an unknown name is
    not seen, as by CUDA."""
    if environment is None:
        return gpus
    found = []
    for name in filter(None, (part.strip() for part in environment.split(","))):
        match = [gpu for gpu in gpus if name == str(gpu.index) or (not name.isdigit() and gpu.uuid.startswith(name))]
        if len(match) != 1:
            break
        found += match
    return found


def smi(*words: str) -> str:
    """What nvidia-smi prints.

    Raises:
        FileNotFoundError: there is no driver.
        OSError: it does not work, or does not answer; the message is one line.
    """
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=SMI_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi has not answered for {SMI_S:g} s") from None
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        raise OSError(f"nvidia-smi exits {done.returncode} ('{said}')")
    return done.stdout


def gpu_findings(ranks: int, request: str, torch_cuda: str | None, torch_gpus: int, arch: list[str]) -> list[Finding]:
    """Two lines: the GPUs, and the links between neighbours; notes at most where ranks are not to use them.

    Args:
        ranks: processes of this node.
        request: ``runtime.device``.
        torch_cuda: the CUDA that torch was built for; None: a build without.
        torch_gpus: GPUs that torch sees.
        arch: what torch was compiled for, as ``["sm_90"]``.
    """
    found = _look(ranks, request, torch_cuda, torch_gpus, arch)
    if request != "cpu":
        return found
    return [
        finding if finding.level is Level.OK else Finding(finding.subject, Level.NOTE, f"{finding.text} (not used)")
        for finding in found
    ]


def _look(ranks: int, request: str, torch_cuda: str | None, torch_gpus: int, arch: list[str]) -> list[Finding]:
    wanted = request in ("cuda", "cuda-shared")
    try:
        gpus = parse_gpus(smi(f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"))
    except FileNotFoundError:
        level = Level.ERROR if wanted else Level.NOTE
        fix = "install an NVIDIA driver, or --set runtime.device=cpu" if wanted else ""
        return [Finding("GPUs", level, "none: no NVIDIA driver (no nvidia-smi)", fix), _no_links("no GPUs")]
    except (OSError, ValueError) as error:
        fix = "repair the driver: training would take the CPU"
        return [Finding("GPUs", Level.ERROR, str(error), fix), _no_links("no answer of the driver")]
    seen = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    here = _gpus(seen, len(gpus), ranks, request, torch_cuda, torch_gpus, arch)
    if len(seen) < 2:
        return [here, _no_links(f"{len(seen)} GPU")]
    try:
        return [here, judge_links([gpu.index for gpu in seen], parse_topology(smi("topo", "-m")))]
    except (OSError, ValueError) as error:
        return [here, Finding("links", Level.NOTE, f"unknown: nvidia-smi topo -m: {error}")]


def _no_links(why: str) -> Finding:
    return Finding("links", Level.OK, f"none between GPUs ({why})")


def _gpus(
    seen: list[Gpu], total: int, ranks: int, request: str, torch_cuda: str | None, torch_gpus: int, arch: list[str]
) -> Finding:
    kinds = [f"{len(list(same))} x {name}" for name, same in itertools.groupby(gpu.name for gpu in seen)]
    hidden = f" ({total - len(seen)} more hidden by CUDA_VISIBLE_DEVICES)" if total > len(seen) else ""
    memory = f", {size(min(gpu.total_bytes for gpu in seen))} each, driver {seen[0].driver}" if seen else ""
    text = f"{', '.join(kinds) or 'none'}{memory}{hidden}"
    if torch_cuda is None:
        return Finding("GPUs", Level.ERROR, f"{text}; this torch has no CUDA", "install a torch that has")
    if torch_gpus < len(seen):
        fix = "update the driver, or install a torch for an older CUDA; in a container: --gpus all"
        return Finding("GPUs", Level.ERROR, f"{text}; torch (CUDA {torch_cuda}) can use {torch_gpus} of them", fix)
    old = [gpu for gpu in seen if not _compiled_for(gpu.capability, arch)]
    if old:
        what = f"GPU {old[0].index} has compute capability {old[0].capability}, torch is for {', '.join(arch)}"
        return Finding("GPUs", Level.ERROR, f"{text}; {what}", "install a torch for this GPU")
    if seen and ranks > len(seen) and request in ("auto", "cuda"):
        level, what = (Level.WARNING, "they take the CPU") if request == "auto" else (Level.ERROR, "they do not start")
        fix = f"start {len(seen)} ranks, or --set runtime.device=cuda-shared"
        return Finding("GPUs", level, f"{text}; {ranks} ranks need one each, so {what}", fix)
    busy = [gpu for gpu in seen[: max(ranks, 1)] if gpu.used_bytes > MAX_USED * gpu.total_bytes > 0]
    if busy:
        used = ", ".join(f"{size(gpu.used_bytes)} of GPU {gpu.index}" for gpu in busy)
        return Finding("GPUs", Level.WARNING, f"{text}; in use already: {used}", "end what nvidia-smi lists there")
    return Finding("GPUs", Level.OK, text)


def _compiled_for(capability: str, arch: list[str]) -> bool:
    """Whether kernels for ``arch`` run on a GPU: those of its generation, up to its own number, and any PTX below."""
    if not arch or not re.fullmatch(r"\d+\.\d+", capability):
        return True  # nobody knows
    own = int(capability.replace(".", ""))
    for name in arch:
        kind, _, number = name.partition("_")
        least = int(re.sub(r"\D", "", number))
        if least <= own and (kind == "compute" or least // 10 == own // 10):
            return True
    return False


def judge_links(order: list[int], links: dict[tuple[int, int], str]) -> Finding:
    """The links between neighbours of the pipeline: rank r of a node has the r-th GPU that it sees.

    Args:
        order: of the GPUs, by their index.
    """
    pairs = list(itertools.pairwise(order))
    kinds = [links.get(pair, "unknown") for pair in pairs]
    slowest = max(kinds, key=_rank)
    if all(kind.startswith("NV") for kind in kinds):
        return Finding("links", Level.OK, f"NVLink between all neighbours ({', '.join(sorted(set(kinds)))})")
    slow = ", ".join(f"GPU {a} - GPU {b}" for (a, b), kind in zip(pairs, kinds, strict=True) if kind == slowest)
    text = f"{slowest} between {slow}: {PATHS.get(slowest, 'a link that is not known')}"
    better = best_order(order, links)
    if _cost(better, links) < _cost(order, links):
        fix = f"set CUDA_VISIBLE_DEVICES={','.join(map(str, better))}"
        return Finding("links", Level.WARNING, f"{text}, where others are faster", fix)
    if len({_rank(kind) for kind in kinds}) > 1:
        return Finding("links", Level.NOTE, f"{text}, others are faster; no order of the GPUs avoids it")
    return Finding("links", Level.NOTE, f"no NVLink; {text}")


def best_order(order: list[int], links: dict[tuple[int, int], str]) -> list[int]:
    """The GPUs as a chain with the fewest of the slowest links; as they are where there are too many to try."""
    if len(order) > LONGEST_SEARCH:
        return order
    return list(min(itertools.permutations(order), key=lambda chain: (_cost(list(chain), links), chain)))


def _cost(order: list[int], links: dict[tuple[int, int], str]) -> list[int]:
    """The links of a chain, slow ones first."""
    return sorted((_rank(links.get(pair, "unknown")) for pair in itertools.pairwise(order)), reverse=True)


def _rank(kind: str) -> int:
    name = "NV" if kind.startswith("NV") else kind
    return ORDER.index(name) if name in ORDER else len(ORDER)
