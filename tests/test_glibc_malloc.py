"When the process keeps freed memory, and when it returns it."
import ctypes
import inspect
import os
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from fastai.vision.all import Optimizer
from pytest import approx

from channelslast import keep_memory
from channelslast.core.glibc_malloc import memory_is_default, set_memory
from .helpers import find, learner, on_fake_gpu

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


@needs_glibc
def test_page_faults_counts_new_pages():
    run_in_a_new_process("""
        before = malloc.page_faults(); x = bytearray(64*MIB); assert malloc.page_faults() - before > 16  # huge pages, or more of 4 KiB
        before = malloc.page_faults(); x[::4096] = bytes(len(x[::4096])); assert malloc.page_faults() - before < 16""")


@pytest.mark.parametrize('dll', [object(), TypeError('no such library')])
def test_keep_memory_returns_False_with_other_c_libraries(monkeypatch, dll):
    "Alpine's and Apple's libraries lack these settings, and Windows has no single C library."
    def _dll(name):
        if isinstance(dll, Exception): raise dll
        return dll
    with monkeypatch.context() as mp:
        mp.setattr(ctypes, 'CDLL', _dll)
        assert keep_memory() is False and not memory_is_default()


@needs_glibc
def test_memory_is_default_until_keep_memory_is_called(monkeypatch):
    monkeypatch.setenv('MALLOC_ARENA_MAX', '2')  # does not matter
    assert memory_is_default()
    keep_memory()
    assert not memory_is_default() and set_memory(False) and not memory_is_default()
    keep_memory(False)
    assert memory_is_default() and set_memory(True) and memory_is_default()  # a trial


@needs_glibc
@pytest.mark.parametrize('name', SETTINGS)
def test_memory_is_not_default_with_a_variable_in_the_environment(monkeypatch, name):
    monkeypatch.setenv(name, '0')
    assert not memory_is_default()


def test_memory_is_not_default_on_other_systems(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert not memory_is_default()


# what `format_find` measures

class Glibc:
    "A C library that records whether freed memory is kept, and how often that was set."
    def __init__(self): self.kept, self.calls, self.trimmed = False, 0, 0
    def mallopt(self, name, value):
        if name == -4: self.kept, self.calls = value == 0, self.calls + 1  # M_MMAP_MAX of glibc's malloc.h
        return 1
    def malloc_trim(self, pad): self.trimmed += 1; return 1


@pytest.fixture
def memory(monkeypatch, fake_steps):
    """`memory(usual, kept, faults)`: a step takes these milliseconds, the first one after each switch 900, and gets so
    many pages from the system. Returns the C library."""
    glibc, real, resource = Glibc(), ctypes.CDLL, pytest.importorskip('resource')
    def _memory(usual=100., kept=80., faults=10**6):
        pages, seen = [0], [0]
        def _ms(setting, n):
            pages[0] += faults
            if glibc.calls != seen[0]: seen[0] = glibc.calls; return 900.
            return kept if glibc.kept else usual
        class Usage: ru_minflt = property(lambda self: pages[0])
        monkeypatch.setattr(resource, 'getrusage', lambda who: Usage())
        monkeypatch.setattr(ctypes, 'CDLL', lambda name, *args, **kwargs: glibc if name is None else real(name, *args, **kwargs))
        monkeypatch.setattr(sys, 'platform', 'linux')
        fake_steps(_ms)
        return glibc
    return _memory


FEW = dict(precisions='fp32', formats='contiguous', optimizer=False, num_it=3)


@pytest.mark.parametrize('train, said', [(True, '`keep_memory()` makes the step 1.25× as fast: call it before training.'),
                                         (False, '`keep_memory()` makes predictions 1.25× as fast: call it before predicting.')])
def test_the_verdict_and_to_fastest_say_what_keep_memory_gains(memory, capsys, train, said):
    "The setting stays the user's to make."
    glibc = memory()
    t = find(train=train, **FEW)
    assert t.memory_gain == approx(1.25) and said in t.verdict and glibc.calls and not glibc.kept and glibc.trimmed
    assert [r.ms for r in t.rows] == approx([100.]*len(t.rows))  # measured before
    capsys.readouterr()
    learner().to_fastest(train=train, **FEW)
    assert capsys.readouterr().out.endswith(f'1.00× as fast as contiguous fp32. {said}\n') and not glibc.kept


@pytest.mark.parametrize('kept, faults, gain', [(99., 10**6, 100/99), (120., 10**6, 1/1.2), (10., 10, None)])
def test_small_gains_of_keep_memory_are_not_said(memory, kept, faults, gain):
    "Steps of 100 ms with 10 new pages can't gain 5%: then the process is left alone."
    glibc = memory(100., kept, faults)
    t = find(**FEW)
    assert t.memory_gain == (gain and approx(gain)) and 'keep_memory' not in t.verdict and bool(glibc.calls) == (gain is not None)


@pytest.mark.parametrize('k, error', [(1, RuntimeError), (2, KeyboardInterrupt), (4, RuntimeError)])
def test_memory_is_default_again_after_an_error_or_interrupt_while_keep_memory_is_measured(memory, k, error):
    glibc = memory()
    class Loss:
        def __call__(self, p, y, **kwargs):
            if glibc.calls >= k and armed: raise error
            return torch.nn.functional.cross_entropy(p, y, **kwargs)
    armed, learn = [1], learner()
    learn.loss_func = Loss()
    if error is RuntimeError: t = find(learn, **FEW); assert t.memory_gain is None and t.rows[0].valid
    else:
        with pytest.raises(error): find(learn, **FEW)
    assert glibc.calls > k and not glibc.kept


def test_the_optimizer_takes_part_while_keep_memory_is_measured(memory, monkeypatch):
    "Its temporary tensors take memory, too."
    glibc, ran, step = memory(), [], Optimizer.step
    monkeypatch.setattr(Optimizer, 'step', lambda self: ran.append(glibc.kept if glibc.calls else None) or step(self))
    find(**FEW)
    assert ran.count(True) == ran.count(False) > 1


@pytest.mark.parametrize('kept_by', ['keep_memory', 'environment', 'other library'])
def test_memory_is_not_measured_for_users_who_chose_or_where_it_cannot_be_set(memory, monkeypatch, kept_by):
    glibc = memory()
    if kept_by == 'keep_memory': keep_memory()
    if kept_by == 'environment': monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '-1')
    if kept_by == 'other library': monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
    calls = glibc.calls
    assert find(**FEW).memory_gain is None and glibc.calls == calls


def test_memory_is_not_measured_on_a_gpu(memory, monkeypatch):
    glibc = memory()
    assert find(on_fake_gpu(monkeypatch), **FEW).memory_gain is None and not glibc.calls
