"How the suite runs: processes, markers, notebooks and doctests; fixtures. Models, Learners and states are in helpers.py."
import gc
import os
import re
import sys
import time
from copy import deepcopy

import pytest
import torch
from fastai.vision.all import Learner, ProgressCallback, defaults

from channelslast import less_random
from channelslast.core import devices
from channelslast.predict.runtimes import missing_packages
from .helpers import Clock, Compilations, PretendGPU, setting_of, use_backend

collect_ignore = ['two_processes.py', 'conv_fuzz.py', 'notebooks.py', 'helpers.py', 'bench']  # doctest would import them
MAX_PROCESSES = 8  # each takes 1 to 2 GB; more would wait for the longest tests


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    "Run whole folders in one process per core, with one thread each. Tests that share a GPU run in one process."
    whole = all(os.path.isdir(o) for o in config.args)
    if getattr(config.option, 'numprocesses', 0) is not None or not whole or hasattr(config, 'workerinput'): return
    config.option.numprocesses = config.option.maxprocesses = min(os.cpu_count() or 1, MAX_PROCESSES)
    config.option.dist = 'loadgroup'
    os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')  # read by the processes that start now


def pytest_addoption(parser):
    parser.addoption('--accelerates', default='none', help="the dtypes that tests take the machine to be fast in, unless "
                     "they say so themselves: 'none' (default), 'bf16', 'fp16,bf16', or 'native' for those of this machine")


def pytest_configure(config):
    asked = config.getoption('accelerates')
    if asked not in ('native', 'none') and not {*asked.split(',')} <= {'fp16', 'bf16'}:
        raise pytest.UsageError(f"--accelerates {asked}: use native, none, bf16 or fp16,bf16")
    config.addinivalue_line('markers', 'slow: runs with `-m slow` only')
    config.addinivalue_line('markers', 'cuda: needs a CUDA GPU')
    config.addinivalue_line('markers', 'zoo: one test per architecture; `-m slow` runs every tenth, `-m zoo` all')
    if not config.option.markexpr and all(os.path.isdir(o) for o in config.args): config.option.markexpr = 'not slow'
    config.option.nbmake, config.option.nbmake_timeout = True, 300  # each notebook in nbs/ runs as a test
    config.option.doctestmodules = True  # the examples in docstrings


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config, items):
    zoo = [o for o in items if o.get_closest_marker('zoo')]
    for o in zoo[::10] if len(zoo) > 10 else zoo: o.add_marker('slow')
    if 'zoo' not in config.option.markexpr:
        left = {o for o in zoo if not o.get_closest_marker('slow')}
        items[:] = [o for o in items if o not in left]
        config.hook.pytest_deselected(items=[*left])
    no_openvino = missing_packages('openvino')
    for o in items:
        if o.path.suffix == '.ipynb' and o.path.stem != FAST_NOTEBOOK: o.add_marker('slow')
        if no_openvino and o.path.suffix == '.ipynb' and "CompilePredictions('openvino')" in o.path.read_text():
            o.add_marker(pytest.mark.skip(reason=f'needs `{no_openvino}`'))
        if not o.get_closest_marker('cuda'): continue
        o.add_marker(pytest.mark.xdist_group('cuda'))
        if not torch.cuda.is_available(): o.add_marker(pytest.mark.skip(reason='no CUDA GPU on this machine'))


FAST_NOTEBOOK = '01_callback'  # the only one in the fast suite
ZOO = pytest.StashKey()


@pytest.fixture
def zoo_report(record_property):
    "Record one architecture as a table row whose columns `heading` names. All rows are printed at the end."
    def _report(heading, *cells): record_property(heading, ' | '.join(['', *map(str, cells), '']).strip())
    return _report


def pytest_terminal_summary(terminalreporter):
    tables = {}
    for reports in terminalreporter.stats.values():
        for heading, row in (p for r in reports for p in getattr(r, 'user_properties', ()) if getattr(r, 'when', '') == 'call'):
            tables.setdefault(heading, []).append(row)
    for heading, rows in tables.items():
        terminalreporter.section('zoo')
        for row in [heading, re.sub(r'[^|]+', '---', heading), *rows]: terminalreporter.write_line(row)
        terminalreporter.write_line(f"{sum(o.endswith('| equal |') for o in rows)} of {len(rows)} architectures equal")


