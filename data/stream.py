"""Endless batches with a position: what makes them is a `Producer`, a thread keeps a few ready, the state is plain JSON."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import torch

from data.errors import DataError

Batch = dict[str, torch.Tensor | None]


class Producer(Protocol):
    """Makes the batches of one rank in order. Owned by one thread at a time."""

    def next(self) -> Batch:
        """The next batch."""
        ...

    def position(self) -> dict:
        """Where the row sequence stands: plain JSON, the same on every rank."""
        ...

    def seek(self, position: dict) -> None:
        """Go on from there."""
        ...


class _Prefetch:
    """A thread that keeps a few (batch, position after it) ready; an exception takes the place of a batch."""

    def __init__(self, producer: Producer, depth: int):
        self.ready: queue.Queue = queue.Queue(maxsize=depth)
        self.stop = threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(producer, self.ready, self.stop), daemon=True, name="loader"
        )
        self.thread.start()

    @staticmethod
    def _run(producer: Producer, ready: queue.Queue, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                item = (producer.next(), producer.position())
            except BaseException as err:
                item = (err, None)
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is None:
                return

    def close(self) -> None:
        self.stop.set()
        if self.thread is not threading.current_thread():
            self.thread.join()


class Stream:
    """Endless batches of one rank.

    `identity` is what the row sequence depends on; a state of another one is refused. With `prefetch` > 0 a thread
    prepares that many batches ahead. `state_dict` is the position after the last batch that `next` returned.
    """

    def __init__(self, producer: Producer, identity: dict, prefetch: int):
        self._producer, self._identity, self._depth = producer, identity, prefetch
        self._prefetch: _Prefetch | None = None
        self._finalizer: Callable[[], object] = lambda: None
        self._position = producer.position()

    def next(self) -> Batch:
        """The next batch of this rank."""
        if self._depth <= 0:
            batch = self._producer.next()
            self._position = self._producer.position()
            return batch
        if self._prefetch is None:
            self._prefetch = _Prefetch(self._producer, self._depth)
            self._finalizer = weakref.finalize(self, self._prefetch.close)
        batch, position = self._prefetch.ready.get()
        if position is None:
            self.close()
            raise batch
        self._position = position
        return batch

    def state_dict(self) -> dict:
        """Where the row sequence stands after the last returned batch: plain JSON."""
        return {"version": 1, **self._identity, "position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state. Raises DataError if it belongs to other data, another seed or other row shapes."""
        if state.get("version") != 1:
            raise DataError(f"loader state: version {state.get('version')!r} is not known, 1 is")
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise DataError(
                    f"loader state: {key} was {state.get(key)!r} and is now {value!r}; the row order depends on it"
                )
        self.close()
        self._position = state["position"]
        self._producer.seek(self._position)

    def close(self) -> None:
        """End the thread; the next `next` starts again after the last returned batch."""
        self._finalizer()
        self._prefetch = None
        self._finalizer = lambda: None
        self._producer.seek(self._position)
