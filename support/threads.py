"""Threads that prepare batches while the last one is trained on."""

import collections
import itertools
from concurrent.futures import ThreadPoolExecutor


def prefetch(make, indices, workers, depth=4):
    """Yields make(i) for each i, in order; threads make them ahead. Exceptions are raised here."""
    indices, waiting = iter(indices), collections.deque()
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for i in itertools.islice(indices, workers + depth):
            waiting.append(pool.submit(make, i))
        while waiting:
            result = waiting.popleft().result()
            for i in itertools.islice(indices, 1):
                waiting.append(pool.submit(make, i))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
