"""Start worker processes, and send tensors from them to the training process.

Workers are forked, by `FORKS`. A pickled copy of the source, with the paths of a million images,
would otherwise be sent to each of them.

PyTorch's DataLoader copies tensors to shared memory on a thread of the worker. If `/dev/shm` is too
small for that (a container has 64 MB by default), this thread only prints the error, and the
training process waits for ever. A `Parcel` sends the bytes through the pipe instead.
"""

from __future__ import annotations

import gc
import logging
import pickle
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

from torch import Tensor

log = logging.getLogger("rsa_fast")


class Worker(ForkProcess):
    """A forked process whose garbage collections never see what it inherits.

    A collection would copy the memory pages of these objects. It would also destroy a DALI pipeline
    that is no longer used. The worker would then wait for ever for the pipeline's threads, because
    a fork has no copies of threads.
    """

    def start(self) -> None:
        enabled = gc.isenabled()
        gc.disable()
        try:
            super().start()
        finally:
            if enabled:
                gc.enable()

    def run(self) -> None:
        gc.freeze()
        gc.enable()
        super().run()


class Forks(ForkContext):
    """The context of `multiprocessing` whose processes are `Worker`s."""

    Process = Worker


FORKS = Forks()


class Parcel:
    """What a worker returns: any `content`, and the `tensors` in it.

    The training process receives `content` itself.
    """

    def __init__(self, content: object, tensors: Sequence[Tensor]) -> None:
        self.content, self.tensors = content, tensors

    def __reduce__(self) -> tuple[Any, ...]:
        # The DataLoader's queue calls this on its thread, while the worker makes the next batch.
        try:
            for tensor in self.tensors:
                tensor.share_memory_()  # type: ignore[no-untyped-call]  # torch has no types here
        except RuntimeError:  # "unable to allocate shared memory(shm)"
            return from_pipe, (pickle.dumps(self.content),)
        return from_shared_memory, (self.content,)


def from_shared_memory(content: object) -> object:
    return content


def from_pipe(data: bytes) -> object:
    warn_full()
    return pickle.loads(data)


@cache  # once per process
def warn_full() -> None:
    log.warning(
        "no room in /dev/shm: batches come from the worker processes through a pipe, which is "
        "slower. For more room use docker run --shm-size=2g, fewer --threads or backend native"
    )
