"""A GPU that is none: tensors that say that they are on "cuda" and compute on the CPU, with streams of clocks.

    module.to("cuda:0"), torch.zeros(n, device="cuda:0")     a tensor of the CPU, of the type OnDevice
    an operation on some of these                            done at once; noted on the stream of the calling thread
    one with a tensor of the host among them                 refused, as CUDA does (numbers and copies aside)
    a copy to the host, .item(), float(t), bool(t)           noted as a wait of the host, unless both sides allow none
    a transfer or sum of a group of "spinning" (for NCCL)    noted on a stream of the group, in the ranks' own time
operations within a capture                              recorded, and done again on the same memory by each replay

So the package takes its way for CUDA from the choice of the device to the last checkpoint, with real numbers, and can
be compared to the bit. Autocast is that of the CPU. What it does not see: kernels that only a GPU has, operations that
autocast treats otherwise there, the streams that autograd chooses for a backward, and what C++ does by itself.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import helpers_clocks as clocks
import helpers_spinning as spinning
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
READING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
READING |= {"unique_consecutive", "bincount", "repeat_interleave"}
"""Operations that end only when the host has a number: often the size of what they give."""
COPIES = {"_to_copy", "copy_"}


class OnDevice(torch.Tensor):
    """Is on the device, as far as anybody asks."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    data = property(lambda self: _data_of(self), torch.Tensor.data.__set__)  # type: ignore[attr-defined, assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _device.dispatch(func, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """C++ takes it for a tensor of the CPU, and would return it as it is."""
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return self._copied(dtype=dtype, non_blocking=non_blocking, memory_format=layout)
        layout = layout or torch.preserve_format
        return super().to(dtype=dtype or self.dtype, copy=copy, memory_format=layout)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._copied()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of cuda:0 to numpy")

    def tolist(self) -> Any:
        return self._copied().tolist()

    def record_stream(self, stream: Any) -> None:
        with _device._lock:
            _device._of(self).lent.add(stream.name)

    def _copied(self, **options: Any) -> torch.Tensor:
        _here.leaves = True
        given = {name: value for name, value in options.items() if value is not None}
        copied: torch.Tensor = torch.ops.aten._to_copy.default(self, **given)
        return copied


def _data_of(tensor: OnDevice) -> torch.Tensor:
    """The same memory, with a version counter of its own."""
    with torch._C._DisableTorchDispatch():
        alone = tensor.as_subclass(torch.Tensor).data
    return _on_device(alone)


_here = threading.local()


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation would load all of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _device.dispatch(func, args, kwargs or {})


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of the CPU that a tensor of the device is."""
    with torch._C._DisableTorchDispatch():
        return tensor.as_subclass(torch.Tensor) if isinstance(tensor, OnDevice) else tensor


