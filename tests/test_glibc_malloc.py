"When the process keeps freed memory, and when it returns it."
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from fastai.vision.all import Optimizer

from channelslast import keep_memory
from channelslast.core.glibc_malloc import memory_is_default, set_memory
from channelslast.find import predict_benchmark, train_benchmark
from tests.conftest import learner

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


# what `format_find` measures

SETTINGS = 'MALLOC_MMAP_MAX_', 'MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'GLIBC_TUNABLES'


@needs_glibc
def test_the_users_setting_is_remembered(monkeypatch):
    for name in SETTINGS: monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('MALLOC_ARENA_MAX', '2')  # does not matter
    assert memory_is_default()
    keep_memory()
    assert not memory_is_default() and set_memory(False) and not memory_is_default()
    keep_memory(False)
    assert memory_is_default() and set_memory(True) and memory_is_default()  # a trial


@needs_glibc
@pytest.mark.parametrize('name', SETTINGS)
def test_the_environment_is_the_users_setting(monkeypatch, name):
    monkeypatch.setenv(name, '0')
    assert not memory_is_default()


@needs_glibc
def test_new_pages_are_counted():
    in_a_new_process("""
        from channelslast.core.glibc_malloc import page_faults
        before = page_faults(); x = torch.ones(64*MIB); assert page_faults() - before > 64  # huge pages, or more of 4 KiB
        before = page_faults(); x.fill_(2.); assert page_faults() - before < 64""")


@pytest.fixture
def memory(monkeypatch):
    """`memory(usual, kept, faults)`: a step takes these milliseconds, the first one after each switch 900, and gets so
    many pages. Returns the settings in their order."""
    def _memory(usual=100., kept=80., faults=10**6):
        def _set(keep): settings.append(keep); new[:] = [1]; return True
        def _ms(learn, batch):
            real(learn, batch)
            pages[0] += faults
            return 900. if new and new.pop() else kept if settings and settings[-1] else usual
        real = train_benchmark.step_ms
        monkeypatch.setattr(train_benchmark, 'memory_is_default', lambda: True)
        monkeypatch.setattr(train_benchmark, 'page_faults', lambda: pages[0])
        monkeypatch.setattr(train_benchmark, 'set_memory', _set)
        for m in train_benchmark, predict_benchmark: monkeypatch.setattr(m, 'step_ms', _ms)
        return settings
    settings, new, pages = [], [], [0]
    return _memory


def find(learn=None, **kw):
    return (learn or learner()).format_find(**dict(num_it=3, show_plot=False, precisions='fp32', formats='contiguous', optimizer=False) | kw)


@pytest.mark.parametrize('train, said', [(True, '`keep_memory()` makes the step 1.25× as fast: call it before training.'),
                                         (False, '`keep_memory()` makes predictions 1.25× as fast: call it before predicting.')])
def test_the_verdict_says_what_kept_memory_gains(memory, capsys, train, said):
    "The setting stays the user's to make."
    settings = memory()
    t = find(train=train)
    assert t.memory_gain == 1.25 and said in t.verdict and settings == [False, True]*train_benchmark.MEMORY_ROUNDS + [False]
    assert {r.ms for r in t.rows} == {100.}  # the race was before
    capsys.readouterr()
    learner().to_fastest(num_it=3, precisions='fp32', formats='contiguous', optimizer=False, train=train)
    assert capsys.readouterr().out.endswith(f'1.00× as fast as contiguous fp32. {said}\n')


@pytest.mark.parametrize('kept, faults, gain', [(99., 10**6, 100/99), (100/1.05, 10**6, 1.05), (120., 10**6, 1/1.2), (10., 49, None)])
def test_small_gains_are_not_said(memory, kept, faults, gain):
    "Steps of 100 ms with 49 new pages, each less than 0.1 ms, can't gain 5%: then the process is left alone."
    settings = memory(100., kept, faults)
    t = find()
    assert t.memory_gain == (gain and pytest.approx(gain)) and 'keep_memory' not in t.verdict and bool(settings) == (gain is not None)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('k', range(1, 5))
def test_the_setting_comes_back_after_an_interruption(memory, monkeypatch, error, k):
    settings = memory()
    real = train_benchmark.step_ms
    def _ms(learn, batch):
        ms = real(learn, batch)
        if settings and settings.count(True) + settings.count(False) == k: raise error
        return ms
    monkeypatch.setattr(train_benchmark, 'step_ms', _ms)
    learn = learner()
    if error is RuntimeError: assert find(learn).memory_gain is None and find(learn).rows[0].valid
    else:
        with pytest.raises(error): find(learn)
    assert settings[-1] is False


def test_the_optimizer_takes_part(memory, monkeypatch):
    "Its temporary tensors take memory, too."
    settings, ran = memory(), []
    step = Optimizer.step
    monkeypatch.setattr(Optimizer, 'step', lambda self: ran.append(bool(settings)) or step(self))
    find()
    assert ran.count(True) == 2*2*train_benchmark.MEMORY_ROUNDS


@pytest.mark.parametrize('usual', [lambda: False, None])
def test_nothing_is_set_for_users_who_chose_or_elsewhere(memory, monkeypatch, usual):
    settings = memory()
    if usual: monkeypatch.setattr(train_benchmark, 'memory_is_default', usual)
    else:
        monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
        monkeypatch.setattr(train_benchmark, 'memory_is_default', memory_is_default)
    assert find().memory_gain is None and not settings
