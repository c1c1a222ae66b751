"""Runs Gluon kernels for Hopper on a CPU, for what their partitions say to each other: Gluon has no interpreter.

The partitions of `warp_specialize` are threads of which one runs at a time. At every barrier, copy and product the next
to run is drawn at random, from a seed: a schedule can be run again, and nothing takes time. What is asynchronous on the
part happens at some later turn:

- A bulk copy to shared memory fills its buffer with NaN when it is issued, and its block arrives when its turn comes.
  Beyond the ends of a tensor it reads zeros and writes nothing.
- A bulk copy from shared memory, or a reduction from there, reads its buffer when its turn comes, at the latest where
  it is waited for.
- A product reads its operands as soon as it is issued, or where it is waited for (`late`): both are legal.
- Until they are waited for, what they read must not be written, nor given back: a barrier that a partition waits for
  before it fills a buffer stands for that buffer, and who arrives there does not read it until it is full again.
- A barrier has a phase, arrivals and bytes that it waits for; too many of either are an error, and so is a deadlock.
- What ordinary stores wrote to shared memory must be fenced before a copy or a product reads it.

Arithmetic is torch's, in the dtypes of the kernel. Of layouts and registers the emulator knows nothing.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from flash_attend.kernels.descriptors import ALIGNMENT
from flash_attend.kernels.hopper import versions
from flash_attend.kernels.launch import Launch

__all__ = ["EmulationError", "Mistake", "bound", "emulate"]

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64")}
TAKE_ANOTHER = 0.3  # how often the turn passes to another, though the last one could go on: some run far ahead


# Functions and methods ("Class.method") by name, each with what makes another one of it, to be called in its place.
# Beside a method that is replaced the right one is there too, as `right_method`.
Mistake = Mapping[str, Callable[[Any], Any]]
NO_MISTAKE: Mistake = {}
Extent = tuple[int, int]  # bytes, from the first to one past the last


class EmulationError(Exception):
    """The kernel did what on the part would hang or be undefined."""


class _Stopped(BaseException):
    """Ends a partition after another one has failed."""


# ---------------------------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Partition:
    """A thread, what it waits for, and what it has under way."""

    index: int
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: Callable[[], bool] = lambda: True
    done: bool = False
    error: BaseException | None = None
    products: list[_Product] = field(default_factory=list)
    stores: list[Callable[[], None]] = field(default_factory=list)  # bulk copies out of shared memory, not yet made
    sources: list[Extent] = field(default_factory=list)  # of bulk copies that have not been waited for
    awaited: _Barrier | None = None  # the last one
    given_back: set[Extent] = field(default_factory=set)
    unfenced: list[Tensor] = field(default_factory=list)  # what ordinary stores have written since the last fence


class _Schedule:
    """Gives one partition at a time its turn."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.partitions: list[_Partition] = []
        self.copies: list[Callable[[], None]] = []  # bulk copies into shared memory, under way
        self.back = threading.Semaphore(0)
        self.local = threading.local()
        self.local.partition = _Partition(-1)  # the program, before it is specialized
        self.stopping = False

    @property
    def own(self) -> _Partition:
        return self.local.partition

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Ends the turn of the partition that runs; its next one comes when `until` holds."""
        partition = self.own
        partition.ready = until
        self.back.release()
        partition.turn.acquire()
        if self.stopping:
            raise _Stopped

    def run(self, functions: Sequence[tuple[Callable[..., None], tuple]]) -> None:
        """Runs the partitions, each a thread that is called as its function is."""
        self.partitions = [_Partition(index) for index in range(len(functions))]
        threads = [
            threading.Thread(target=self._partition, args=(partition, *function), name=function[0].__name__)
            for partition, function in zip(self.partitions, functions, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            self._take_turns()
        finally:
            self.stopping = True
            for partition, thread in zip(self.partitions, threads, strict=True):
                if not partition.done:
                    partition.turn.release()
                thread.join()

    def _partition(self, partition: _Partition, function: Callable[..., None], arguments: tuple) -> None:
        self.local.partition = partition
        partition.turn.acquire()
        try:
            if not self.stopping:
                function(*arguments)
        except _Stopped:
            pass
        except BaseException as error:
            partition.error = error
        partition.done = True
        self.back.release()

    def _take_turns(self) -> None:
        favourite = None
        while not all(partition.done for partition in self.partitions):
            ready = [partition for partition in self.partitions if not partition.done and partition.ready()]
            storing = [partition for partition in self.partitions if partition.stores]
            events = [*ready, *(("copy", n) for n in range(len(self.copies))), *(("store", p) for p in storing)]
            if not events:
                waiting = [partition.index for partition in self.partitions if not partition.done]
                raise EmulationError(f"deadlock: partitions {waiting} wait for each other")
            if favourite not in events or self.random.random() < TAKE_ANOTHER:
                favourite = self.random.choice(events)
            if isinstance(favourite, _Partition):
                favourite.turn.release()
                self.back.acquire()
                if favourite.error is not None:
                    raise favourite.error
            else:
                kind, which = favourite
                self.copies.pop(which)() if kind == "copy" else which.stores.pop(0)()


# ---------------------------------------------------------------------------------------------------------------------
# What kernels use
# ---------------------------------------------------------------------------------------------------------------------


class _Product:
    """An asynchronous product: what it will be, once it has been made, and what it reads until then."""

    def __init__(self, make: Callable[[], Tensor], sources: list[Extent]) -> None:
        self.make, self.sources = make, sources
        self.value: Tensor | None = None

    def finish(self) -> None:
        if self.value is None:
            self.value = self.make()


class _Barrier:
    """Arrivals and bytes that are still missing, and the parity of the phase that waits for them."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.guarded: set[Extent] = set()  # what is filled when it has been waited for
        self.brought: set[Extent] = set()  # what is full when it has been waited for

    def arrive(self, arrivals: int = 0, expected: int = 0, arrived: int = 0) -> None:
        self.bytes += expected - arrived
        self.pending -= arrivals
        if self.pending < 0:
            raise EmulationError("more arrivals at a barrier than it counts")
        if self.bytes < 0:
            raise EmulationError("more bytes at a barrier than it expects")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class _Barriers:
    """An array of barriers in shared memory."""

    def __init__(self, count: int) -> None:
        self.barriers = [_Barrier() for _ in range(count)]

    def index(self, index: int | Tensor) -> _Barrier:
        return self.barriers[int(index)]


