"""Batches as people have them, cut into micro-batches.

A source has `size`, `fetch(begin, end)`, which returns the micro-batch and the tensors in it that have a sample along
dimension 0, `as_many_as(begin, samples)`, how many samples from there on take the memory of so many of the first ones,
`fetch_twice()`, which fetches the batch with every sample twice, and `fingerprint()`.
"""

import copy
import ctypes
import dataclasses
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from microbatch import _core
from microbatch.errors import UsageError


MOST_FIELDS = 4  # of one shape; more tensors are samples


class Structure:
    """A batch of tensors in a dict, tuple, list, dataclass, BatchEncoding, nested: micro-batches are views of it.

    Tensors with the batch's length along dimension 0 are sliced, and so are arrays, lists and tuples of that length, but
    for tuples of numbers or of a few tensors of one shape; whatever else there is goes into every micro-batch as it is.
    """

    def __init__(self, batch: Any, length: int | None = None, trim_padding: str | None = None) -> None:
        self.batch = batch
        self.size = _length_of(batch) if length is None else _checked(batch, length)
        self.trim_padding = trim_padding
        if trim_padding is not None:
            _mask_of(batch, trim_padding)

    def fetch(self, begin: int, end: int) -> tuple[Any, list[Tensor]]:
        micro = _taken(self.batch, self.size, lambda field: field[begin:end])
        if self.trim_padding is not None:
            micro = _trimmed(micro, self.trim_padding)
        return micro, _fields(micro, end - begin)

    def as_many_as(self, begin: int, samples: int) -> int:
        return samples

    def head(self, samples: int) -> "Structure":
        """The first samples of the batch."""
        return Structure(_taken(self.batch, self.size, lambda field: field[:samples]), samples, self.trim_padding)

    def fetch_twice(self) -> tuple[Any, list[Tensor]]:
        twice = _taken(self.batch, self.size, _doubled)
        return twice, _fields(twice, 2 * self.size)

    def fingerprint(self) -> int:
        return _fingerprint(self.batch)


class Samples:
    """A batch as a sequence of samples, collated a micro-batch at a time.

    The order inside a batch is free, so samples are taken by length, the longest first: micro-batches need little
    padding, and memory is known to suffice after the first one. by_tokens: later ones hold as many tokens, and so more
    samples.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        length_of: Callable[[Any], int] | None = None,
        by_tokens: bool = False,
    ) -> None:
        if not isinstance(samples, Sequence) or isinstance(samples, str | bytes):
            raise UsageError(
                f"with collate= a batch is a list of samples, not a {type(samples).__name__}; leave collate out for a "
                "batch that is collated already"
            )
        self.length_of = length_of or length_of_sample
        self.samples = sorted(samples, key=self.length_of, reverse=True)
        self.by_tokens = by_tokens
        self.collate = collate
        self.size = len(self.samples)

    def fetch(self, begin: int, end: int) -> tuple[Any, list[Tensor]]:
        micro = self.collate(self.samples[begin:end])
        return micro, _fields(micro, end - begin)

    def as_many_as(self, begin: int, samples: int) -> int:
        if not self.by_tokens:
            return samples
        return int(_core.as_many_tokens(samples, self.length_of(self.samples[0]), self.length_of(self.samples[begin])))

    def head(self, samples: int) -> "Samples":
        """The longest samples of the batch."""
        return Samples(self.samples[:samples], self.collate)

    def fetch_twice(self) -> tuple[Any, list[Tensor]]:
        twice = self.collate([*self.samples, *self.samples])
        return twice, _fields(twice, 2 * self.size)

    def fingerprint(self) -> int:
        return _fingerprint(self.samples)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that map_tensors() changes, in its order."""
    found: list[Tensor] = []

    def note(one: Tensor) -> Tensor:
        found.append(one)
        return one

    map_tensors(value, note)
    return found


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The structure with `change(tensor)` in place of every tensor. Of a PackedSequence, the sizes stay on the CPU."""
    if isinstance(value, PackedSequence):
        orders = [None if one is None else change(one) for one in (value.sorted_indices, value.unsorted_indices)]
        return PackedSequence(change(value.data), value.batch_sizes, *orders)
    members = _members(value)
    if members is not None:
        return _rebuilt(value, [map_tensors(one, change) for _, one in members])
    return change(value) if isinstance(value, Tensor) else value


def source_of(
    batch: Any,
    length: int | None,
    collate: Callable[[list[Any]], Any] | None,
    trim_padding: str | None,
    by_tokens: bool = False,
) -> Structure | Samples:
    """The source for a batch of samples to collate, or one that is collated. Raises UsageError if it cannot be split."""
    if isinstance(batch, Structure | Samples):
        return batch
    return Structure(batch, length, trim_padding) if collate is None else Samples(batch, collate, None, by_tokens)


def length_of_sample(sample: Any) -> int:
    """The length of the longest tensor, array or list in the sample; 0 for a sample without any."""
    return max((len(leaf) for _, leaf in _leaves(sample) if _is_sized(leaf)), default=0)


def _is_sized(leaf: Any) -> bool:
    if isinstance(leaf, str | bytes):
        return False
    shape = getattr(leaf, "shape", None)
    return len(shape) > 0 if shape is not None else hasattr(leaf, "__len__")


# A container is taken apart: its members are fields, each with its own samples. Any other list is a field.


def _members(value: Any) -> list[tuple[str, Any]] | None:
    """The members of a container, by name; None if it is a leaf."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", one) for key, one in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{key}", one) for key, one in zip(value._fields, value, strict=True)]
    if isinstance(value, tuple) or (isinstance(value, list) and any(_holds_tensors(one) for one in value)):
        return [(f"[{i}]", one) for i, one in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, list):
        return any(_holds_tensors(one) for one in value)
    return any(_holds_tensors(one) for _, one in _members(value) or [])


