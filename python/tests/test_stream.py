"""Data that is an iterable: drawn in its own order, and resumed where it was."""

import multiprocessing
import os
import random
import signal

import models
import pytest
import torch
from runs import lines, pairs, trained, trainer
from torch.utils.data import DataLoader, IterableDataset

import microbatch as mb
from microbatch.stream import Stream

SAMPLES = pairs(40)


class Plain(IterableDataset):
    """Without a state of its own; shuffled through a buffer, by Python's generator, and noisy, by torch's."""

    def __iter__(self):
        buffer = []
        for x, y in SAMPLES:
            buffer.append((x + 0.1 * torch.randn(6), y))
            if len(buffer) == 8:
                yield buffer.pop(random.randrange(8))
        random.shuffle(buffer)
        yield from buffer


class Own:
    """With a state of its own, which it counts itself."""

    def __init__(self):
        self.at = 0
        self.drawn = 0

    def __iter__(self):
        while self.at < len(SAMPLES):
            x, y = SAMPLES[self.at]
            self.at += 1
            self.drawn += 1
            yield x + 0.1 * torch.randn(6), y
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Late(Own):
    """As the streams of `datasets`: what was loaded is a part of the state only once it is iterated."""

    def __init__(self):
        super().__init__()
        self.loaded = None
        self.state = {"at": 0}

    def __iter__(self):
        self.at, self.loaded = self.loaded or 0, None
        for sample in super().__iter__():
            self.state = {"at": self.at}
            yield sample

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.loaded = state["at"]


def generator():
    while True:
        yield from Plain()


def run(folder, data, **how):
    """As in a process of its own."""
    random.seed(5)
    torch.manual_seed(5)
    return trainer(folder, data=data, **({"batch": 12, "micro_batch": 5, "steps": 9, "checkpoint_every": 2} | how))


@pytest.mark.parametrize("data", [Plain, Own, Late, generator])
def test_a_run_that_stops_in_the_middle_of_a_batch_and_resumes_has_the_same_bits(tmp_path, data):
    run(tmp_path / "whole", data()).train()
    for stop in (1, 8, 14, 20):
        calls = 0

        def loss(model, micro, last=stop):
            nonlocal calls
            calls += 1
            if calls == last + 10:  # those of the plan and of verify come first
                raise LookupError
            return models.mlp()[2](model, micro)

        loss.__qualname__ = "loss"
        try:
            run(tmp_path / "cut", data(), resume=True, loss=loss).train()
        except LookupError:
            continue
    run(tmp_path / "cut", data(), resume=True).train()
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")
    assert len(lines(tmp_path / "whole")) == 9


class Failing:
    """Whose connection fails once."""

    def __init__(self, data, after):
        self.data, self.after = data, after

    def __iter__(self):
        for i, sample in enumerate(self.data):
            if i == self.after:
                self.after = None
                raise OSError("the connection failed")
            yield sample


@pytest.mark.parametrize("again", [False, True])
def test_a_run_whose_data_fails_is_resumed_at_the_same_sample(tmp_path, again):
    run(tmp_path / "whole", Plain()).train()
    failing = run(tmp_path / "cut", Failing(Plain(), 30), checkpoint_every=100)
    with pytest.raises(OSError, match="the connection failed"):
        failing.train()
    if again:
        failing.resume = True
        failing.train()
    else:
        run(tmp_path / "cut", Plain(), resume=True).train()
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


def test_a_last_smaller_batch_that_was_interrupted_loses_no_sample_when_the_run_becomes_longer():
    first = Stream(range(100), batch=4)
    first.arrange([1, 2, 3, 4])
    first.arrange([5, 6])  # the rest
    second = Stream(range(100), batch=4)
    second.prepare(first.save())()
    again = Stream(range(100), batch=4)
    again.prepare(second.save())()  # not begun, either
    for stream in (second, again):
        stream.arrange([5, 6, 7, 8])
        assert stream.get([5, 6, 7, 8])[0].tolist() == [4, 5, 6, 7]


def test_a_generator_cannot_be_resumed_by_the_trainer_that_has_read_it(tmp_path):
    one = run(tmp_path / "run", generator(), steps=4, resume=True)
    with pytest.raises(LookupError):
        one.train(on_step=lambda step: [][step["step"]])
    with pytest.raises(mb.UsageError, match="was read before: give an object whose __iter__ begins anew"):
        one.train()


