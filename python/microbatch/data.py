"""Samples of a map-style dataset for a run: in the order that the run draws, loaded a micro-batch at a time."""

import signal
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from microbatch.batches import _fields, _fingerprint
from microbatch.errors import UsageError
from microbatch.generators import kept, seed_all


class Data:
    """What the library's Trainer draws from.

    lengths: of every sample, by index; the samples of a batch are then taken by length, the longest first, so that
    micro-batches need little padding. by_tokens: later ones hold as many tokens as the first, and so more samples.
    workers: processes that load samples ahead.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        lengths: Sequence[int] | Callable[[Any], int] | None = None,
        by_tokens: bool = False,
        workers: int = 0,
        seed: int = 0,
        tokens_per_sample: int = 1,
    ) -> None:
        _require_map_style(dataset)
        if collate is not None and not callable(collate):
            raise UsageError(f"collate_fn is a {type(collate).__name__}; it is a function of a list of samples")
        self.size = len(dataset)
        if self.size < 1:
            raise UsageError("the dataset is empty")
        self.tokens_per_sample = tokens_per_sample
        self.collate = collate or default_collate
        self.lengths = _lengths_of(dataset, lengths)
        self.longest_sample = max(range(self.size), key=self.lengths.__getitem__) if self.lengths is not None else 0
        self._by_tokens = by_tokens
        self._dataset = dataset
        self._workers = _Workers(dataset, workers, seed) if workers > 0 else None

    def examples(self, count: int) -> list[int]:
        """Indices of so many samples, or of all there are."""
        return list(range(min(count, self.size)))

    def fingerprint(self) -> int | None:
        """Of a few samples; None if they are not the same when they are loaded again."""
        few = sorted({0, self.size // 2, self.size - 1})
        found = set()
        for _ in range(2):
            with kept():
                seed_all(0)
                try:
                    found.add(_fingerprint(self._load(few)))
                except Exception:  # whatever is wrong with a sample, the run says it when it draws that one
                    return None
        return found.pop() if len(found) == 1 else None

    def length(self, index: int) -> int:
        """Of a sample; 1 of all if micro-batches are bounded by samples."""
        return self.lengths[index] if self._by_tokens and self.lengths is not None else 1

    def arrange(self, indices: list[int]) -> list[int]:
        """The samples of the next batch in the order in which they are to be used."""
        if self.lengths is not None:
            indices = sorted(indices, key=self.lengths.__getitem__, reverse=True)
        if self._workers is not None:
            self._workers.begin(indices)
        return indices

    def get(self, indices: list[int]) -> tuple[Any, list[torch.Tensor]]:
        """These samples as a micro-batch, and its tensors with one entry for each."""
        samples = self._workers.load(indices) if self._workers is not None else None
        micro = self.collate(self._load(indices) if samples is None else samples)
        return micro, _fields(micro, len(indices))

    def _load(self, indices: list[int]) -> list[Any]:
        if callable(getattr(self._dataset, "__getitems__", None)):  # several at once, as torch's DataLoader asks for them
            return list(self._dataset.__getitems__(indices))
        return [self._dataset[i] for i in indices]

    def close(self) -> None:
        """Ends the worker processes; the next batch starts them again."""
        if self._workers is not None:
            self._workers.close()


class Longest:
    """A batch of copies of the sample that takes the most memory, for which a plan is made."""

    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size = data, size

    def as_many_as(self, begin: int, samples: int) -> int:
        return samples

    def fetch(self, begin: int, end: int) -> Any:
        return self.data.get([self.data.longest_sample] * (end - begin))


class Examples:
    """A batch of a few samples of the data."""

    def __init__(self, data: Any, size: int) -> None:
        self.data, self.indices = data, data.examples(size)
        self.size = len(self.indices)

    def as_many_as(self, begin: int, samples: int) -> int:
        return samples

    def fetch(self, begin: int, end: int) -> Any:
        return self.data.get(self.indices[begin:end])

    def fetch_twice(self) -> Any:
        return self.data.get(self.indices * 2)

    def head(self, samples: int) -> "Examples":
        return Examples(self.data, samples)


def _require_map_style(dataset: Any) -> None:
    if isinstance(dataset, Mapping):
        raise UsageError(
            f"the data is a {type(dataset).__name__} with the fields {', '.join(map(str, list(dataset)[:8]))}: give a "
            "dataset of samples, such as one of its splits, a list of dicts, or torch.utils.data.TensorDataset(*data.values())"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"the data is a {type(dataset).__name__}; give a map-style dataset, with __len__ and __getitem__, as "
            "torch.utils.data.Dataset has"
        )


def _lengths_of(dataset: Any, lengths: Any) -> Sequence[int] | None:
    if lengths is None:
        return None
    found = [int(lengths(dataset[i])) for i in range(len(dataset))] if callable(lengths) else list(lengths)
    if len(found) != len(dataset):
        raise UsageError(f"lengths has {len(found)} entries for a dataset of {len(dataset)} samples; give one for each")
    return found


def end_workers(iterator: Any, loader: Any) -> None:
    """Of a DataLoader. Left to the garbage collector, they are waited for at any later moment, for seconds."""
    for one in (iterator, getattr(loader, "_iterator", None) if isinstance(loader, DataLoader) else None):
        if one is not None and hasattr(one, "_shutdown_workers"):
            one._shutdown_workers()
    if isinstance(loader, DataLoader):
        loader._iterator = None


Key = tuple[int, int]  # a sample's index, and a seed for its random augmentations


class _Workers:
    """Loads the samples of a batch in worker processes, ahead of their use.

    Every sample has a seed of its own, from the batch and its index: its random augmentations do not depend on the
    worker, nor on how often the batch is begun again.
    """

    def __init__(self, dataset: Any, workers: int, seed: int) -> None:
        self._seed = seed
        self._order: list[Key] = []
        self._at = 0
        self._samples: Iterator[Any] | None = None
        self._loader: DataLoader[Any] = DataLoader(
            _Seeded(dataset),
            batch_size=None,
            sampler=_Order(self),
            num_workers=workers,
            persistent_workers=True,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # not the default one, whose draws belong to the training
        )

    def keys(self) -> list[Key]:
        """Of the samples that are still to be loaded."""
        return self._order[self._at :]

    def begin(self, indices: list[int]) -> None:
        salt = zlib.crc32(struct.pack(f"<{len(indices)}q", *indices), self._seed & 0xFFFFFFFF)
        self._order = [(index, (salt << 20) ^ index) for index in indices]
        self._at, self._samples = 0, None

    def close(self) -> None:
        self._samples = None
        end_workers(None, self._loader)

    def load(self, indices: list[int]) -> list[Any] | None:
        """None if these are no samples of the batch that begin() named."""
        at = self._find(indices)
        if at is None:
            return None
        if self._samples is None or at != self._at:  # begun again, after running out of memory or an interrupt
            self._at = at
            self._samples = iter(self._loader)
        samples = [next(self._samples) for _ in indices]
        self._at += len(indices)
        return samples

    def _find(self, indices: list[int]) -> int | None:
        starts = (self._at, *range(len(self._order)))
        found = (at for at in starts if [index for index, _ in self._order[at : at + len(indices)]] == indices)
        return next(found, None)


class _Order:
    """The sampler of the loader: what is left of the batch."""

    def __init__(self, workers: _Workers) -> None:
        self._workers = workers

    def __iter__(self) -> Iterator[Key]:
        return iter(self._workers.keys())

    def __len__(self) -> int:
        return len(self._workers.keys())


class _Seeded(Dataset[Any]):
    """A dataset whose samples are drawn with seeds of their own."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        index, seed = key
        seed_all(seed)
        return self.dataset[index]


def _as_it_is(sample: Any) -> Any:
    return sample


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the run, after the micro-batch
