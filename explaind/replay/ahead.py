"""Reading ahead: what comes next is read and decompressed in a thread while what there is is worked on."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def ahead(read: Callable[[K], V], keys: Sequence[K]) -> Iterator[V]:
    """read(key) for every key, in their order, at most one of them before it is asked for. An error of `read` is raised in its turn."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = [pool.submit(read, key) for key in keys[:1]]
        for i in range(len(keys)):
            found = coming.pop().result()
            coming += [pool.submit(read, key) for key in keys[i + 1 : i + 2]]
            yield found
