"""What a GPU makes of it: one command for the tests that need one, speed, memory, launches, and gradients.

    python benchmarks/gpu.py [--parts PART ...] [--network NAME ...] [--quick] [--keep FILE] [--output FILE.md] ...

    tests      pytest -m gpu
    gradients  the weights after one step in fp32 against those on the CPU
    ranks      the default job: one rank with NCCL; four ranks that share the GPU (gloo)
    speed      backpropagation (eager, compiled, as one CUDA graph) against local learning, in bf16, on one GPU:
               time of a step, peak memory, kernels of a step, and how much of the time the GPU computes

All of it takes less than 8 minutes on one GPU: what is not begun after ``--minutes`` is left out, and said; each case
is measured once before any is measured again. A case that fails is named, and the others go on. Each measurement is
also a line of the error output when it is made, and of the file ``--keep``, with which the same command goes on.
``--device cpu`` runs what has a meaning there: it is how this file is tested.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept import Kept
from networks import CLASSES, network, normalise, random_images, sgd
from runner import Report, Target, check_files, hardware, main, option
from tables import Column, K, Row, Table
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torchvision.models import vit_b_16

from pipeline import Config, LoaderData, LocalpipeError, __version__, load_config, read_metrics, train

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "gradients", "ranks", "speed")
HPFF = ("hierarchy.cascade_span=2", "patches.grid=2")
ALL_AT_ONCE = ("hierarchy.levels=together", "patches.at_once=4")
DGL, INFOPRO = ("method.name=dgl",), ("method.name=infopro", "method.head=1c2f")
LEARNING = {
    "DGL": DGL, "DGL + HPFF": (*DGL, *HPFF), "DGL + HPFF, all at once": (*DGL, *HPFF, *ALL_AT_ONCE),
    "InfoPro": INFOPRO, "InfoPro + HPFF": (*INFOPRO, *HPFF),
    "InfoPro + HPFF, all at once": (*INFOPRO, *HPFF, *ALL_AT_ONCE),
}  # fmt: skip
GRAPHED = {
    f"{name}, CUDA graphs": (*LEARNING[name], "precision.cuda_graphs=true")
    for name in ("DGL", "DGL + HPFF", "DGL + HPFF, all at once", "InfoPro + HPFF, all at once")
}
WARM_UP = 5
"""Steps of local learning before those that count; with graphs the fourth captures."""
BP = ("BP, eager", "BP, compiled", "BP, CUDA graph")
RUN = ("runtime.threads=1", "optim.warmup_epochs=0", "optim.schedule=constant", "train.epochs=1", "data.augment=none",
       "log.curve=false")  # fmt: skip
STEP, MEMORY, BUSY = 2.0, 0.40, 0.85
"""The targets, for the fastest form of DGL + HPFF on ResNet-32, K = 16, on one H100 or H200."""
TESTS_S, JOB_S = 150.0, 60.0
"""The tests, and one of the jobs, are given up after so many seconds."""


@dataclass(frozen=True)
class Workload:
    """A network, its images and its cut."""

    image: tuple[int, ...]
    batch: int
    cut: tuple[str, ...]
    make: Callable[[], nn.Module]
    own: bool = False  # no backbone of the package: its modules are named


def _vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = vit_b_16(num_classes=CLASSES)
    return model


VIT_CUTS = [f"encoder.layers.encoder_layer_{index}" for index in (3, 6, 9)]
WORKLOADS = {
    "resnet32": Workload((3, 32, 32), 1024, ("model.modules=16", "model.cuts=even"), lambda: network("resnet32")),
    "resnet110": Workload((3, 32, 32), 1024, ("model.modules=55", "model.cuts=even"), lambda: network("resnet110")),
    "resnet101": Workload((3, 224, 224), 128, ("model.modules=4",), lambda: network("resnet101")),
    "vit_b_16": Workload((3, 224, 224), 128, ("model.modules=4", f"model.cuts={VIT_CUTS}"), _vit, own=True),
}


@dataclass(frozen=True)
class Settings:
    parts: tuple[str, ...] = option(PARTS, "what to do", "PART", choices=PARTS)
    network: tuple[str, ...] = option(tuple(WORKLOADS), "of the part speed", "NAME", choices=tuple(WORKLOADS))
    rounds: int = option(3, "interleaved rounds", "N")
    steps: int = option(10, "measured steps of one round", "N")
    batch: int = option(0, "images of a step; 0: as many as suit the network", "N", above=-1)
    minutes: float = option(7.0, "begin nothing of the part speed after so many", "N", above=0)
    device: str = option("cuda", "where", choices=("cuda", "cpu"))
    keep: str = option("", "keep what has been measured in it, for the same command to go on with", "FILE")
    quick: bool = False


@dataclass(frozen=True)
class Steps:
    """What some steps took: seconds of one, peak bytes, kernels of one, share of the time with a kernel at work."""

    seconds: float
    peak: float | None
    kernels: float | None
    busy: float | None


class Meter:
    """Measures steps between two moments; the device has then done what it was asked for.

    On one device without neighbours nothing waits for a message, so waiting for all of the device is safe here.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._profiler: profile | None = None
        self._started = 0.0

    def start(self) -> None:
        """The first measured step begins."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def stop(self, steps: int) -> Steps:
        """``steps`` are over."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - self._started) / steps
        return Steps(seconds, float(torch.cuda.max_memory_allocated()) if self._cuda else None, None, None)

    def start_profile(self) -> None:
        """The first step under the profiler begins."""
        if self._cuda:
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.start()

    def stop_profile(self, timed: Steps, steps: int) -> Steps:
        """``steps`` under it are over, which were ``timed`` without it: what it has seen besides."""
        if self._profiler is None:
            return timed
        torch.cuda.synchronize()
        self._profiler.stop()
        kernels = [event for event in self._profiler.events() if event.device_type == DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6 / steps
        return replace(timed, kernels=len(kernels) / steps, busy=busy / timed.seconds)


def local_steps(workload: Workload, config: Config, steps: int, device: str, profiled: bool) -> Steps:
    """Steps of local learning after some to warm up, and as many again under the profiler."""
    images, labels = random_images(config.data.batch_size, workload.image)
    meter, seen = Meter(device), [-1]
    found: list[Steps] = []

    def before(step: int, action: Any) -> None:
        if step == seen[-1]:
            return
        seen.append(step)
        if step == WARM_UP:
            meter.start()
        elif step == WARM_UP + steps:
            found.append(meter.stop(steps))
            if profiled:
                meter.start_profile()
        elif step == WARM_UP + 2 * steps:
            found.append(meter.stop_profile(found[0], steps))

    batches = WARM_UP + 1 + steps * (1 + profiled)
    data = LoaderData([(images, labels)] * batches, [(images[:2], labels[:2])])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(config, network=workload.make(), data=data, run_dir=Path(folder) / "run", quiet=True,
              before_action=before)  # fmt: skip
    return found[-1]


def bp_steps(workload: Workload, form: str, batch: int, steps: int, device: str, profiled: bool) -> Steps:
    """The same of backpropagation in plain PyTorch."""
    images, labels = (x.to(device) for x in random_images(batch, workload.image))
    model = workload.make().to(device).to(memory_format=torch.channels_last)
    optimiser = sgd(model.parameters())
    run: Callable[[Tensor], Tensor] = torch.compile(model) if form == "BP, compiled" else model

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            scores = run(normalise(images))
        cross_entropy(scores.float(), labels).backward()
        optimiser.step()

    for _ in range(3):
        step()
    replay = _graphed(step) if form == "BP, CUDA graph" else step
    meter = Meter(device)
    meter.start()
    for _ in range(steps):
        replay()
    timed = meter.stop(steps)
    if not profiled:
        return timed
    meter.start_profile()
    for _ in range(steps):
        replay()
    return meter.stop_profile(timed, steps)


def _graphed(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph, warmed up on the side as capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def cases(settings: Settings) -> list[tuple[str, str, int, Callable[[bool], Steps]]]:
    """Network, system, K, and what measures some steps of it."""
    found: list[tuple[str, str, int, Callable[[bool], Steps]]] = []
    for name in settings.network:
        workload = WORKLOADS[name]
        batch, device, steps = settings.batch or workload.batch, settings.device, settings.steps
        for form in BP if device == "cuda" else BP[:1]:
            found.append((name, form, 1, partial(bp_steps, workload, form, batch, steps, device)))
        graphed = GRAPHED if device == "cuda" else {}
        for learning, chosen in [*list(LEARNING.items())[:: 3 if settings.quick else 1], *graphed.items()]:
            model = () if workload.own else (f"model.name={name}",)
            assignments = [*RUN, *model, *workload.cut, *chosen, f"data.batch_size={batch}", f"runtime.device={device}"]
            config = load_config("cifar10-resnet32-bp", assignments=[*assignments, "precision.compute=bf16"])
            found.append((name, learning, config.model.modules, partial(local_steps, workload, config, steps, device)))
    return found


COLUMNS = (
    Column("network", "network"), Column("system", "system"), K, Column("ms/step", "ms_per_step", ".1f"),
    Column("low", "low", ".1f"), Column("high", "high", ".1f"), Column("to BP, eager", "ratio_to_bp", ".2f"),
    Column("peak MiB", "peak_mib", ",.0f"), Column("peak to BP's", "peak_ratio", ".2f"),
    Column("kernels", "kernels", ",.0f"), Column("GPU busy", "busy", ".2f"),
)  # fmt: skip


def _taken(run: Callable[[bool], Steps], profiled: bool) -> dict[str, Any]:
    return asdict(run(profiled))


def measure_speed(settings: Settings, until: float, kept: Kept) -> tuple[list[Row], list[str]]:
    """All cases, interleaved, the first time under the profiler too; and what was left out or failed. Nothing begins
    after ``until`` (monotonic)."""
    listed, findings = cases(settings), []
    samples: list[list[Steps]] = [[] for _ in listed]
    failed: set[int] = set()
    for number in range(settings.rounds):
        for index, (name, system, _, run) in enumerate(listed):
            if index in failed:
                continue
            if time.monotonic() > until:
                findings.append(f"Round {number + 1} ended before {name}, {system}: --minutes {settings.minutes:g}.")
                break
            try:
                taken = kept.value(f"{name}, {system}, round {number + 1}", partial(_taken, run, number == 0))
            except Exception as error:  # the others are worth having
                failed.add(index)
                findings.append(_failed(f"{name}, {system}", error))
                continue
            steps = Steps(**taken)
            print(f"{name}, {system}: {1e3 * steps.seconds:.1f} ms/step", file=sys.stderr, flush=True)
            samples[index].append(steps)
        else:
            continue
        break
    rows: list[Row] = []
    for (name, system, modules, _), timed in zip(listed, samples, strict=True):
        if not timed:
            continue
        times = [1e3 * steps.seconds for steps in timed]
        peaks = [steps.peak for steps in timed if steps.peak is not None]
        rows.append({
            "network": name, "system": system, "modules": modules, "ms_per_step": statistics.median(times),
            "low": min(times), "high": max(times), "peak_mib": max(peaks) / 2**20 if peaks else None,
            "kernels": timed[0].kernels, "busy": timed[0].busy,
        })  # fmt: skip
    for row in rows:
        bases = [other for other in rows if (other["network"], other["system"]) == (row["network"], BP[0])]
        row["ratio_to_bp"] = row["ms_per_step"] / bases[0]["ms_per_step"] if bases else None
        row["peak_ratio"] = row["peak_mib"] / bases[0]["peak_mib"] if bases and row["peak_mib"] is not None else None
    return rows, findings


def gradient_difference(device: str, chosen: Sequence[str]) -> float:
    """Largest difference of a weight after one step on ``device`` and on the CPU, to its largest update."""
    workload, ended = WORKLOADS["resnet32"], {}
    images, labels = random_images(8)
    for where in ("cpu", device):
        model = network("resnet32")
        before = [parameter.detach().clone() for parameter in model.parameters()]
        run = [*RUN, *workload.cut, *chosen, "data.batch_size=8", f"runtime.device={where}", "precision.compute=fp32"]
        config = load_config("cifar10-resnet32-bp", assignments=["model.name=resnet32", *run])
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            train(config, network=model, data=LoaderData([(images, labels)], [(images[:2], labels[:2])]),
                  run_dir=Path(folder) / "run", quiet=True)  # fmt: skip
        ended[where] = [after.detach().cpu() - start for after, start in zip(model.parameters(), before, strict=True)]
    pairs: list[tuple[Tensor, Tensor]] = list(zip(ended["cpu"], ended[device], strict=True))
    return max(float((one - other).abs().max() / one.abs().max().clamp(min=1e-12)) for one, other in pairs)


def run_job(ranks: int, device: str, steps: int) -> float:
    """Images/s of the default job on so many ranks.

    Raises:
        LocalpipeError: it failed.
        TimeoutExpired: it took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        changed = [f"runtime.device={device}", f"train.max_steps={steps}"]
        command = [sys.executable, str(ROOT / "launch/train.py"), f"--nproc={ranks}", "--run-dir", f"{folder}/run",
                   *(part for assignment in changed for part in ("--set", assignment))]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=JOB_S)
        if done.returncode:
            raise LocalpipeError(f"{ranks} ranks on {device}: {(done.stderr or done.stdout).strip()[-500:]}")
        return float(read_metrics(Path(folder) / "run/metrics.jsonl")[-1]["images_per_s"])


def run_tests() -> str:
    """The last line of ``pytest -m gpu``. Raises TimeoutExpired."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_S)
    return done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else done.stderr.strip()[-200:]


def _failed(what: str, error: Exception) -> str:
    return f"{what}: failed ({' '.join(str(error).split())[:200]})."


def measure(settings: Settings) -> Report:
    """The parts, the quick ones first."""
    until = time.monotonic() + 60 * settings.minutes
    cuda = settings.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise LocalpipeError("--device cuda: torch finds no GPU here; --device cpu runs what has a meaning without one")
    path = Path(settings.keep) if settings.keep else None
    check_files(keep=path)
    kept = Kept(path,
                {"where": hardware(settings.device), "torch": torch.__version__, "version": __version__,
                 "steps": settings.steps, "batch": settings.batch, "quick": settings.quick})  # fmt: skip
    findings, targets = [], []

    def tried(what: str, work: Callable[[], Any]) -> Any:
        """None where it fails, which is said."""
        try:
            return kept.value(what, work)
        except Exception as error:
            findings.append(_failed(what, error))
            return None

    if "tests" in settings.parts and (said := tried("Tests", run_tests)):
        findings.append(f"Tests: {said}")
    if "gradients" in settings.parts:
        some = dict(list(LEARNING.items())[:: 3 if settings.quick else 1])
        found = {name: tried(f"Gradients of {name}", partial(gradient_difference, settings.device, chosen))
                 for name, chosen in some.items()}  # fmt: skip
        worst = {name: value for name, value in found.items() if value is not None}
        targets.append(Target("difference of updates to the CPU's in fp32", worst, most=1e-2))
    if "ranks" in settings.parts:
        for ranks, device in ((1, "cuda"), (4, "cuda-shared")) if cuda else ((2, "cpu"),):
            job = f"Default job, {ranks} ranks, runtime.device={device}"
            rate = tried(job, partial(run_job, ranks, device, 8 if settings.quick else 50))
            if rate is not None:
                findings.append(f"{job}: {rate:.0f} images/s.")
    rows, left_out = measure_speed(settings, until, kept) if "speed" in settings.parts else ([], [])
    findings += left_out
    aim = [row for row in rows if row["network"] == "resnet32" and row["system"].startswith("DGL + HPFF")]
    ours = min(aim, key=lambda row: row["ms_per_step"]) if cuda and aim else {}
    for text, key, bounds in (
        ("step of DGL + HPFF to BP's", "ratio_to_bp", {"most": STEP}),
        ("peak memory of DGL + HPFF to BP's", "peak_ratio", {"most": MEMORY}),
        ("share of the time in which the GPU computes", "busy", {"least": BUSY}),
    ):
        known = {f"resnet32, {ours['system']}": ours[key]} if ours and ours[key] is not None else {}
        targets.append(Target(text, known, **bounds))
    about = (
        "bf16, channels last, one GPU, one process. Step and memory: medians, and the largest, of "
        f"{settings.rounds} interleaved rounds of {settings.steps} steps after some to warm up; kernels and GPU busy: "
        "as many steps again under torch.profiler, time of all kernels to the time of a step without it."
    )
    return Report("One GPU", [Table(COLUMNS, rows)], [about], targets, findings)


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={
        "rounds": 1, "steps": 1, "batch": 4, "network": ("resnet32",), "parts": ("gradients", "speed"),
        "quick": True,
    })  # fmt: skip
