"""Work on the cores of a CPU: each thread takes one item after the other."""

import collections
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any


def num_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(
    function: Callable[[Any, threading.Event], Any], items: Iterable[Any], num_threads: int
) -> list[Any]:
    """Returns `function(item, is_over)` of all items, in their order.

    `is_over` is set at the first error, Ctrl-C included: a function that then returns early lets
    the error be raised soon. One thread is the thread of the caller.
    """
    is_over = threading.Event()
    if num_threads == 1:
        return [function(item, is_over) for item in items]
    with futures.ThreadPoolExecutor(num_threads) as pool:
        jobs = [pool.submit(function, item, is_over) for item in items]
        try:
            done, _ = futures.wait(jobs, return_when=futures.FIRST_EXCEPTION)
            for job in done:
                job.result()
        except BaseException:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [job.result() for job in jobs]


def in_order(
    function: Callable[[Any], Any], items: Iterable[Any], num_threads: int
) -> Iterator[Any]:
    """Yields `function(item)` of all items, in their order; few results wait at a time."""
    waiting: collections.deque[futures.Future] = collections.deque()
    with futures.ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also where the results are no longer wanted
            for job in waiting:
                job.cancel()
