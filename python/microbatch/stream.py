"""Samples of an iterable for a run: in its own order, a batch at a time, resumed where they were."""

import copy
import inspect
import io
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from microbatch.batches import _fields
from microbatch.data import end_workers
from microbatch.errors import BadData, UsageError
from microbatch.generators import kept, seed_all
from microbatch.interrupts import ignored_by_children

MANY = 10_000  # samples to skip: worth a note
ANEW = "give an object whose __iter__ begins anew, or make it anew for every train()"


def is_stream(data: Any) -> bool:
    """True for an iterable that cannot be indexed. torch gives an IterableDataset a __getitem__ that only raises."""
    if isinstance(data, IterableDataset | DataLoader):
        return True
    return hasattr(data, "__iter__") and not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


class Stream:
    """What the library's Trainer draws from when the data is an iterable: the same calls as Data has.

    The library's indices are names here, for the samples of one batch: the same ones mean the same batch again, others
    the next one. An iterable with state_dict() and load_state_dict() is resumed by them; another one is read again from
    its beginning, and the samples that the run has used are skipped. At its end it begins again. Before each sample,
    the generators of Python, NumPy and torch are seeded by its number, so that shuffling and augmentation are repeated.
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
        _check(iterable, collate, lengths, workers)
        self.tokens_per_sample = tokens_per_sample
        self.collate = collate or default_collate
        self.note: Callable[[str], None] = lambda text: None  #: is told of long work
        self._length_of: Callable[[Any], int] | None = lengths
        self._by_tokens = by_tokens
        self._iterable = iterable
        self._batch_size, self._seed = batch, seed
        self._iterator: Iterator[Any] | None = None
        self._was_begun = False  # by any iterator
        self._is_lost = False  # the iterator is gone: _number is to be reached from the base
        self._epoch = self._number = 0  # passes over the data that are complete, samples that were drawn
        self._from_start = True  # of the data; the iterator has given nothing yet
        self._base: tuple[Any, int, int] = (None, 0, 0)  # a state, and the epoch and the number that belong to it
        self._ahead: list[Any] = []  # drawn, and of no batch yet
        self._examples: list[Any] = []  # the same, by length
        self._batch: list[Any] = []
        self._places: dict[int, int] = {}  # in the batch, by index
        self._resumed: tuple[int, int] | None = None  # a batch that a checkpoint knows: its first index, its size

    def fingerprint(self) -> int | None:
        return None  # its first samples are gone when a run is resumed

    def examples(self, count: int) -> list[int]:
        """Indices of samples that are ahead: no more than the batch has, but two."""
        return [-1 - i for i in range(min(count, max(2, self._batch_size)))]

    def length(self, index: int) -> int:
        """Of a sample; 1 of all if micro-batches are bounded by samples."""
        return self._length_of(self._sample(index)) if self._by_tokens and self._length_of is not None else 1

    def arrange(self, indices: list[int]) -> list[int]:
        """Draws the batch, unless it is the one that is drawn already."""
        if list(self._places) == indices:
            return indices
        self._batch, self._places = [], {}
        if self._resumed is not None:
            first, samples = self._resumed
            if indices[0] != first:
                self._take(samples)
            self._resumed = None
        self._draw_ahead(len(indices))
        batch = self._by_length(self._ahead[: len(indices)])  # a function of the user's, which may raise
        self._take(len(indices))
        self._batch, self._places = batch, {index: i for i, index in enumerate(indices)}
        return indices

    def get(self, indices: list[int]) -> tuple[Any, list[torch.Tensor]]:
        """These samples as a micro-batch, and its tensors with one entry for each."""
        micro = self.collate([self._sample(index) for index in indices])
        return micro, _fields(micro, len(indices))

    def close(self) -> None:
        """Lets go of the iterator, and so of its worker processes."""
        self._lose()

    def save(self) -> dict[str, Any]:
        """Where the data is: a state, how many samples come before the batch, and which batch that is."""
        state, epoch, number = self._base
        first, samples = self._resumed or (next(iter(self._places), -1), len(self._batch))
        saved = {"epoch": epoch, "number": number, "start": self._position - len(self._batch), "first": first}
        saved["samples"] = samples
        return saved if state is None else saved | {"state": _packed(state)}

    def prepare(self, saved: dict[str, Any]) -> Callable[[], None]:
        try:
            base = (_unpacked(saved["state"]) if "state" in saved else None, saved["epoch"], saved["number"])
            start, resumed = saved["start"], (saved["first"], saved["samples"])
        except KeyError as error:
            raise BadData(f"the state of the data lacks {error.args[0]}: the run was made with data of another kind") from None
        if base[0] is not None and not hasattr(self._iterable, "load_state_dict"):
            raise BadData(f"the run's data had a state, and the {type(self._iterable).__name__} has no load_state_dict()")

        def apply() -> None:
            self._base = base
            self._go_to(start)
            self._resumed = resumed

        return apply

    @property
    def _position(self) -> int:
        """The number of the next sample that is of no batch yet."""
        return self._number - len(self._ahead)

    def _sample(self, index: int) -> Any:
        if index >= 0:
            return self._batch[self._places[index]]
        self._draw_ahead(max(2, self._batch_size))
        self._examples = self._examples or self._by_length(self._ahead)
        return self._examples[-1 - index]

    def _by_length(self, samples: list[Any]) -> list[Any]:
        return samples if self._length_of is None else sorted(samples, key=self._length_of, reverse=True)

    def _take(self, count: int) -> list[Any]:
        self._draw_ahead(count)
        taken, self._ahead, self._examples = self._ahead[:count], self._ahead[count:], []
        return taken

    def _draw_ahead(self, count: int) -> None:
        if len(self._ahead) >= count:
            return
        self._examples = []
        with kept():
            if self._is_lost:
                self._restart(self._number)
            seed_all(self._seed, self._number)  # for state_dict(), which may begin to iterate
            if not self._ahead:
                self._remember()
            while len(self._ahead) < count:
                self._ahead.append(self._drawn())

    def _drawn(self) -> Any:
        seed_all(self._seed, self._number)
        try:
            sample = self._next()
        except BaseException:
            self._lose()  # an iterator that raised has ended
            raise
        self._number += 1
        return sample

    def _next(self) -> Any:
        while True:
            if self._iterator is None:
                self._begin()
            assert self._iterator is not None
            try:
                sample = next(self._iterator)
            except StopIteration:
                if self._from_start:
                    raise UsageError(self._why_ended()) from None
                self._epoch, self._iterator, self._from_start = self._epoch + 1, None, True
                continue
            self._from_start = False
            return sample

    def _begin(self) -> None:
        if hasattr(self._iterable, "set_epoch"):
            self._iterable.set_epoch(self._epoch)
        with ignored_by_children():
            iterator = iter(self._iterable)
        # At the end of an epoch, a new one that gives nothing is noticed.
        is_again = self._was_begun and iterator is self._iterable and self._epoch == 0 and self._base[0] is None
        if is_again or (isinstance(iterator, types.GeneratorType) and _is_used(iterator) and self._epoch == 0):
            raise UsageError(f"the data, a {type(iterator).__name__}, was read before: {ANEW}")
        self._iterator, self._was_begun = iterator, True

    def _why_ended(self) -> str:
        kind = type(self._iterable).__name__
        if self._number == 0:
            return f"the data, a {kind}, has no samples"
        return f"the data, a {kind}, has ended after {self._number} samples, does not begin again, and the run needs more: {ANEW}"

    def _remember(self) -> None:
        """Makes the state of now the base, if there is one."""
        if not (hasattr(self._iterable, "state_dict") and hasattr(self._iterable, "load_state_dict")):
            return
        state, _, number = self._base
        if self._iterator is None and state is not None and number == self._number:
            return  # just loaded: some say what was loaded only once they are iterated
        with ignored_by_children():
            found = self._iterable.state_dict()
        if found is None:
            return
        if state is None:
            _packed(found)  # refused now rather than with the first checkpoint
        self._base = (copy.deepcopy(found), self._epoch, self._number)

    def _lose(self) -> None:
        """Drops the iterator; the next draw gets a new one, at the same sample."""
        self._number = self._position
        end_workers(self._iterator, self._iterable)
        self._iterator, self._is_lost, self._ahead, self._examples = None, True, [], []

    def _restart(self, number: int) -> None:
        """Begins at the base, and skips up to a sample that comes after it."""
        state, self._epoch, self._number = self._base
        self._iterator, self._from_start, self._is_lost = None, state is None, False
        self._ahead, self._examples = [], []
        try:
            if state is not None:
                self._iterable.load_state_dict(copy.deepcopy(state))
            self._skip(number - self._number)
        except BaseException:
            self._lose()
            self._number = number  # where the next try goes
            raise

    def _go_to(self, number: int) -> None:
        # What was drawn for the plan is the beginning of the same data: an iterator cannot give it twice.
        can_go_on = self._base == (None, 0, 0) and not self._is_lost and not self._batch and self._position <= number
        self._batch, self._places = [], {}
        with kept():
            if not can_go_on:
                self._restart(number)
            elif (missing := number - self._position) > 0:
                dropped = min(missing, len(self._ahead))
                self._ahead, self._examples = self._ahead[dropped:], []
                self._skip(missing - dropped)

    def _skip(self, samples: int) -> None:
        if samples > MANY:
            why = ": the data has no state_dict() of its own" if self._base[0] is None else ""
            self.note(f"reads the {samples:,} samples again that the run has used{why}")
        for _ in range(samples):
            self._drawn()


def _check(iterable: Any, collate: Any, lengths: Any, workers: int) -> None:
    if collate is not None and not callable(collate):
        raise UsageError(f"collate_fn is a {type(collate).__name__}; it is a function of a list of samples")
    if isinstance(iterable, DataLoader) and iterable.batch_sampler is not None:
        raise UsageError("the data is a DataLoader, which makes batches: give its dataset, and collate_fn= and workers=")
    if lengths is not None and not callable(lengths):
        raise UsageError(f"lengths is a {type(lengths).__name__}; for an iterable it is a function of a sample")
    if workers > 0:
        raise UsageError(
            "workers= is for data that can be indexed: an iterable loads its samples ahead by itself, as a "
            "DataLoader(..., batch_size=None, num_workers=...) does"
        )


def _is_used(generator: Any) -> bool:
    return inspect.getgeneratorstate(generator) != inspect.GEN_CREATED


def _packed(state: Any) -> torch.Tensor:
    if not isinstance(state, Mapping):
        raise UsageError(f"state_dict() of the data returned a {type(state).__name__}, not a dict")
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
