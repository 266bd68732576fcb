"""Our safetensors files as the format's own reader has them: safetensors_python.py WRITER, see safetensors_python.cpp."""
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file

dtypes = {'Double': 'F64', 'Float': 'F32', 'Half': 'F16', 'BFloat16': 'BF16', 'Long': 'I64', 'Int': 'I32',
          'Short': 'I16', 'Char': 'I8', 'Byte': 'U8', 'Bool': 'BOOL'}
numpy_types = {'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'I64': 'i8', 'I32': 'i4', 'I16': 'i2', 'I8': 'i1', 'U8': 'u1',
               'BOOL': '?'}


def numbers(shape, dtype):
    """Element i in row-major order; the same formula is in the C++."""
    digits = np.arange(np.prod(shape, dtype=int)) * 37 % 101
    if dtype == 'BOOL':
        return (digits % 3 == 0).reshape(shape)
    if dtype in ('F64', 'F32', 'F16', 'BF16'):
        digits = (digits - 50) / 8
    elif dtype != 'U8':
        digits = digits - 50
    return digits.astype(numpy_types.get(dtype, 'f4')).reshape(shape)  # NumPy has no bfloat16


def value_of(entry):
    """What the reader gives of a tensor, as bytes, made into numbers here."""
    data = bytes(entry['data'])
    if entry['dtype'] == 'BF16':  # the upper half of a float32
        halves = np.frombuffer(data, '<u2').astype('<u4') << 16
        return halves.view('<f4').reshape(entry['shape'])
    return np.frombuffer(data, '<' + numpy_types[entry['dtype']]).reshape(entry['shape'])


def expect(path, wanted):
    found = dict(deserialize(path.read_bytes()))
    assert found.keys() == wanted.keys(), (path, found.keys() ^ wanted.keys())
    for name, (shape, dtype) in wanted.items():
        assert found[name]['dtype'] == dtype, (path, name, found[name]['dtype'])
        assert tuple(found[name]['shape']) == shape, (path, name, found[name]['shape'])
        assert np.array_equal(value_of(found[name]), numbers(shape, dtype)), (path, name)
    if 'BF16' not in {dtype for _, dtype in wanted.values()}:  # which numpy has not
        for name, value in load_file(path).items():
            assert np.array_equal(value, numbers(*wanted[name])), (path, name)
    with safe_open(path, 'numpy') as file:
        assert set(file.keys()) == wanted.keys()


every_dtype = {f'dtype.{name}': ((3, 5), dtype) for name, dtype in dtypes.items()} | {
    'scalar': ((), 'F32'), 'empty': ((0, 4), 'F32'), 'columns': ((4, 6), 'F32'), 'channels.last': ((2, 3, 4, 5), 'F32'),
    'strided': ((9,), 'F32'), 'naïve "name"\n\\': ((2,), 'F32')}
buffer, weight, generator = ((7,), 'F32'), ((4, 6), 'F32'), ((5056,), 'U8')
files = {'model': every_dtype | {'buffer': buffer},
         'optimizer': {'weight/0': weight, 'weight/1': ((), 'F32')},
         'rng': {'cpu': generator},
         'recovery': {f'0/model/{name}': wanted for name, wanted in every_dtype.items()},
         'batch': {'gradient/weight': weight}}

with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.argv[1], folder], check=True)
    assert {path.stem for path in Path(folder).glob('*.safetensors')} == files.keys()
    for stem, tensors in files.items():
        expect(Path(folder) / f'{stem}.safetensors', tensors)
