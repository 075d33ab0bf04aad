"When the process keeps freed memory, and when it returns it."
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
needs_glibc = pytest.mark.skipif(not hasattr(libc, 'mallinfo2'), reason='needs glibc 2.33 or later')
MIB = 2**20


class Info(ctypes.Structure):
    "Statistics of glibc's heap, in bytes."
    _fields_ = [(o, ctypes.c_size_t) for o in 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()]


def info():
    libc.mallinfo2.restype = Info
    return libc.mallinfo2()


def mapped(mib) -> bool:
    "True if a tensor gets its own memory mapping, which is released with it."
    before = info().hblkhd
    x = torch.empty(mib*MIB, dtype=torch.uint8)
    return info().hblkhd >= before + x.numel()


def resident() -> int: return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')


@pytest.fixture(autouse=True)
def as_usual():
    keep_memory(False)  # a benchmark may have run before
    yield
    keep_memory(False)


@needs_glibc
def test_what_is_kept_goes_back_at_once():
    before = resident()
    keep_memory()
    torch.ones(128*MIB)
    assert resident() > before + 400*MIB
    keep_memory(False)
    assert resident() < before + 100*MIB


def in_a_new_process(code, **env):
    code = f'from tests.test_glibc_malloc import *\n{dedent(code)}'
    subprocess.run([sys.executable, '-c', code], env={**os.environ, **env}, cwd=Path(__file__).parent.parent, check=True)


@needs_glibc
def test_there_and_back():
    "In a new process, with larger and larger tensors, since a free block that is large enough is used instead of a mapping."
    in_a_new_process("""
        assert mapped(1024)
        for mib in (128, 512):
            assert keep_memory() and not mapped(mib)
            assert keep_memory(False) and mapped(2*mib)""")


@needs_glibc
def test_a_block_below_the_usual_threshold_comes_from_the_heap():
    "As in a process that has freed large tensors. With glibc's initial threshold of 128 KiB, both tensors would be mapped."
    in_a_new_process('keep_memory(); keep_memory(False); assert mapped(33) and not mapped(31)')


@needs_glibc
def test_the_environment_does_the_same():
    "The variables in the docstring have the same effect."
    in_a_new_process('assert not mapped(1024)', **dict(o.split('=') for o in keep_memory.__doc__.split('`')[1].split()))


@pytest.mark.parametrize('dll', [object(), TypeError('no such library')])
def test_other_c_libraries(monkeypatch, dll):
    "Returns False: Alpine's and Apple's libraries lack these settings, and Windows has no single C library."
    def _dll(name):
        if isinstance(dll, Exception): raise dll
        return dll
    with monkeypatch.context() as mp:
        mp.setattr(ctypes, 'CDLL', _dll)
        assert keep_memory() is False