def _leaves(value: Any, name: str = "batch") -> Iterator[tuple[str, Any]]:
    members = _members(value)
    if members is None:
        yield name, value
        return
    for key, one in members:
        yield from _leaves(one, name + key)


def _rebuilt(value: Any, members: list[Any]) -> Any:
    """A container of the same type with other members."""
    if isinstance(value, Mapping):
        result = dict(zip(value, members, strict=True))
        if type(value) is dict:
            return result
        kind: Any = type(value)
        try:
            return kind(result)
        except TypeError:
            other: Any = copy.copy(value)
            other.update(result)
            return other
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*members)
    if isinstance(value, tuple | list):
        return type(value)(members)
    other = copy.copy(value)
    for field, one in zip(dataclasses.fields(value), members, strict=True):
        object.__setattr__(other, field.name, one)
    return other


def _length_of(batch: Any) -> int:
    """The length that all tensors of the batch have along dimension 0."""
    if _looks_like_samples(batch):
        raise UsageError(
            f"the batch is a list of {len(batch)} tensors of the same shape, which look like samples: give collate=, or "
            "length= if they are fields"
        )
    lengths: dict[int, list[str]] = {}
    for name, leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            lengths.setdefault(leaf.shape[0], []).append(name)
    if not lengths:
        raise UsageError(
            f"the batch, a {type(batch).__name__}, holds no tensor with a dimension for the samples: give tensors in a "
            "dict, tuple, list or dataclass, or a list of samples and collate="
        )
    if len(lengths) > 1:
        found = "; ".join(f"{', '.join(names)}: {length}" for length, names in sorted(lengths.items()))
        raise UsageError(
            f"the fields of the batch differ in length along dimension 0 ({found}); name the batch's length with "
            "length=: fields of that length are cut, the others go into every micro-batch whole"
        )
    return next(iter(lengths))


def _looks_like_samples(batch: Any) -> bool:
    """More tensors of one shape than a batch has fields."""
    if not isinstance(batch, list) or len(batch) <= MOST_FIELDS or not all(isinstance(one, Tensor) for one in batch):
        return False
    return len({one.shape for one in batch}) == 1