class _Memory:
    """What is known of a storage."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.alive = StorageWeakRef(storage)
        self.uses = clocks.Uses()
        self.home = clocks.current_stream()  # whose memory it is, where it is on the device
        self.elsewhere: dict[str, int] = {}  # streams that have used it besides, and when
        self.lent: set[str] = set()  # streams that record_stream has named
        self.on_device = False


class Device:
    """
    Attributes:
        races: pairs of uses of one buffer that nothing orders.
        waits: how often the host has waited for the device, by the function of the package that did.
        waits_in_step: the same within a training step.
        events_awaited: events that the host has waited for within a training step, likewise.
        copies: copies between host and device, by how they went.
        replays: of graphs.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.waits: Counter[str] = Counter()
        self.waits_in_step: Counter[str] = Counter()
        self.events_awaited: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.replays = 0
        self._memory: dict[int, _Memory] = {}
        self._travelled: list[_Memory] = []  # used on another stream than its own
        self._pinned: dict[int, StorageWeakRef] = {}
        self._lock = threading.RLock()

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do an operation, and note it."""
        name = func.name().partition("::")[2].partition(".")[0]
        tensors = _tensors((*args, *kwargs.values()))
        if name == "is_pinned":
            return self._is_pinned(tensors[0])
        target = kwargs.get("device")
        kwargs = {**kwargs, "device": torch.device("cpu")} if target is not None else dict(kwargs)
        pinned = bool(kwargs.pop("pin_memory", False)) or name == "_pin_memory"
        # Where C++ names a device, it is the CPU on which all of this happens.
        to_device = not pinned and any(isinstance(t, OnDevice) for t in tensors)
        to_device = to_device or (target is not None and target.type == "cuda")
        to_device = to_device or (target is not None and torch._C._current_graph_task_id() >= 0)  # of a backward
        if name == "_to_copy" and getattr(_here, "leaves", False):
            to_device = _here.leaves = False
        copies = name in COPIES
        if not copies and any(isinstance(t, OnDevice) for t in tensors) and not func.name().startswith("c10d"):
            self._refuse_strangers(name, tensors)
        graph = getattr(_here, "graph", None)
        if graph is not None:
            graph.before(func, name, args, kwargs)
        with torch._C._DisableTorchDispatch():
            out = torch.clone(args[0]) if name == "_pin_memory" else func(*args, **kwargs)
        if to_device and not (name == "copy_" and not isinstance(args[0], OnDevice)):
            out = _on_device(out)
        if pinned:
            self._pinned[_key(out)] = StorageWeakRef(out.untyped_storage())
        if graph is not None:
            graph.recorded(func, name, args, kwargs, out)
            return out
        self.done(func, name, args, kwargs, out)
        return out

    def done(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """An operation is done: note it."""
        with self._lock:
            if name in COPIES:
                self._copy(name, args, kwargs, out)
            else:
                self._note(func, name, args, kwargs, out)

    # --- what is refused --------------------------------------------------------------------------------------

    def _refuse_strangers(self, name: str, tensors: list[torch.Tensor]) -> None:
        strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
        if strangers:
            shapes = ", ".join(str(tuple(t.shape)) for t in strangers)
            raise RuntimeError(f"{name}: expected all tensors to be on {CUDA}, found {shapes} on the host")

    # --- what is noted ----------------------------------------------------------------------------------------

    def _note(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        written, read = _written_and_read(func, args, kwargs)
        results = _tensors((out,))
        if not any(isinstance(t, OnDevice) for t in (*written, *read, *results)):
            self._on_host(name, written, read)
            return
        views = {_key(t) for t in (*read, *written)}
        written += [t for t in results if _key(t) not in views]
        if func.is_view and all(_key(t) in views for t in results):
            return  # nothing is read
        if name.startswith(("empty", "new_empty")):
            written = []  # only made
            for tensor in results:
                self._of(tensor)
        self.launched(name, written, read)
        if name in READING or (name in ("index", "index_put_") and _by_mask(args)):
            self._waited()

    def _copy(self, name: str, args: Any, kwargs: dict[str, Any], out: torch.Tensor) -> None:
        target, source = (args[0], args[1]) if name == "copy_" else (out, args[0])
        sides = isinstance(source, OnDevice), isinstance(target, OnDevice)
        if sides == (False, False):
            self._on_host(name, [target], [source])
            return
        self.launched(name, [target], [source])
        if sides == (True, True):
            return
        host = target if sides[0] else source
        if host.dim() == 0 and not sides[0] and not isinstance(host, OnDevice):
            self.copies["a number to the device"] += 1
            return  # passed with the launch
        way = "to the host" if sides[0] else "to the device"
        free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if free and self._is_pinned(host):
            self.copies[f"{way}, beside"] += 1
        else:
            self.copies[f"{way}, waited for"] += 1
            self._waited()

    def launched(self, what: str, written: list[torch.Tensor], read: list[torch.Tensor]) -> None:
        """The calling thread has launched something on its current stream."""
        stream = clocks.current_stream()
        stream.launch()
        for tensor, writes in (*((t, False) for t in read), *((t, True) for t in written)):
            memory = self._of(tensor)
            memory.on_device = memory.on_device or isinstance(tensor, OnDevice)
            self._add(memory, stream.name, stream.ticks, stream.after, writes, what)
            if memory.on_device and stream is not memory.home:
                if not memory.elsewhere:
                    self._travelled.append(memory)
                memory.elsewhere[stream.name] = stream.ticks

    def _on_host(self, what: str, written: list[torch.Tensor], read: list[torch.Tensor]) -> None:
        for tensor, writes in (*((t, False) for t in read), *((t, True) for t in written)):
            if _key(tensor) in self._memory:  # else no stream has ever touched it
                thread = clocks.this_thread()
                clock = thread.tick()
                self._add(self._of(tensor), thread.name, clock[thread.name], clock, writes, what)

    def on_host(self, what: str, tensor: torch.Tensor, writes: bool) -> None:
        """The calling thread, or one that works for it, has used memory of the host."""
        with self._lock:
            self._on_host(what, [tensor] if writes else [], [] if writes else [tensor])

    def _add(self, memory: _Memory, who: str, tick: int, after: clocks.Clock, writes: bool, what: str) -> None:
        wrong = memory.uses.add(who, tick, after, writes, what)
        if wrong is not None:
            self.races.append(f"{wrong}; in {', '.join(_functions()[:2])}")

    def _waited(self) -> None:
        clocks.current_stream().synchronize()
        functions = _functions()
        self.waits[functions[0]] += 1
        if _in_step(functions):
            self.waits_in_step[functions[0]] += 1

    def awaited(self) -> None:
        """The host waits for an event."""
        functions = _functions()
        if _in_step(functions):
            self.events_awaited[functions[0]] += 1

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        known = self._pinned.get(_key(tensor))
        return known is not None and not known.expired()

    def _of(self, tensor: torch.Tensor) -> _Memory:
        key = _key(tensor)
        memory = self._memory.get(key)
        if memory is None or memory.alive.expired():
            self.look_at_freed()
            memory = self._memory[key] = _Memory(bare(tensor).untyped_storage())
        return memory

    def look_at_freed(self) -> None:
        """Memory that is free belongs to the stream that it was made on, which may fill it at once: other streams must
        be through with it, or have been named to the allocator."""
        for memory in [each for each in self._travelled if each.alive.expired()]:
            self._travelled.remove(memory)
            next_owner = clocks.joined(memory.home.clock, clocks.this_thread().clock)
            for name, tick in memory.elsewhere.items():
                if name not in memory.lent and next_owner.get(name, 0) < tick:
                    self.races.append(f"memory of the {memory.home.name} is free while the {name} uses it")


_device = Device()


def _on_device(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_device, value))
    if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice):
        return value
    with torch._C._DisableTorchDispatch():
        return torch.Tensor._make_subclass(OnDevice, value)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


@functools.cache
def _writes(func: Any) -> tuple[tuple[str, bool], ...]:
    """The arguments of an operation, and whether it writes them."""
    arguments = func._schema.arguments
    return tuple((a.name, a.alias_info is not None and a.alias_info.is_write) for a in arguments)


def _written_and_read(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    written: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    for number, (name, writes) in enumerate(_writes(func)):
        value = args[number] if number < len(args) else kwargs.get(name)
        if value is not None:
            (written if writes else read).extend(_tensors((value,)))
    return written, read


def _by_mask(args: Any) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1]))


def _functions() -> list[str]:
    """Those of the package that are at work in this thread, the innermost first."""
    found = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "/pipeline/" in code.co_filename and not code.co_name.startswith("<"):
            found.append(str(getattr(code, "co_qualname", code.co_name)))
        frame = frame.f_back
    return found or ["the test"]


def _in_step(functions: list[str]) -> bool:
    return any(name.endswith("train_step") for name in functions)


class Graph:
    """Stands in for ``torch.cuda.CUDAGraph``: what is launched in a capture changes nothing until it is replayed.

    Each replay does the operations again on the memory that they had. What only they hold is of no value afterwards, as
    the memory of a pool that other graphs use as well.
    """

    def __init__(self) -> None:
        self._operations: list[tuple[Any, str, Any, dict[str, Any], Any]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []  # memory of others, and what was in it
        self._own: set[int] = set()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert clocks.current_stream() is not clocks.DEFAULT and capture_error_mode == "thread_local"
        _here.graph = self
        self._random = torch.get_rng_state()  # draws of a capture are none

    def capture_end(self) -> None:
        _here.graph = None
        torch.set_rng_state(self._random)
        with _beneath():
            for tensor, value in reversed(self._before):
                tensor.copy_(value)
        self._before.clear()

    def before(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """An operation comes."""
        host = [t for t in _tensors((*args, *kwargs.values())) if not isinstance(t, OnDevice) and t.dim() > 0]
        if name in READING or (name in ("index", "index_put_") and _by_mask(args)) or (host and name != "is_pinned"):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for tensor in _written(func, name, args, kwargs):
            if _key(tensor) not in self._own:
                with _beneath():
                    self._before.append((tensor, tensor.clone()))

    def recorded(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """It has come."""
        if any(not isinstance(t, OnDevice) and t.dim() > 0 and t.numel() > 0 for t in _tensors((out,))):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        theirs = {_key(t) for t in _tensors((*args, *kwargs.values()))}
        self._own |= {_key(t) for t in _tensors((out,))} - theirs
        self._operations.append((func, name, args, kwargs, out))

    def replay(self) -> None:
        for func, name, args, kwargs, out in self._operations:
            if not func.is_view and not name.startswith(("empty", "new_empty")):
                with _beneath():
                    for kept, value in zip(_tensors((out,)), _tensors((func(*args, **kwargs),)), strict=True):
                        if _key(kept) != _key(value):
                            kept.copy_(value)
                _device.done(func, name, args, kwargs, out)
        _device.replays += 1


@contextmanager
def _beneath() -> Iterator[None]:
    """Inside, autograd sees nothing, version counters included: a graph is launched without it."""
    unseen = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with (
        torch._C._DisableTorchDispatch(),
        torch._C._AutoDispatchBelowAutograd(),
        torch._C._ExcludeDispatchKeyGuard(unseen),
    ):
        yield


def _written(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What an operation writes, also where its schema does not say so."""
    written, _ = _written_and_read(func, args, kwargs)
    if "batch_norm" in name and "backward" not in name:
        written = [*written, *_tensors(args[3:5])]
    return written


