"""Batches are cut whatever structure they have; what is ambiguous is refused by name."""

import collections
import dataclasses
import time

import pytest
import torch
from conftest import gradients, relative_difference, whole_batch_gradients
from models import ragged
from torch import nn

import microbatch as mb
from microbatch import batches

Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "whole"


X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


def cut(batch, begin=1, end=4, **how):
    return batches.Structure(batch, **how).fetch(begin, end)[0]


@pytest.mark.parametrize("batch", [[X, Y], (X, Y), Pair(X, Y), {"x": X, "y": Y}, Sample(X, Y), collections.OrderedDict(x=X, y=Y),
                                   {"in": {"x": X}, "out": [Y, (Y,)]}, collections.defaultdict(list, x=X, y=Y)])
def test_every_structure_keeps_its_type_and_is_cut_inside(batch):
    micro = cut(batch)
    assert type(micro) is type(batch)
    cut_leaves, leaves = list(batches._leaves(micro)), list(batches._leaves(batch))
    assert [name for name, _ in cut_leaves] == [name for name, _ in leaves]
    for (_, small), (_, whole) in zip(cut_leaves, leaves, strict=True):
        assert torch.equal(small, whole[1:4]) if isinstance(whole, torch.Tensor) else small == whole


def test_a_batch_encoding_stays_one():
    from transformers import BatchEncoding

    micro = cut(BatchEncoding({"input_ids": X}))
    assert isinstance(micro, BatchEncoding)
    assert torch.equal(micro["input_ids"], X[1:4])


def test_lists_of_the_batchs_length_are_cut_and_the_rest_passes_through():
    names, boxes = list("abcdef"), [torch.zeros(i, 4) for i in range(6)]
    micro = cut({"x": X, "names": names, "boxes": boxes, "scale": 2.0, "none": None, "pair": (1, 2)}, length=6)
    assert micro["names"] == ["b", "c", "d"]
    assert [len(one) for one in micro["boxes"]] == [1, 2, 3]
    assert (micro["scale"], micro["none"], micro["pair"]) == (2.0, None, (1, 2))


def test_a_tuple_with_an_entry_for_each_sample_is_cut():
    words = tuple("abcdef")
    targets = tuple({"boxes": torch.zeros(i, 4)} for i in range(6))
    micro = cut({"x": X, "words": words, "targets": targets, "size": (1, 2, 3, 4, 5, 6), "none": (None,) * 6}, length=6)
    assert micro["words"] == ("b", "c", "d")
    assert [len(one["boxes"]) for one in micro["targets"]] == [1, 2, 3]
    assert (micro["size"], micro["none"]) == ((1, 2, 3, 4, 5, 6), (None,) * 6)


def test_a_tuple_of_samples_is_cut_also_where_one_of_them_is_as_long_as_the_batch():
    targets = tuple({"boxes": torch.zeros(i, 4)} for i in (4, 2, 5, 1))
    words = (["a", "b", "c", "d"], ["e"], ["f", "g"], ["h"])
    micro = cut({"x": torch.zeros(4, 3), "targets": targets, "words": words}, 0, 2, length=4)
    assert [len(one["boxes"]) for one in micro["targets"]] == [4, 2]
    assert micro["words"] == words[:2]


@pytest.mark.parametrize("more", [torch.tensor(1.0), "a", X[:2].numpy(), ["a", "b"]])
def test_a_tuple_of_two_fields_is_a_pair_even_where_the_batch_is_two(more):
    x, other = cut((torch.zeros(2, 3), more), 0, 1, length=2)
    assert x.shape == (1, 3)
    assert other is more if isinstance(more, str) or not batches._is_sized(more) else len(other) == 1


@pytest.mark.parametrize("setting", [
    (torch.ones(9, 4), torch.zeros(9, 4)),
    (torch.tensor(0.5), torch.tensor(0.5)),
    (X.numpy()[0, 0], X.numpy()[0, 1]),
    (len, max),
])
def test_a_tuple_that_is_a_setting_is_whole_even_where_it_is_as_long_as_the_batch(setting):
    assert cut({"x": torch.zeros(2, 3), "more": setting}, 0, 1, length=2)["more"] == setting


def test_a_row_of_a_large_tensor_is_known_in_no_time():
    large = torch.zeros(1 << 26)
    started = time.monotonic()
    assert batches._fingerprint([large[:3]]) == batches._fingerprint([torch.zeros(3)])
    assert time.monotonic() - started < 1.0


def test_a_list_of_two_tensors_is_a_pair_even_where_the_batch_is_two():
    x, y = cut([torch.zeros(2, 3), torch.ones(2)], 0, 1)
    assert (x.shape, y.shape) == ((1, 3), (1,))


def test_lengths_that_differ_are_refused_by_name():
    with pytest.raises(mb.UsageError, match=r"batch\['x'\]: 6.*length="):
        cut({"x": X, "weights": torch.ones(4)})
    micro = cut({"x": X, "weights": torch.ones(4)}, length=6)
    assert (len(micro["x"]), len(micro["weights"])) == (3, 4)
    with pytest.raises(mb.UsageError, match="no tensor of the batch has that length"):
        cut({"x": X}, length=5)


