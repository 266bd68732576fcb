"""Samples of an iterable for a run: in its own order, a batch at a time, resumed where they were."""

import copy
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from microbatch.batches import _fields
from microbatch.errors import BadData, UsageError
from microbatch.generators import kept, seed_all

MANY = 10_000  # samples to skip: worth a note


def is_stream(data: Any) -> bool:
    """True for an iterable that cannot be indexed. torch gives an IterableDataset a __getitem__ that only raises."""
    if isinstance(data, IterableDataset | DataLoader):
        return True
    return hasattr(data, "__iter__") and not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


class Stream:
    """What the library's Trainer draws from when the data is an iterable: the same calls as Data has.

    The library's indices are names here, for the samples of one batch: the same ones mean the same batch again, others
    the next one. An iterable with state_dict() and load_state_dict() is resumed by them; another one is read again from
    its beginning, and the samples that the run has used are skipped. At its end it begins again. Every sample is drawn
    with generators seeded by its number, so that shuffling and augmentation are repeated as they were.
    """

    size = 1 << 62
    longest_sample = -1  # -1, -2 and so on are the samples ahead, the longest first

    def __init__(
        self,
        iterable: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        batch: int,
        lengths: Any = None,
        by_tokens: bool = False,
        workers: int = 0,
        seed: int = 0,
        tokens_per_sample: int = 1,
    ) -> None:
        _check(iterable, lengths, workers)
        self.tokens_per_sample = tokens_per_sample
        self.collate = collate or default_collate
        self.note: Callable[[str], None] = lambda text: None  #: is told of long work
        self._length_of: Callable[[Any], int] | None = lengths
        self._by_tokens = by_tokens
        self._iterable = iterable
        self._batch_size, self._seed = batch, seed
        self._iterator: Iterator[Any] | None = None
        self._epoch = self._number = 0  # passes over the data that are complete, samples that were drawn
        self._from_start = True  # of the data; the iterator has given nothing yet
        self._base: tuple[Any, int, int] = (None, 0, 0)  # a state, and the epoch and the number that belong to it
        self._ahead: list[Any] = []  # drawn, and of no batch yet
        self._batch: list[Any] = []
        self._places: dict[int, int] = {}  # in the batch, by index
        self._resumed: tuple[int, int] | None = None  # a batch that a checkpoint knows: crc of its indices, its size

    def fingerprint(self) -> int | None:
        return None  # its first samples are gone when a run is resumed

    def examples(self, count: int) -> list[int]:
        """Indices of samples that are ahead; no more than the batch has."""
        return [-1 - i for i in range(min(count, self._batch_size))]

    def length(self, index: int) -> int:
        """Of a sample; 1 of all if micro-batches are bounded by samples."""
        return self._length_of(self._sample(index)) if self._by_tokens and self._length_of is not None else 1

    def arrange(self, indices: list[int]) -> list[int]:
        """Draws the batch, unless it is the one that is drawn already."""
        if list(self._places) == indices:
            return indices
        self._batch, self._places = [], {}
        if self._resumed is not None:
            known, samples = self._resumed
            self._resumed = None
            if _crc(indices) != known:
                self._take(samples)
        self._batch = self._by_length(self._take(len(indices)))
        self._places = {index: i for i, index in enumerate(indices)}
        return indices

    def get(self, indices: list[int]) -> tuple[Any, list[torch.Tensor]]:
        """These samples as a micro-batch, and its tensors with one entry for each."""
        micro = self.collate([self._sample(index) for index in indices])
        return micro, _fields(micro, len(indices))

    def close(self) -> None:
        pass

    def save(self) -> dict[str, Any]:
        """Where the data is: a state, and how many samples have been drawn since."""
        state, epoch, number = self._base
        start = self._number - len(self._ahead) - len(self._batch)
        saved = {"epoch": epoch, "number": number, "start": start, "samples": len(self._batch)}
        saved["batch"] = _crc(list(self._places))
        return saved if state is None else saved | {"state": _packed(state)}

    def prepare(self, saved: dict[str, Any]) -> Callable[[], None]:
        try:
            base = (_unpacked(saved["state"]) if "state" in saved else None, saved["epoch"], saved["number"])
            start, resumed = saved["start"], (saved["batch"], saved["samples"])
        except KeyError as error:
            raise BadData(f"the state of the data lacks {error.args[0]}: the run was made with data of another kind") from None
        if base[0] is not None and not hasattr(self._iterable, "load_state_dict"):
            raise BadData(f"the run's data had a state, and the {type(self._iterable).__name__} has no load_state_dict()")

        def apply() -> None:
            self._base = base
            self._go_to(start)
            self._resumed = resumed

        return apply

    def _sample(self, index: int) -> Any:
        if index >= 0:
            return self._batch[self._places[index]]
        self._draw_ahead(self._batch_size)
        return self._by_length(self._ahead)[-1 - index]

    def _by_length(self, samples: list[Any]) -> list[Any]:
        return samples if self._length_of is None else sorted(samples, key=self._length_of, reverse=True)

    def _take(self, count: int) -> list[Any]:
        self._draw_ahead(count)
        taken, self._ahead = self._ahead[:count], self._ahead[count:]
        return taken

    def _draw_ahead(self, count: int) -> None:
        with kept():
            seed_all(self._seed + (self._number << 20))  # for state_dict(), which may begin to iterate
            if not self._ahead:
                self._remember()
            try:
                while len(self._ahead) < count:
                    seed_all(self._seed + (self._number << 20))
                    self._ahead.append(self._next())
                    self._number += 1
            except BaseException:
                self._forget()  # an iterator that raised has ended
                raise

    def _next(self) -> Any:
        while True:
            if self._iterator is None:
                if hasattr(self._iterable, "set_epoch"):
                    self._iterable.set_epoch(self._epoch)
                self._iterator = iter(self._iterable)
            try:
                sample = next(self._iterator)
            except StopIteration:
                if self._from_start:
                    raise UsageError(_no_second_time(self._iterable, f"the run needs more than {self._number}")) from None
                self._epoch, self._iterator, self._from_start = self._epoch + 1, None, True
                continue
            self._from_start = False
            return sample

    def _remember(self) -> None:
        if hasattr(self._iterable, "state_dict") and hasattr(self._iterable, "load_state_dict"):
            is_first = self._base[0] is None
            self._base = (copy.deepcopy(self._iterable.state_dict()), self._epoch, self._number)
            if is_first:
                _packed(self._base[0])  # refused now rather than with the first checkpoint

    def _forget(self) -> None:
        """Begins at the base again."""
        state, self._epoch, self._number = self._base
        self._iterator, self._from_start, self._ahead = None, state is None, []
        self._batch, self._places = [], {}
        if state is not None:
            self._iterable.load_state_dict(copy.deepcopy(state))

    def _go_to(self, number: int) -> None:
        """Goes to a sample that comes after the base."""
        # What was drawn for the plan is the beginning of the same data: an iterator cannot give it twice.
        can_go_on = self._base == (None, 0, 0) and not self._batch and self._number - len(self._ahead) <= number
        if not can_go_on:
            self._forget()
        missing = number - self._number + len(self._ahead)
        if missing > MANY:
            self.note(f"reads the {missing:,} samples again that the run has used: the data has no state_dict() of its own")
        for _ in range(missing):
            self._take(1)


