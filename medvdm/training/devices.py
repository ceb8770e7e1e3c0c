"""Which devices a run uses, and how arrays are laid out on them: parameters everywhere, batches split.

The same jitted step runs on one device, on several of one process, and on several processes; only the placement of
its arguments differs. Noise does not depend on the placement, so the numbers agree up to rounding.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medvdm.errors import InputError

T = TypeVar("T")


def available() -> list[jax.Device]:
    """The devices that JAX computes on.

    Raises:
        InputError: JAX_PLATFORMS or another of JAX's settings asks for what is not here.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as problem:  # 'cuda' without its plug-in is a bare assertion in JAX
        asked = jax.config.jax_platforms or "the default"
        reason = " ".join(str(problem).split()).split(" (")[0][:160].rstrip(".;")
        raise InputError(
            f"JAX_PLATFORMS: '{asked}' cannot be used here{f': {reason}' if reason else ''}; "
            "expected a platform that is installed, such as cpu, or the variable unset"
        ) from None


def start_processes(coordinator: str | None, num_processes: int, process_id: int, *, timeout: int = 300) -> None:
    """Join a run of several processes; nothing to do for one.

    Args:
        coordinator: HOST:PORT of process 0; None for a single process, 'auto' where the cluster tells (Slurm, ...).
        num_processes, process_id: how many there are, and which one this is.
        timeout: seconds to wait for the others. When they have passed, the process says so and ends with code 2.

    Raises:
        InputError: a number out of range, an address that is none, no cluster that tells, or nobody answers there; or
            as :func:`available`.
    """
    if coordinator is None:
        if num_processes != 1 or process_id != 0:
            raise InputError(f"coordinator: missing, for process {process_id} of {num_processes}; expected HOST:PORT")
        available()
        return
    if coordinator != "auto":
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"coordinator: '{coordinator}'; expected HOST:PORT, or 'auto'")
        if not 0 <= process_id < num_processes:
            raise InputError(f"process_id: {process_id}; expected 0 to {num_processes - 1}, below num_processes")
        if process_id:
            _wait_for(host, int(port), timeout)
    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = () if coordinator == "auto" else (coordinator, num_processes, process_id)
    # Where others do not come, JAX aborts from C++ with a stack trace: no exception can be caught. So be first.
    late = threading.Timer(timeout, _give_up, (f"coordinator: not all processes joined within {timeout} s",))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(*where, initialization_timeout=timeout + 60)
    except (RuntimeError, ValueError, OSError, IndexError) as problem:
        reason = " ".join(str(problem).split())[:160]
        raise InputError(f"coordinator: '{coordinator}': {reason}; expected an address that can be used") from None
    finally:
        late.cancel()
    available()


def _wait_for(host: str, port: int, timeout: float) -> None:
    """Return when something listens there; raise InputError when the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=2.0).close()
            return
        except OSError as problem:
            if time.monotonic() > deadline:
                raise InputError(
                    f"coordinator: {host}:{port} did not answer within {timeout} s ({problem.strerror or problem}); "
                    "expected process 0 to listen there"
                ) from None
        time.sleep(0.2)


def _give_up(line: str) -> None:
    print(f"medvdm: {line}; expected all of them to be started", file=sys.stderr, flush=True)
    os._exit(InputError.exit_code)


class Layout:
    """The placement of a run's arrays for one batch size.

    A single process uses as many of its devices as divide the batch; several processes must use all of theirs.

    Args:
        batch_size: rows of a batch.
        local: lay a batch of this process alone on its own devices, whatever other processes do.

    Raises:
        InputError: several processes, and the batch does not divide by the number of their devices.
    """

    def __init__(self, batch_size: int, *, local: bool = False):
        devices = available()
        if local:
            devices = jax.local_devices()
        if local or jax.process_count() == 1:
            devices = devices[: math.gcd(batch_size, len(devices))]
        elif batch_size % len(devices):
            raise InputError(f"batch_size: {batch_size}; expected a multiple of {len(devices)}, the number of devices")
        self.mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.split = NamedSharding(self.mesh, PartitionSpec("data"))
        self.count = len(devices)
        self._local = local

    def rows(self, batch_size: int) -> slice:
        """The rows of a global batch that this process reads."""
        mine = batch_size // jax.process_count()
        return slice(jax.process_index() * mine, (jax.process_index() + 1) * mine)

    def put(self, rows: np.ndarray) -> jax.Array:
        """This process's rows as its part of one global array. They must not be written to afterwards."""
        if self.count == 1:
            return jax.device_put(rows, self.split, may_alias=True)
        if self._local:
            return jax.device_put(rows, self.split)
        return jax.make_array_from_process_local_data(self.split, rows)


def describe() -> str:
    """The devices in words, as for a record: '8 x cpu', '1 x NVIDIA H100'."""
    devices = available()
    return f"{len(devices)} x {devices[0].device_kind}"


# --- Several processes ---------------------------------------------------------------------------------------------


def first_process() -> bool:
    """Whether this process is the one that writes the record, the metrics and the progress bar."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def first_said(answer: bool) -> bool:
    """The answer of the first process, in all of them: what depends on a clock or a file is decided there."""
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def local(tree: Any) -> Any:
    """A replicated tree as arrays on this process's first device."""
    return jax.tree.map(lambda a: a.addressable_data(0), tree)


def own_parts(count: int) -> list[int]:
    """Which of ``count`` parts of a piece of work this process does: every P-th of P processes.

    All processes do equally many, so that :func:`joined` can exchange them: where the parts do not go round, some do
    the last one as well.
    """
    turns = -(-count // jax.process_count())
    return [min(turn * jax.process_count() + jax.process_index(), count - 1) for turn in range(turns)]


def joined(mine: list[T], count: int) -> list[T]:
    """All ``count`` parts in order, on every process, given those of :func:`own_parts`.

    A part is a tree of NumPy arrays, of the same shapes and types in all parts; they are passed on bit by bit.
    """
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    tree = jax.tree.structure(mine[0])
    leaves = [np.stack(one) for one in zip(*map(jax.tree.leaves, mine), strict=True)]
    # As bytes: JAX would make float32 of float64.
    every = multihost_utils.process_allgather([np.ascontiguousarray(leaf).view(np.uint8) for leaf in leaves])
    every = [np.ascontiguousarray(a).view(leaf.dtype) for a, leaf in zip(every, leaves, strict=True)]
    turn, process = zip(*(divmod(number, jax.process_count()) for number in range(count)), strict=True)
    return [jax.tree.unflatten(tree, [leaf[p, t] for leaf in every]) for t, p in zip(turn, process, strict=True)]