@pytest.mark.parametrize("batch", [{}, "text", 3, {"x": torch.tensor(1.0)}, ["a", "b"]])
def test_a_batch_without_samples_is_refused(batch):
    with pytest.raises(mb.UsageError, match="holds no tensor"):
        cut(batch)


def test_padding_that_a_micro_batch_does_not_need_is_cut_off():
    batch = ragged()
    source = batches.Structure(batch, trim_padding="attention_mask")
    for i in range(8):
        micro, fields = source.fetch(i, i + 1)
        length = int(batch["attention_mask"][i].sum())
        assert all(one.shape == (1, length) for one in micro.values())
        assert all(one.shape == (1, length) for one in fields)
    with pytest.raises(mb.UsageError, match="trim_padding is 'mask'"):
        batches.Structure(batch, trim_padding="mask")


def _collate(samples):
    longest = max(len(one) for one in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, one in zip(ids, samples, strict=True):
        row[: len(one)] = one
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def test_samples_are_collated_by_length_and_make_the_same_gradient():
    import models

    model, batch, loss = models.gpt2()
    samples = [row[row > 0] for row in batch["input_ids"]]
    expected = whole_batch_gradients(model, batch, loss)
    sizes = []

    def collate(some):
        micro = _collate(some)
        sizes.append(micro["input_ids"].shape)
        return micro

    mb.Accumulator(model, None, loss, micro_batch=3, collate=collate).gather(samples)
    assert relative_difference(gradients(model), expected) < 1e-6
    lengths = sorted(map(len, samples), reverse=True)
    assert [tuple(one) for one in sizes] == [(3, lengths[0]), (3, lengths[3]), (2, lengths[6])]


def test_micro_batches_bounded_by_tokens_hold_more_short_samples_and_have_the_same_gradient():
    import models

    model, _, loss = models.gpt2()
    samples = [torch.randint(1, 96, (1 + i % 11,)) for i in range(40)]
    expected = whole_batch_gradients(model, _collate(samples), loss)
    sizes = []

    def collate(some):
        micro = _collate(some)
        sizes.append(micro["input_ids"].shape)
        return micro

    accumulator = mb.Accumulator(model, None, loss, micro_batch=4, collate=collate, bound="tokens")
    report = accumulator.gather(samples)
    assert relative_difference(gradients(model), expected) < 1e-6
    assert sum(rows for rows, _ in sizes) == 40
    assert max(rows * width for rows, width in sizes) <= 4 * 11
    assert report.micro_batches == len(sizes) < 10  # of 4 samples each
    assert max(rows for rows, _ in sizes) > 4


def test_after_running_out_of_memory_fewer_tokens_are_taken():
    sizes = []

    class Net(nn.Linear):
        def forward(self, x):
            if x.numel() > 40:
                raise torch.OutOfMemoryError("out of memory")
            sizes.append(tuple(x.shape))
            return super().forward(x.sum(1, keepdim=True))

    samples = [torch.ones(1 + i % 10) for i in range(30)]
    accumulator = mb.Accumulator(Net(1, 1), None, lambda model, micro: (model(micro).sum(), len(micro)), micro_batch=8,
                                 collate=lambda some: nn.utils.rnn.pad_sequence(some, batch_first=True), bound="tokens")
    report = accumulator.gather(samples)
    assert report.weight == 30.0
    assert report.out_of_memory > 0
    assert max(rows * width for rows, width in sizes) <= 40


def test_a_bound_that_does_not_exist_or_needs_lengths_is_refused():
    model = nn.Linear(2, 3)
    with pytest.raises(mb.UsageError, match="bound is 'rows'"):
        mb.Accumulator(model, None, mb.losses.image_classification, bound="rows")
    with pytest.raises(mb.UsageError, match="needs collate="):
        mb.Accumulator(model, None, mb.losses.image_classification, bound="tokens")


def test_a_list_of_samples_without_collate_is_not_taken_for_fields():
    samples = [torch.zeros(12) for _ in range(16)]
    with pytest.raises(mb.UsageError, match="a list of 16 tensors of the same shape, which look like samples: give collate="):
        batches.Structure(samples)
    assert batches.Structure(samples, length=12).size == 12


def test_trimmed_padding_makes_the_same_gradient():
    import models

    model, batch, loss = models.llama()
    expected = whole_batch_gradients(model, batch, loss)
    mb.Accumulator(model, None, loss, micro_batch=2, trim_padding="attention_mask").gather(batch)
    assert relative_difference(gradients(model), expected) < 1e-6


def test_a_batch_is_known_by_its_values():
    one, other = batches.Structure((X, Y)), batches.Structure((X, Y + 1))
    assert one.fingerprint() == batches.Structure((X.clone(), Y)).fingerprint() != other.fingerprint()


def test_a_model_of_tensors_in_a_tuple_steps():
    model = nn.Linear(2, 3)
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters(), lr=0.1), mb.losses.image_classification, micro_batch=4)
    report = accumulator.step((X, Y % 3))
    assert report.applied
    assert report.micro_batches == 2
    assert report.weight == 6.0