def test_a_generator_that_another_trainer_has_read_is_refused(tmp_path):
    data = generator()
    with pytest.raises(LookupError):
        run(tmp_path / "run", data).train(on_step=lambda step: [][step["step"]])
    with pytest.raises(mb.UsageError, match="a generator, was read before"):
        run(tmp_path / "run", data, resume=True).train()


def test_an_iterable_that_begins_anew_and_returns_itself_has_epochs():
    class Self:
        def __iter__(self):
            self.at = 0
            return self

        def __next__(self):
            self.at += 1
            if self.at > 6:
                raise StopIteration
            return self.at

    stream = Stream(Self(), batch=4)
    numbers = []
    for batch in range(4):
        stream.arrange([4 * batch + i for i in range(4)])
        numbers += stream.get([4 * batch + i for i in range(4)])[0].tolist()
    assert numbers == [1, 2, 3, 4, 5, 6] * 2 + [1, 2, 3, 4]


def test_a_function_of_lengths_that_raises_loses_no_sample():
    fails = False

    def length_of(sample):
        if fails and sample > 4:
            raise ValueError("no length")
        return 1

    stream = Stream(range(100), batch=4, lengths=length_of)
    stream.arrange([1, 2, 3, 4])
    fails = True
    with pytest.raises(ValueError, match="no length"):
        stream.arrange([5, 6, 7, 8])
    again = Stream(range(100), batch=4)
    again.prepare(stream.save())()
    again.arrange([5, 6, 7, 8])
    assert again.get([5, 6, 7, 8])[0].tolist() == [4, 5, 6, 7]


def test_a_restart_that_fails_is_tried_again_to_the_same_sample():
    class Once:
        fails = False

        def __iter__(self):
            for i in range(100):
                if i == 5 and self.fails:
                    self.fails = False
                    raise OSError("the connection failed")
                yield i

    stream = Stream(data := Once(), batch=4)
    for first in (0, 4, 8):
        stream.arrange(list(range(first, first + 4)))
    stream.close()
    data.fails = True
    with pytest.raises(OSError, match="the connection failed"):
        stream.arrange([12, 13, 14, 15])
    assert stream.save()["start"] == 12
    stream.arrange([12, 13, 14, 15])
    assert stream.get([12, 13, 14, 15])[0].tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize("persistent", [False, True])
def test_the_workers_of_a_loader_end_with_the_training_and_do_not_hear_ctrl_c(persistent):
    loader = DataLoader(list(range(100)), batch_size=None, num_workers=1, persistent_workers=persistent)
    stream = Stream(loader, batch=4)
    stream.arrange([1, 2, 3, 4])
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    stream.arrange([5, 6, 7, 8])
    assert stream.get([5, 6, 7, 8])[0].tolist() == [4, 5, 6, 7]
    stream.close()
    assert not multiprocessing.active_children()


def test_samples_far_apart_have_other_random_numbers():
    def noise():
        while True:
            yield torch.randn(1), random.random()

    stream = Stream(noise(), lambda samples: samples, batch=1)
    values = set()
    for number in (0, 1, 4096, 1 << 20, 1 << 32):
        stream._number = number
        stream.arrange([number])
        values.add(tuple(map(float, stream.get([number])[0][0])))
    assert len(values) == 5


def test_an_interrupted_batch_goes_on_with_its_own_samples(tmp_path):
    run(tmp_path / "whole", Own()).train()
    first = run(tmp_path / "cut", Own())
    seen = 0

    def loss(model, micro):
        nonlocal seen
        seen += 1
        if seen == 3 * 4 + 2 + 10:
            os.kill(os.getpid(), signal.SIGINT)
        return models.mlp()[2](model, micro)

    first.loss = loss
    with pytest.raises(KeyboardInterrupt):
        first.train()
    run(tmp_path / "cut", Own(), resume=True).train()
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


def test_a_state_of_its_own_is_used_and_nothing_read_twice(tmp_path):
    run(tmp_path / "run", Own(), steps=6).train()
    data = Own()
    run(tmp_path / "run", data, steps=9, resume=True).train()
    assert data.drawn <= (3 + 1 + 1) * 12  # three batches, the one that was done, and one for the plan


