"Freed memory: when it stays with the process, and when it goes back."
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from channelslast import keep_memory

libc = ctypes.CDLL(None if os.name == 'posix' else 'msvcrt')
here = pytest.mark.skipif(not hasattr(libc, 'mallinfo2'), reason='no glibc from 2.33')
MIB = 2**20


class Info(ctypes.Structure):
    "What glibc says of its heap, in bytes."
    _fields_ = [(o, ctypes.c_size_t) for o in 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()]


def info():
    libc.mallinfo2.restype = Info
    return libc.mallinfo2()


def mapped(mib) -> bool:
    "Does a tensor get a mapping of its own, which goes back with it?"
    before = info().hblkhd
    x = torch.empty(mib*MIB, dtype=torch.uint8)
    return info().hblkhd >= before + x.numel()


def resident() -> int: return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')


@pytest.fixture(autouse=True)
def as_usual():
    keep_memory(False)  # the bench may have run before
    yield
    keep_memory(False)


@here
def test_what_is_kept_goes_back_at_once():
    before = resident()
    keep_memory()
    torch.ones(128*MIB)
    assert resident() > before + 400*MIB
    keep_memory(False)
    assert resident() < before + 100*MIB


def in_a_new_process(code, **env):
    code = f'from tests.test_malloc import *\n{dedent(code)}'
    subprocess.run([sys.executable, '-c', code], env={**os.environ, **env}, cwd=Path(__file__).parent.parent, check=True)


@here
def test_there_and_back():
    "In a new process, each tensor larger than all freed before: a free block that would do is taken in place of a mapping."
    in_a_new_process("""
        assert mapped(1024)
        for mib in (128, 512):
            assert keep_memory() and not mapped(mib)
            assert keep_memory(False) and mapped(2*mib)""")


@here
def test_a_block_below_the_usual_threshold_comes_from_the_heap():
    "As in a process that has freed large tensors: where glibc starts, at 128 KiB, each would be mapped."
    in_a_new_process('keep_memory(); keep_memory(False); assert mapped(33) and not mapped(31)')


@here
def test_the_environment_does_the_same():
    "As the docstring says."
    in_a_new_process('assert not mapped(1024)', **dict(o.split('=') for o in keep_memory.__doc__.split('`')[1].split()))


@pytest.mark.parametrize('dll', [object(), TypeError('no such library')])
def test_other_c_libraries(monkeypatch, dll):
    "Alpine's and Apple's have no such settings, and Windows no one library: it says so."
    def _dll(name):
        if isinstance(dll, Exception): raise dll
        return dll
    with monkeypatch.context() as mp:
        mp.setattr(ctypes, 'CDLL', _dll)
        assert keep_memory() is False