class _Shared:
    """Shared memory, or a view of it."""

    def __init__(self, machine: _Machine, data: Tensor) -> None:
        self.machine, self.data = machine, data
        self.dtype, self.shape = data.dtype, tuple(data.shape)

    def _view(self, data: Tensor) -> _Shared:
        return _Shared(self.machine, data)

    def index(self, index: int | Tensor) -> _Shared:
        return self._view(self.data[int(index)])

    def slice(self, start: int | Tensor, length: int, dim: int = 0) -> _Shared:
        return self._view(self.data.narrow(dim, int(start), length))

    def permute(self, order: Sequence[int]) -> _Shared:
        return self._view(self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> _Shared:
        return self._view(self.data.view(*shape))

    def load(self, layout: None) -> Tensor:
        self.machine.check_held([_extent(self.data)])
        self.machine.schedule.pause()
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype, f"{value.dtype} is stored as {self.dtype}"
        self.machine.check_unread(self)
        self.data.copy_(value)
        self.machine.schedule.own.unfenced.append(self.data)
        self.machine.schedule.pause()


class _Descriptor:
    """A tensor in global memory, of which blocks are copied."""

    def __init__(self, described: TensorDescriptor) -> None:
        self.data = described.base.as_strided(described.shape, described.strides)
        self.dtype = self.data.dtype
        size = prod(described.block_shape)
        self.block_type = SimpleNamespace(shape=described.block_shape, nbytes=size * self.dtype.itemsize)

    def block(self, coordinates: Sequence[int | Tensor]) -> tuple[Tensor, tuple[slice, ...]]:
        """That part of a block which is inside the tensor, and where in the block that is."""
        starts = [int(start) for start in coordinates]
        assert min(starts) >= 0
        if starts[-1] * self.dtype.itemsize % ALIGNMENT:
            raise EmulationError(f"a copy begins at {starts[-1]} of {self.dtype}, which is no multiple of 16 bytes")
        sizes = [
            min(max(size - start, 0), length)
            for size, start, length in zip(self.data.shape, starts, self.block_type.shape, strict=True)
        ]
        outer = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        return self.data[outer], tuple(slice(0, size) for size in sizes)


@dataclass(frozen=True)
class _Pointer:
    """An address, or a tensor of addresses, in one tensor."""

    data: Tensor  # flat
    offset: int | Tensor = 0

    def __add__(self, offset: int | Tensor) -> _Pointer:
        return _Pointer(self.data, self.offset + offset)

    def at(self, mask: Tensor | bool | None) -> tuple[Tensor, Tensor]:
        """Indices and which of them count. They must be inside, unless they do not count."""
        index = torch.as_tensor(self.offset)
        counts = torch.ones_like(index, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(index)
        inside = (index >= 0) & (index < self.data.numel())
        if not (inside | ~counts).all():
            raise EmulationError("an access outside of a tensor")
        return torch.where(counts, index, 0), counts


class _Machine:
    """One program of a grid, and the names that its kernel uses."""

    def __init__(self, program: int, programs: int, seed: int, late: bool) -> None:
        self.schedule = _Schedule(seed)
        self.late = late
        shared = dict(
            load=self._load,
            cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
            arange=lambda start, end, layout=None: torch.arange(start, end),
            max=lambda x, axis: x.amax(axis),
            min=lambda x, axis: x.amin(axis),
            sum=lambda x, axis: x.sum(axis),
            program_id=lambda axis: torch.tensor(program),
            num_programs=lambda axis: programs,
            math=SimpleNamespace(exp2=torch.exp2, log2=torch.log2),
            **DTYPES,
        )
        no_layout = _NoLayout()
        self.gl = SimpleNamespace(
            **shared,
            store=self._store,
            atomic_add=self._atomic_add,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            full_like=torch.full_like,
            convert_layout=lambda x, layout: x,
            static_range=range,
            static_assert=self._static_assert,
            allocate_shared_memory=self._allocate,
            warp_specialize=self._warp_specialize,
            **{name: no_layout for name in LAYOUTS},
        )
        mbarrier = SimpleNamespace(
            MBarrierLayout=no_layout, init=self._init, expect=self._expect, arrive=self._arrive, wait=self._wait
        )
        self.replaced = [
            (gl, self.gl),
            (tl, SimpleNamespace(**shared)),
            (hopper.mbarrier, mbarrier),
            (hopper.tma, SimpleNamespace(store_wait=self._store_wait)),
            (hopper.fence_async_shared, self._fence),
            (hopper.warpgroup_mma, self._product),
            (hopper.warpgroup_mma_wait, self._product_wait),
            (versions.load_tile, self._copy_in),
            (versions.store_tile, self._copy_out),
            (versions.reduce_tile, self._reduce_out),
        ]

    def bind(self, kernel: Any, instead: Mistake) -> Callable[..., None]:
        """A kernel as a Python function whose global names mean what they do on this machine. Aggregates are classes
        there."""
        bound: dict[int, Any] = {}

        def right(value: Any) -> Any:
            for ours, theirs in self.replaced:
                if value is ours:
                    return theirs
            if isinstance(value, gl.constexpr):
                return value.value
            if getattr(value, "__triton_aggregate__", False):
                return class_of(value)
            value = getattr(value, "fn", value)  # of a jitted one
            return rebind(value) if isinstance(value, FunctionType) else value

        def translate(name: str, value: Any) -> Any:
            return instead.get(name, lambda right: right)(right(value))

        def class_of(aggregate: Any) -> type:
            if id(aggregate) not in bound:
                bound[id(aggregate)] = plain = type(aggregate.__name__, (_Aggregate,), {})
                plain.fields = tuple(inspect.getclosurevars(aggregate.hash_attrs[0]).nonlocals["fields"])
                for name, member in vars(aggregate).items():
                    if isinstance(member, JITFunction):
                        setattr(plain, f"right_{name}", rebind(member.fn))
                        setattr(plain, name, translate(f"{plain.__name__}.{name}", member))
            return bound[id(aggregate)]

        def rebind(function: FunctionType) -> Callable:
            if id(function) not in bound:
                namespace = {"__builtins__": __builtins__}
                bound[id(function)] = FunctionType(
                    function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
                )
                for name in function.__code__.co_names:
                    if name in function.__globals__:
                        namespace[name] = translate(name, function.__globals__[name])
            return bound[id(function)]

        return rebind(kernel.fn)

    # Memory.

    def _allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: None) -> _Shared | _Barriers:
        if dtype == torch.int64:
            return _Barriers(shape[0])
        return _Shared(self, torch.full(shape, torch.nan, dtype=dtype))

    def _load(self, pointer: _Pointer, mask: Tensor | None = None, other: float = 0) -> Tensor:
        index, counts = pointer.at(mask)
        return torch.where(counts, pointer.data[index], other)

    def _store(self, pointer: _Pointer, value: Tensor, mask: Tensor | None = None) -> None:
        index, counts = pointer.at(mask)
        pointer.data[index[counts]] = value[counts]

    def _atomic_add(self, pointer: _Pointer, value: Tensor, mask: Tensor, sem: str) -> None:
        index, counts = pointer.at(mask)
        pointer.data.index_add_(0, index[counts], value[counts])

    def _fence(self) -> None:
        self.schedule.own.unfenced.clear()

    def _read_by_copies_and_products(self, shared: _Shared) -> Tensor:
        unfenced = [_extent(written) for partition in self.schedule.partitions for written in partition.unfenced]
        if _overlap([_extent(shared.data)], unfenced):
            raise EmulationError("a copy or a product reads what was stored and not fenced")
        return shared.data

    def check_unread(self, shared: _Shared) -> None:
        """Nothing that is under way reads what is about to be written."""
        for partition in self.schedule.partitions:
            products = [source for product in partition.products for source in product.sources]
            if _overlap([_extent(shared.data)], [*products, *partition.sources]):
                raise EmulationError("what a copy or a product reads is overwritten")

    def check_held(self, sources: Collection[Extent]) -> None:
        """The partition that runs has not given back what it is about to read."""
        if _overlap(self.schedule.own.given_back, sources):
            raise EmulationError("what has been given back is read")

    def _copy_in(self, descriptor: _Descriptor, coordinates: Sequence[int], barrier: _Barrier, shared: _Shared) -> None:
        assert shared.shape == tuple(descriptor.block_type.shape)
        block, where = descriptor.block(coordinates)
        self.check_unread(shared)
        if self.schedule.own.awaited is not None:
            self.schedule.own.awaited.guarded.add(_extent(shared.data))
        barrier.brought.add(_extent(shared.data))
        shared.data.fill_(torch.nan)

        def arrive() -> None:
            shared.data.zero_()
            shared.data[where] = block
            barrier.arrive(arrived=descriptor.block_type.nbytes)

        self.schedule.copies.append(arrive)
        self.schedule.pause()

    def _copy_out(self, descriptor: _Descriptor, coordinates: Sequence[int], shared: _Shared) -> None:
        self._out(descriptor, coordinates, shared, Tensor.copy_)

    def _reduce_out(self, descriptor: _Descriptor, coordinates: Sequence[int], shared: _Shared) -> None:
        self._out(descriptor, coordinates, shared, Tensor.add_)

    def _out(
        self, descriptor: _Descriptor, coordinates: Sequence[int], shared: _Shared, into: Callable[..., Tensor]
    ) -> None:
        assert shared.shape == tuple(descriptor.block_type.shape)
        block, where = descriptor.block(coordinates)
        data = self._read_by_copies_and_products(shared)
        own = self.schedule.own
        own.stores.append(lambda: into(block, data[where]))
        own.sources.append(_extent(shared.data))
        self.schedule.pause()

    def _store_wait(self, pending: int) -> None:
        own = self.schedule.own
        self.schedule.pause(lambda: len(own.stores) <= pending)
        del own.sources[: max(len(own.sources) - pending, 0)]

    # Barriers.

    def _init(self, barrier: _Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def _expect(self, barrier: _Barrier, expected: int) -> None:
        barrier.arrive(arrivals=1, expected=expected)

    def _arrive(self, barrier: _Barrier, count: int) -> None:
        if any(_overlap(barrier.guarded, product.sources) for product in self.schedule.own.products):
            raise EmulationError("what a product reads is given back")
        self.schedule.own.given_back |= barrier.guarded
        barrier.arrive(arrivals=count)
        self.schedule.pause()

    def _wait(self, barrier: _Barrier, phase: int | Tensor) -> None:
        phase = int(phase)
        self.schedule.own.awaited = barrier
        self.schedule.pause(lambda: barrier.phase != phase)
        self.schedule.own.given_back -= barrier.brought

    # Products.

    def _product(
        self, a: _Shared | Tensor, b: _Shared, total: Tensor | _Product, use_acc: bool = True, is_async: bool = False
    ) -> _Product:
        def operand(x: _Shared | Tensor) -> Tensor:
            return (self._read_by_copies_and_products(x) if isinstance(x, _Shared) else x).float()

        def make() -> Tensor:
            # Products are made in order: one that this one adds to is there already.
            before = total.value if isinstance(total, _Product) else total
            return operand(a) @ operand(b) + (before if use_acc else 0)

        assert is_async
        product = _Product(make, [_extent(x.data) for x in (a, b) if isinstance(x, _Shared)])
        self.check_held(product.sources)
        self.schedule.own.products.append(product)
        self.schedule.pause()
        if not self.late:
            product.finish()
        return product

    def _product_wait(self, num_outstanding: int, deps: tuple[_Product, ...]) -> Tensor | tuple[Tensor, ...]:
        under_way = self.schedule.own.products
        self.schedule.pause()
        while len(under_way) > num_outstanding:
            under_way.pop(0).finish()
        if any(product in under_way for product in deps):
            raise EmulationError("a product is used before it has been waited for")
        values = tuple(product.value for product in deps)
        return values[0] if len(values) == 1 else values

    def _static_assert(self, holds: bool) -> None:
        assert holds

    def _warp_specialize(self, partitions: Sequence[tuple], warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1
        self.schedule.run(partitions)


class _Aggregate:
    """An instance of an aggregate: its fields, and by which name of a field it was first handed on itself."""

    fields: tuple[str, ...]

    def __init__(self, *values: Any, **named: Any) -> None:
        for name, value in {**dict(zip(self.fields, values, strict=False)), **named}.items():
            setattr(self, name, value)
            if isinstance(value, _Aggregate):
                vars(value).setdefault("name", name)


LAYOUTS = ("NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout")


class _NoLayout:
    """Stands for every layout, and for what makes one."""

    def __call__(self, *arguments: Any, **options: Any) -> None:
        return None

    get_default_for = __call__


def _extent(view: Tensor) -> Extent:
    """The bytes from the first that a view covers to the last."""
    steps = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), view.data_ptr() + (steps + 1) * view.itemsize


def _overlap(some: Iterable[Extent], others: Collection[Extent]) -> bool:
    return any(start < other_end and other < end for start, end in some for other, other_end in others)


def bound(function: Any) -> Callable:
    """A jitted function of scalars alone, as a Python function."""
    return _Machine(0, 1, seed=0, late=False).bind(function, {})


def _as_seen_by_kernel(given: TensorDescriptor | Tensor | None) -> _Descriptor | _Pointer | None:
    if isinstance(given, TensorDescriptor):
        return _Descriptor(given)
    return None if given is None else _Pointer(given.view(-1))


def emulate(launch: Launch, *, seed: int = 0, late: bool = False, mistake: Mistake = NO_MISTAKE) -> None:
    """Runs a recorded launch of a Gluon kernel, program after program.

    `late`: products read their operands where they are waited for. `mistake`: what the kernel does wrong, to see that
    it is found.
    """
    prepared = launch.prepared
    for program in range(prepared.programs):
        machine = _Machine(program, prepared.programs, seed + program, late)
        tensors = [_as_seen_by_kernel(given) for given in prepared.hand_over(launch.tensors)]
        numbers = [
            torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)
            for number in prepared.numbers
        ]
        machine.bind(prepared.kernel, mistake)(*tensors, *numbers, **prepared.choices)
        for partition in machine.schedule.partitions:
            if partition.stores:
                raise EmulationError("a program ended before its copies")