def test_every_sample_is_used_once_an_epoch():
    stream = Stream(range(10), batch=4)
    numbers = []
    for batch in range(5):
        names = [100 * batch + i for i in range(4)]
        assert stream.arrange(names) == names
        assert stream.arrange(names) == names  # again, as after an interrupt
        numbers += stream.get(names)[0].tolist()
    assert numbers == [*range(10), *range(10)]


def test_the_samples_of_a_batch_are_taken_by_length():
    stream = Stream((torch.ones(n) for n in (1, 3, 2)), collate=lambda samples: [len(one) for one in samples],
                    batch=3, lengths=len, by_tokens=True)
    stream.arrange([7, 8, 9])
    assert stream.get([7, 8, 9])[0] == [3, 2, 1]
    assert [stream.length(name) for name in (7, 8, 9)] == [3, 2, 1]


def test_out_of_memory_repeats_the_samples(tmp_path):
    def train(name):
        most = 12

        def loss(model, micro):
            if len(micro[0]) > most:
                raise torch.OutOfMemoryError("out of memory")
            return models.mlp()[2](model, micro)

        def after(step):
            nonlocal most
            if step["step"] == 2 and name == "retried":
                most = 3
            elif step["step"] == 2:
                one.accumulator.plan = mb.Plan(3)

        one = run(tmp_path / name, Own(), micro_batch=6, loss=loss)
        return one.train(after)

    assert [train(name).out_of_memory for name in ("retried", "planned")] == [1, 0]
    assert trained(tmp_path / "retried") == trained(tmp_path / "planned")


@pytest.mark.parametrize(("data", "how", "said"), [
    (Own(), {"steps": None}, "an iterable, whose length is not known: give steps="),
    (Own(), {"workers": 2}, "workers= is for data that can be indexed"),
    (Own(), {"lengths": [1, 2]}, "for an iterable it is a function of a sample"),
    (DataLoader(SAMPLES, batch_size=4), {}, "a DataLoader, which makes batches: give its dataset"),
    (DataLoader(SAMPLES, batch_sampler=[[0, 1], [2, 3]]), {}, "a DataLoader, which makes batches: give its dataset"),
    (Own(), {"collate_fn": 3}, "collate_fn is a int"),
])
def test_what_an_iterable_cannot_have_is_refused(tmp_path, data, how, said):
    with pytest.raises(mb.UsageError, match=said):
        run(tmp_path / "run", data, **how)


@pytest.mark.parametrize(("data", "said"), [
    (iter(SAMPLES[:30]), "has ended after 30 samples, does not begin again, and the run needs more"),
    (iter([]), "a list_iterator, has no samples"),
])
def test_an_iterator_that_ends_too_early_says_so(tmp_path, data, said):
    with pytest.raises(mb.UsageError, match=said):
        run(tmp_path / "run", data).train()


def test_an_iterable_without_samples_says_so(tmp_path):
    class Empty(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(mb.UsageError, match="has no samples"):
        run(tmp_path / "run", Empty()).train()


@pytest.mark.parametrize(("state", "said"), [
    ({"file": Own()}, "holds more than numbers, text, tensors"),
    ([3], "returned a list, not a dict"),
])
def test_a_state_that_a_checkpoint_would_not_load_is_refused(tmp_path, state, said):
    class Odd(Own):
        def state_dict(self):
            return state

    with pytest.raises(mb.UsageError, match=said):
        run(tmp_path / "run", Odd()).train()
    assert not (tmp_path / "run").exists()


def test_data_that_had_a_state_is_not_resumed_without(tmp_path):
    run(tmp_path / "run", Own(), steps=2).train()
    with pytest.raises(mb.BadData, match="has no load_state_dict"):
        run(tmp_path / "run", Plain(), steps=4, resume=True).train()


def test_the_generators_of_the_training_are_left_alone(tmp_path):
    stream = Stream(Plain(), batch=4)
    torch.manual_seed(7)
    random.seed(7)
    before = torch.get_rng_state(), random.getstate()
    stream.arrange([1, 2, 3, 4])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