def _check(iterable: Any, lengths: Any, workers: int) -> None:
    if isinstance(iterable, DataLoader) and iterable.batch_size is not None:
        raise UsageError("the data is a DataLoader, which makes batches: give its dataset, and collate_fn= and workers=")
    if lengths is not None and not callable(lengths):
        raise UsageError(f"lengths is a {type(lengths).__name__}; for an iterable it is a function of a sample")
    if workers > 0:
        raise UsageError(
            "workers= is for data that can be indexed: an iterable loads its samples ahead by itself, as a "
            "DataLoader(..., batch_size=None, num_workers=...) does"
        )


def _crc(indices: list[int]) -> int:
    return zlib.crc32(struct.pack(f"<{len(indices)}q", *indices))


def _no_second_time(iterable: Any, need: str) -> str:
    if iter(iterable) is iterable:
        return (
            f"the data, a {type(iterable).__name__}, has ended or was read before, and does not begin again: {need}; "
            "give an object whose __iter__ begins anew"
        )
    return f"the data, a {type(iterable).__name__}, has no samples"


def _packed(state: Any) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    try:
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as error:
        raise UsageError(
            "state_dict() of the data holds more than numbers, text, tensors, lists and dicts, which a checkpoint "
            f"would not load again: {str(error).splitlines()[0]}"
        ) from None
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).clone()  # which torch owns


def _unpacked(packed: torch.Tensor) -> Any:
    try:
        state = torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)
    except Exception as error:
        raise BadData(f"the state of the data cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, Mapping):
        raise BadData(f"the state of the data is a {type(state).__name__}, not a dict")
    return state
