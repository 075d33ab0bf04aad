"When the process keeps freed memory, and when it returns it."
import ctypes
import inspect
import os
import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from channelslast import keep_memory

libc = ctypes.CDLL(None if os.name == 'posix' else 'msvcrt')
needs_glibc = pytest.mark.skipif(not hasattr(libc, 'mallinfo2'), reason='needs glibc 2.33 or later')
MIB = 2**20
SETTINGS = 'MALLOC_MMAP_MAX_', 'MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'GLIBC_TUNABLES'


def resident() -> int: return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')


@pytest.fixture(autouse=True)
def default_memory(monkeypatch):
    "No setting of the user in the environment, nor left by another test."
    for name in SETTINGS: monkeypatch.delenv(name, raising=False)
    keep_memory(False)
    yield
    keep_memory(False)


@needs_glibc
def test_keep_memory_keeps_a_freed_tensor_and_False_releases_it_at_once():
    before = resident()
    keep_memory()
    torch.ones(64*MIB)
    assert resident() > before + 200*MIB
    keep_memory(False)
    assert resident() < before + 50*MIB


PROCESS = f"""
import ctypes, importlib.util
spec = importlib.util.spec_from_file_location('glibc_malloc', {inspect.getsourcefile(keep_memory)!r})
malloc = importlib.util.module_from_spec(spec); spec.loader.exec_module(malloc)
libc, MIB = ctypes.CDLL(None), {MIB}
class Info(ctypes.Structure):  # statistics of glibc's heap, in bytes
    _fields_ = [(o, ctypes.c_size_t) for o in 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()]
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
def mapped(mib):  # True if a block gets its own memory mapping, which is released with it
    before, p = libc.mallinfo2().hblkhd, ctypes.c_void_p(libc.malloc(ctypes.c_size_t(mib*MIB)))
    after = libc.mallinfo2().hblkhd
    libc.free(p)
    return after >= before + mib*MIB
"""

def run_in_a_new_process(code, **env):
    "Without PyTorch, whose import takes seconds and allocates much."
    subprocess.run([sys.executable, '-c', PROCESS + dedent(code)], env={**os.environ, **env}, check=True)


@needs_glibc
def test_keep_memory_and_back_in_a_new_process():
    "With larger and larger blocks, since a free block that is large enough is used instead of a mapping."
    run_in_a_new_process("""
        assert mapped(1024)
        for mib in (128, 512):
            assert malloc.keep_memory() and not mapped(mib)
            assert malloc.keep_memory(False) and mapped(2*mib)""")


@needs_glibc
def test_after_keep_memory_False_blocks_up_to_32_MiB_come_from_the_heap():
    "As in a process that has freed large tensors. With glibc's initial threshold of 128 KiB, both blocks would be mapped."
    run_in_a_new_process('malloc.keep_memory(); malloc.keep_memory(False); assert mapped(33) and not mapped(31)')


@needs_glibc
def test_the_environment_variables_in_the_docstring_have_the_same_effect():
    variables = dict(o.split('=') for o in keep_memory.__doc__.split('`')[1].split())
    assert {*variables} <= {*SETTINGS}
    run_in_a_new_process('assert not mapped(1024)', **variables)


@pytest.mark.parametrize('dll', [object(), TypeError('no such library')])
def test_keep_memory_returns_False_with_other_c_libraries(monkeypatch, dll):
    "Alpine's and Apple's libraries lack these settings, and Windows has no single C library."
    def _dll(name):
        if isinstance(dll, Exception): raise dll
        return dll
    with monkeypatch.context() as mp:
        mp.setattr(ctypes, 'CDLL', _dll)
        assert keep_memory() is False
