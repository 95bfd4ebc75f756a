"""Threads that prepare batches while the last one is trained on."""

import collections
import itertools
from concurrent.futures import ThreadPoolExecutor


def prefetch(make, indices, workers, depth=4):
    """Yields make(i) for each i, in order; threads make them ahead. Exceptions are raised here."""
    indices = iter(indices)
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        waiting = collections.deque(pool.submit(make, i) for i in itertools.islice(indices, workers + depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(make, i) for i in itertools.islice(indices, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