def _checked(batch: Any, length: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise UsageError(f"length is {length!r}; it is the number of samples in the batch")
    if not any(isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == length for _, leaf in _leaves(batch)):
        raise UsageError(f"length is {length}, and no tensor of the batch has that length along dimension 0")
    return length


def _taken(value: Any, length: int, take: Callable[[Any], Any]) -> Any:
    """The batch with `take(field)` in place of every field that has one entry for each sample."""
    per_sample = _has_one_each(value, length)
    members = None if per_sample else _members(value)
    if members is not None:
        return _rebuilt(value, [_taken(one, length, take) for _, one in members])
    shape = getattr(value, "shape", None)
    if shape is not None:
        return take(value) if len(shape) > 0 and shape[0] == length else value
    return take(value) if per_sample else value


def _has_one_each(value: Any, length: int) -> bool:
    """True for a list or a tuple with an entry for each sample, which is no list of fields."""
    if isinstance(value, list):
        return len(value) == length and not _is_batched(value, length)
    if type(value) is not tuple or len(value) != length:
        return False
    if any(_is_setting(one) for one in value) or _is_of_fields(value, length):
        return False
    shapes = [tuple(one.shape) for one in value if hasattr(one, "shape")]
    return len(shapes) < length or len(set(shapes)) > 1 or length > MOST_FIELDS  # else a pair, such as cosines and sines


def _is_of_fields(value: tuple[Any, ...], length: int) -> bool:
    """True if a tensor in it has the batch's length, or all that is sized inside of it has."""
    direct = [one for one in value if hasattr(one, "shape")]
    sizes = [len(leaf) for _, leaf in _leaves(value) if _is_sized(leaf)]
    return any(len(one) == length for one in direct) or (bool(sizes) and all(size == length for size in sizes))


def _is_setting(one: Any) -> bool:
    """Of a tuple such as a size. The numbers of samples are made a tensor when they are collated."""
    return one is None or isinstance(one, int | float | complex) or callable(one) or getattr(one, "shape", None) == ()


def _doubled(field: Any) -> Any:
    if isinstance(field, Tensor):
        return torch.cat([field, field])
    if isinstance(field, list | tuple):
        return field * 2
    return field.repeat(2, axis=0)  # an array


def _is_batched(values: list[Any], length: int) -> bool:
    tensors = [leaf for one in values for _, leaf in _leaves(one) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(one.dim() > 0 and one.shape[0] == length for one in tensors)


def _fields(micro: Any, length: int) -> list[Tensor]:
    """The micro-batch as the library sees it: its tensors by sample, or their number alone."""
    fields = [leaf for _, leaf in _leaves(micro) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    fields = [one for one in fields if one.shape[0] == length and one.layout == torch.strided]
    return fields or [torch.empty(length, 0)]


def _mask_of(batch: Any, name: str) -> Tensor:
    mask = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UsageError(
            f"trim_padding is {name!r}, and the batch has no field of that name that is a mask of shape (samples, "
            "length)"
        )
    return mask


def _trimmed(micro: Any, name: str) -> Any:
    """Without the last columns that are padding in every sample; of every field as long as the mask in dimension 1."""
    mask = _mask_of(micro, name)
    used = mask.ne(0).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    if length == mask.shape[1]:
        return micro

    def cut(value: Any) -> Any:
        members = _members(value)
        if members is not None:
            return _rebuilt(value, [cut(one) for _, one in members])
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == mask.shape:
            return value[:, :length]
        return value

    return cut(micro)


def _fingerprint(batch: Any) -> int:
    crc = 0
    for name, leaf in _leaves(batch):
        crc = zlib.crc32(name.encode(), crc)
        if isinstance(leaf, Tensor):
            values = leaf.detach().cpu().contiguous().reshape(-1)
            crc = zlib.crc32(repr(tuple(leaf.shape)).encode(), crc)
            if values.numel():
                crc = zlib.crc32((ctypes.c_char * values.nbytes).from_address(values.data_ptr()), crc)
        else:
            crc = zlib.crc32(pickle.dumps(leaf), crc)
    return crc