def pytest_collection_finish():
    "The package collects garbage often, which takes half as long without all that is imported by now."
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "No progress bars, and the same seed for each test."
    monkeypatch.setattr(defaults, 'callbacks', [o for o in defaults.callbacks if o is not ProgressCallback])
    with less_random(): yield


@pytest.fixture
def has(monkeypatch):
    "Pretend that the device accelerates only these dtypes: `has('bf16')`, or none: `has()`."
    def _has(*modes): monkeypatch.setattr(devices, 'autocast_is_fast', lambda device, amp_mode: amp_mode.value in modes)
    return _has


@pytest.fixture(autouse=True)
def accelerates(pytestconfig, has):
    "Apply `--accelerates`, so that a test does the same on every CPU."
    asked = pytestconfig.getoption('accelerates')
    if asked != 'native': has(*asked.replace('none', '').split(','))
    return asked


@pytest.fixture
def gpu(monkeypatch):
    "`gpu('cuda:1')`: from now on, all tensors of this test say that they are on this device. See `PretendGPU`."
    entered = []
    def _gpu(device='cuda:1', **kwargs):
        entered.append(PretendGPU(monkeypatch, device, **kwargs).__enter__())
        return entered[0]
    yield _gpu
    for o in entered: o.__exit__(None, None, None)


@pytest.fixture
def clock(monkeypatch):
    "Time passes only where the test says so: `clock.pass_ms(5)`."
    clock = Clock()
    monkeypatch.setattr(time, 'perf_counter', clock)
    return clock


@pytest.fixture
def fake_steps(clock, monkeypatch):
    """`fake_steps(times)`: batches run, but take `times[setting]` milliseconds, otherwise 100; or `times(setting, n)` for
    the n-th batch. `fake_steps.settings` lists the setting of each batch."""
    def _fake(times):
        real = Learner.one_batch
        def _one_batch(self, *args):
            real(self, *args)
            settings.append(setting_of(self))
            clock.pass_ms(times.get(settings[-1], 100.) if isinstance(times, dict) else times(settings[-1], len(settings)))
        monkeypatch.setattr(Learner, 'one_batch', _one_batch)
    settings = _fake.settings = []
    return _fake


@pytest.fixture
def no_runtimes(monkeypatch):
    "As if neither OpenVINO nor ONNX Runtime were installed."
    for o in 'openvino', 'onnxruntime': monkeypatch.setitem(sys.modules, o, None)


@pytest.fixture
def compilations(monkeypatch):
    "The calls of each function that `torch.compile` compiled: see `Compilations`. Needs a C++ compiler, and minutes."
    return Compilations(monkeypatch, torch.compile)


@pytest.fixture
def uncompiled(monkeypatch):
    "Like `compilations`, but functions run as they are: for tests of everything but the compiler."
    return Compilations(monkeypatch)


@pytest.fixture
def traced(monkeypatch):
    """Like `compilations`, but without code in C++: PyTorch traces functions, checks guards, and keeps constants as they
    were. It differentiates as compiled code does."""
    real = torch.compile
    monkeypatch.setattr(torch._inductor, 'compile', lambda graph, inputs, **kwargs: deepcopy(graph))
    def _compile(f, backend, **kwargs): return real(f, backend='aot_eager' if backend == 'inductor' else backend, **kwargs)
    return Compilations(monkeypatch, _compile)


@pytest.fixture
def backend(request, monkeypatch):
    "`CompilePredictions()` means this backend: see `each_backend` of helpers.py."
    use_backend(monkeypatch, request.param)
    return request.param


@pytest.fixture
def code(request, backend):
    "Like `uncompiled` for the compiler; runtimes really convert."
    return request.getfixturevalue('uncompiled' if backend == 'inductor' else 'compilations')