class _Event(clocks.Event):
    def synchronize(self) -> None:
        _device.awaited()
        super().synchronize()


class _Transfer:
    """A ``Work`` of either kind of group, by which the calling thread learns what is over."""

    def __init__(self, work: dist.Work, tensor: torch.Tensor, arrives: bool, stream: clocks.Stream | None) -> None:
        self._work, self._tensor, self._arrives, self._stream = work, tensor, arrives, stream

    def is_completed(self) -> bool:
        done = self._work.is_completed()
        if done and self._stream is not None:
            clocks.this_thread().follow(self._stream.clock)
        return done

    def wait(self, *timeout: Any) -> bool:
        done = self._work.wait(*timeout)
        if self._stream is not None:
            clocks.current_stream().wait_stream(self._stream)
        else:
            _device.on_host("gloo", self._tensor, self._arrives)
        return done


_streams: dict[Any, clocks.Stream] = {}


def _transfers(real: Any, arrives: bool) -> Any:
    def transfer(tensor: torch.Tensor, peer: int, group: Any = None) -> _Transfer:
        if not isinstance(tensor, OnDevice):
            _device.on_host("gloo", tensor, arrives)
            return _Transfer(real(tensor, peer, group=group), tensor, arrives, None)
        stream = _streams.setdefault(group, clocks.Stream(name="stream of NCCL"))
        stream.wait_stream(clocks.current_stream())
        work = real(bare(tensor), peer, group=group)
        with _device._lock, clocks.on_stream(stream):
            _device.launched("transfer", [tensor] if arrives else [], [] if arrives else [tensor])
        return _Transfer(work, tensor, arrives, stream)

    return transfer


