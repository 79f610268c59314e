"""Parts for the tests of `tools.gpu_report`: sound, slow and faulty ones, without torch."""

from __future__ import annotations

import os
import time

from rsa_fast.tools.gpu_report.worker import Case, SkippedError


def sound(settings):
    return [
        Case("one", lambda seconds: [{"size": settings.repeats, "seconds": seconds}]),
        Case("two", lambda _: [{"size": 1.0}, {"case": "three", "size": float("inf")}]),
    ]


def faulty(settings):
    def fails(_):
        yield {"size": 4}
        raise KeyError("no such view")

    return [Case("half", fails), Case("whole", lambda _: [{"size": 5}])]


def impossible(settings):
    raise ZeroDivisionError("in the part itself")


def skipping(settings):
    def library(_):
        import a_library_that_is_not_there

        yield a_library_that_is_not_there.value

    def backend(_):
        try:
            yield from library(_)
        except ImportError as error:
            raise ValueError("backend x needs x") from error

    def reason(_):
        raise SkippedError("the card has none")

    return [Case("library", library), Case("backend", backend), Case("reason", reason)]


def ours(settings):
    from rsa_fast.tools import gpu_nothing

    return gpu_nothing


def too_large(settings):
    def allocate(_):
        raise RuntimeError("CUDA error: out of memory")

    return [Case("large", allocate)]


def dying(settings):
    return [Case("last", lambda _: os._exit(3)), Case("never", lambda _: [{"size": 6}])]


def hanging(settings):
    return [Case("stuck", lambda _: time.sleep(60))]


def slow(settings):
    def sleep(_):
        time.sleep(0.3)
        yield {"size": 7}

    return [Case(f"nap {number}", sleep) for number in range(1000)]


def stopped(settings):
    def long(_):
        time.sleep(60)
        yield {"size": 9}

    return [Case("done", lambda _: [{"size": 8, "pid": os.getpid()}]), Case("long", long)]
