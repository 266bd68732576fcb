"""What the tests of the package share: small models, and the gradient of a batch at once to compare with."""

import contextlib
import ctypes
import gc
import os
import pathlib
import sys
import types

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]

torch.optim.SGD(torch.nn.Linear(1, 1).parameters())  # imports torch's compiler, with as many objects as torch has
gc.freeze()  # torch's own objects: looking through them again takes most of the time of a collection
torch.set_num_threads(1)  # the machine is shared, and two threads that wait for each other become many times slower


def load_fake_device():
    """Makes the accelerator of tests/fake_device the device "fake", and returns its library."""
    built = ROOT / "build/release/tests/libfake_device.so"
    if "MICROBATCH_FAKE_DEVICE" not in os.environ and not built.exists():
        pytest.skip("the fake device is a library of the source tree: make test", allow_module_level=True)
    path = str(pathlib.Path(os.environ.get("MICROBATCH_FAKE_DEVICE", built)).resolve())
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.fake_memory.restype = ctypes.c_int64
    torch.utils.rename_privateuse1_backend("fake")
    if not hasattr(torch, "fake"):

        def get_state(device=None):
            made = torch.empty(5056, dtype=torch.uint8, device="cpu")
            library.fake_get_generator_state(ctypes.c_void_p(made.data_ptr()))
            return made

        def set_state(state, device=None):
            library.fake_set_generator_state(ctypes.c_void_p(state.data_ptr()))

        module = types.ModuleType("torch.fake")
        module.is_available, module.device_count, module.current_device = lambda: True, lambda: 1, lambda: 0
        module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: library.fake_seed(
            ctypes.c_uint64(seed)
        )
        module._initialized, module.get_rng_state, module.set_rng_state = True, get_state, set_state
        module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        module.device = contextlib.nullcontext
        module.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=1 << 30)
        module.set_per_process_memory_fraction = lambda share, device=None: library.fake_set_memory(
            ctypes.c_int64(int(share * (1 << 30)))
        )
        torch._register_device_module("fake", module)
    return library


# The tests run on another device as they are: what they make without naming one is made there.
DEVICE = os.environ.get("MICROBATCH_TEST_DEVICE", "cpu")
if DEVICE.startswith("fake"):
    load_fake_device()
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_budget_left():
    yield
    memory = sys.modules.get("microbatch.memory")
    if memory is not None and memory.stats().budget_bytes is not None:
        memory.set_budget(None)


def gradients(model):
    return {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}


def whole_batch_gradients(model, batch, loss):
    """By torch alone: the mean gradient of the batch at once."""
    total, weight = loss(model, batch)
    (total / float(weight)).backward()
    result = gradients(model)
    model.zero_grad()
    return result


def relative_difference(ours, theirs):
    """Over all parameters: |ours - theirs| / |theirs|."""
    assert {name for name, one in ours.items() if one is not None} == {
        name for name, one in theirs.items() if one is not None
    }
    pairs = [(one, theirs[name]) for name, one in ours.items() if one is not None]
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return (difference / size) ** 0.5


# Beyond the fake device: layers of which torch has no form for devices that it does not know, a compiler that does not know
# it, an operator that it lacks, comparisons with the command or another process on the CPU (also of bytes, which the
# device rounds to 512), and processes of a DataLoader, which have no use of a device.
NOT_ON_FAKE_DEVICE = ("[lstm]", "[gru]", "[compiled]", "mixtral", "of_the_command", "the_command_writes", "killed", "workers")


def pytest_collection_modifyitems(items):
    if DEVICE.startswith("fake"):
        for item in items:
            if any(part in item.name for part in NOT_ON_FAKE_DEVICE):
                item.add_marker(pytest.mark.skip(reason="not on the fake device"))