def _collective(real: Any) -> Any:
    """Of NCCL's stand-in: in place, on the stream of the group."""

    def begun(group: Any, tensors: list[torch.Tensor], options: Any) -> _Transfer:
        stream = _streams.setdefault(group, clocks.Stream(name="stream of NCCL"))
        stream.wait_stream(clocks.current_stream())
        work = real(group, list(map(bare, tensors)), options)
        with _device._lock, clocks.on_stream(stream):
            _device.launched("sum", list(tensors), [])
        return _Transfer(work, tensors[0], True, stream)

    return begun


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(device_type.replace("cuda", "cpu"), *args, **kwargs)


def _as_on_the_cpu(function: Any) -> Any:
    return lambda device_type: function(device_type.replace("cuda", "cpu"))


def _one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """PyTorch's own names the CPU to the constant that it makes, and on a GPU it would be there."""
    return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).long()


@contextmanager
def pretended() -> Iterator[Device]:
    """Inside, there is a device ``cuda:0``, a new one; threads that begin inside see it as well."""
    global _device
    _device = Device()
    spinning.register()
    cuda: dict[str, Any] = {
        "Stream": clocks.Stream,
        "Event": _Event,
        "stream": clocks.on_stream,
        "current_stream": clocks.current_stream,
        "default_stream": lambda device=None: clocks.DEFAULT,
        "set_device": lambda device: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (8, 0),
        "max_memory_allocated": lambda device=None: 0,
        "default_generators": (torch.Generator(),),
        "CUDAGraph": Graph,
        "graph_pool_handle": object,
    }
    with ExitStack() as patches:
        for name, value in cuda.items():
            patches.enter_context(patch.object(torch.cuda, name, value))
        patches.enter_context(patch.object(torch.nn.functional, "one_hot", _one_hot))
        patches.enter_context(patch.object(torch, "autocast", _Autocast))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            patches.enter_context(patch.object(torch, name, _as_on_the_cpu(getattr(torch, name))))
        for name, arrives in (("isend", False), ("irecv", True)):
            patches.enter_context(patch.object(dist, name, _transfers(getattr(dist, name), arrives)))
        for name in ("allreduce_coalesced", "broadcast"):
            noted = _collective(getattr(spinning.SpinningGroup, name))
            patches.enter_context(patch.object(spinning.SpinningGroup, name, noted))
        # A parameter that moves to the device becomes another object there, of another type.
        alike = torch._has_compatible_shallow_copy_type

        def stays(input: torch.Tensor, from_: torch.Tensor) -> bool:
            return isinstance(input, OnDevice) == isinstance(from_, OnDevice) and alike(input, from_)

        patches.enter_context(patch.object(torch, "_has_compatible_shallow_copy_type", stays))
        patches.enter_context(clocks.followed_threads(_Mode))
        patches.enter_context(_Mode())
        yield _device
        with _device._lock:
            _device.look_at_freed()
