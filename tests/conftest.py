import re

import pytest
import torch
from torch import nn
from fastai.vision.all import AMPMode, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner

from channelslast import less_random
from channelslast.compile import compiled_forward
from channelslast.core import devices
from channelslast.find import train_benchmark

UNAFFECTED = pytest.StashKey()  # the tests that did not ask which dtypes the machine accelerates

collect_ignore = ['two_processes.py', 'conv_fuzz.py', 'notebooks.py']  # scripts, which doctest would import


def pytest_addoption(parser):
    parser.addoption('--accelerates', default='native', help="pretend that the machine accelerates only these "
                     "dtypes: 'bf16', 'fp16,bf16' or 'none'. 'native' (default) pretends nothing. 'other' is 'none' on a CPU "
                     "that is fast in bf16, otherwise 'bf16', without the tests that did not ask which dtypes are fast in the "
                     "last native run. "
                     "Notebooks always run natively")


def pytest_configure(config):
    asked = config.getoption('accelerates')
    if asked not in ('native', 'other', 'none') and not {*asked.split(',')} <= {'fp16', 'bf16'}:
        raise pytest.UsageError(f"--accelerates {asked}: use native, other, none, fp16, bf16 or fp16,bf16")
    if asked == 'other':
        config.option.accelerates = 'none' if devices.autocast_is_fast('cpu', AMPMode.BF16) else 'bf16'
        if hasattr(config, 'cache'): config.stash[UNAFFECTED] = {*config.cache.get('accelerates/unaffected', [])}
    config.addinivalue_line('markers', 'cuda: needs a CUDA GPU')
    config.addinivalue_line('markers', 'zoo: one test per architecture; without `-m zoo`, every tenth runs, and those marked `zoo(\'always\')`')
    config.option.nbmake, config.option.nbmake_timeout = True, 300  # each notebook in nbs/ runs as a test
    config.option.doctestmodules = True  # the examples in docstrings


def deselect(config, items, left):
    items[:] = [o for o in items if o not in left]
    config.hook.pytest_deselected(items=[*left])


def pytest_collection_modifyitems(config, items):
    if 'zoo' not in config.option.markexpr: # all would take a quarter of an hour, so run a fixed tenth
        zoo = [o for o in items if o.get_closest_marker('zoo') == pytest.mark.zoo.mark]  # not those marked `zoo('always')`
        left = {*zoo} - {*zoo[::10]} if len(zoo) > 10 else set()
        deselect(config, items, left)
    deselect(config, items, {o for o in items if o.nodeid in config.stash.get(UNAFFECTED, ())})
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker('cuda'): item.add_marker(pytest.mark.skip(reason='no CUDA GPU on this machine'))


def pytest_sessionfinish(session):
    if session.config.getoption('accelerates') == 'native' and hasattr(session.config, 'cache'):  # not after -p no:cacheprovider
        session.config.cache.set('accelerates/unaffected', sorted(session.config.stash.get(UNAFFECTED, ())))


ZOO = pytest.StashKey()


@pytest.fixture
def zoo_report(pytestconfig, capsys):
    "Print one architecture as a table row whose columns `heading` names. All rows are printed again at the end."
    writer = pytestconfig.get_terminal_writer()
    def _report(heading, *cells):
        row = ' | '.join(['', *map(str, cells), '']).strip()
        pytestconfig.stash.setdefault(ZOO, {}).setdefault(heading, []).append(row)
        with capsys.disabled(): writer.line('\n' + row)
    return _report


def pytest_terminal_summary(terminalreporter, config):
    for heading, rows in config.stash.get(ZOO, {}).items():
        terminalreporter.section('zoo')
        for row in [heading, re.sub(r'[^|]+', '---', heading), *rows]: terminalreporter.write_line(row)
        terminalreporter.write_line(f"{sum(o.endswith('| equal |') for o in rows)} of {len(rows)} architectures equal")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "No progress bars, and the same seed for each test."
    from fastai.vision.all import ProgressCallback, defaults
    monkeypatch.setattr(defaults, 'callbacks', [o for o in defaults.callbacks if o is not ProgressCallback])
    with less_random(): yield


@pytest.fixture
def has(monkeypatch):
    "Pretend that the device accelerates only these dtypes: `has('bf16')`, or none: `has()`."
    def _has(*modes): monkeypatch.setattr(devices, 'autocast_is_fast', lambda device, amp_mode: amp_mode.value in modes)
    return _has


@pytest.fixture(autouse=True)
def usual_memory(monkeypatch):
    "`keep_memory()` is not measured, which takes more steps and changes the process."
    monkeypatch.setattr(train_benchmark, 'memory_is_default', lambda: False)


@pytest.fixture(autouse=True)
def asks(pytestconfig, has, monkeypatch, request):
    "Apply `--accelerates`, and list the test's calls of `autocast_is_fast`. A test that calls `has` itself overrides both."
    asked, calls = pytestconfig.getoption('accelerates'), []
    if asked != 'native': has(*asked.replace('none', '').split(','))
    real = devices.autocast_is_fast
    monkeypatch.setattr(devices, 'autocast_is_fast', lambda *args: (calls.append(args), real(*args))[1])
    yield calls
    if not calls: pytestconfig.stash.setdefault(UNAFFECTED, set()).add(request.node.nodeid)


@pytest.fixture
def machine(pytestconfig, asks):
    "The value of `--accelerates`, for a test that applies it in a process of its own."
    asks.append('machine')
    return pytestconfig.getoption('accelerates')


def fake_steps(monkeypatch, key_of, *modules):
    """`fake(times)`: steps run, but take `times[key_of(learn)]` milliseconds, otherwise 100; or `times(key, number of
    steps)`. `fake.steps` lists the keys. The modules are those that call `step_ms`. Fused steps are not tried."""
    def _fake(times):
        monkeypatch.setattr(train_benchmark.TrainBenchmark, 'time_optimizer', lambda self, try_fused: time_optimizer(self))
        real = train_benchmark.step_ms
        def _ms(learn, batch):
            real(learn, batch)
            key = key_of(learn)
            steps.append(key)
            return times.get(key, 100.) if isinstance(times, dict) else times(key, len(steps))
        for m in modules: monkeypatch.setattr(m, 'step_ms', _ms)
    time_optimizer, steps = train_benchmark.TrainBenchmark.time_optimizer, []
    _fake.steps = steps
    return _fake


def names_library(pickled) -> bool:
    "True if the bytes name one of this package's modules. A path may: the checkout or its environment."
    return bool(re.search(rb'channelslast(?![/\\])', pickled))


def convnet(c=3, n=4):
    return nn.Sequential(nn.Conv2d(c, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, groups=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n))


class Breaks(nn.Module):
    "A model that looks at its data, so that it can't be compiled as a whole."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x): return self.net(x*2 if x.mean() > 0 else x)


REFUSED = 'Unsupported' if devices.torch_version() >= (2, 7) else 'UserError'  # the compiler's error for `Breaks`


@pytest.fixture
def compilations(monkeypatch):
    "The models compiled so far."
    models, real = [], compiled_forward._compile
    monkeypatch.setattr(compiled_forward, '_compile', lambda model, *args: (models.append(model), real(model, *args))[1])
    return models


@pytest.fixture
def uncompiled(monkeypatch):
    "Instead of compiled code, the model's own forward: for tests of everything but the compiler. Lists the models."
    models = []
    def _compile(model, args, kwargs, freeze):
        assert freeze != torch.is_grad_enabled()  # weights are constants in predictions, and only there
        models.append(model)
        def _forward(*args, **kwargs): return type(model).forward(model, *args, **kwargs)
        return _forward, _forward(*args, **kwargs)
    monkeypatch.setattr(compiled_forward, '_compile', _compile)
    return models


class Steep(torch.autograd.Function):
    "The identity with a much larger gradient, which overflows in fp16 while the scale is large."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g*1e6


class Mixed(nn.Module):
    "1-D, 2-D and 3-D convolutions whose parameters all get gradients."
    def __init__(self):
        super().__init__()
        self.c3, self.c2, self.c1 = nn.Conv3d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 4)
    def forward(self, x):
        x = self.c3(x[:, :, None] if x.dim() == 4 else x).mean(2)
        return self.head(self.c1(self.c2(x).mean(2)).mean(2))


def shake(model):
    "Give batch norms random running statistics and weights, since fresh ones hide mistakes."
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if m.running_mean is not None: m.running_mean.normal_(0, 0.3); m.running_var.uniform_(0.5, 2)
                if m.affine: m.weight.uniform_(0.5, 1.5); m.bias.normal_(0, 0.3)
    return model


def loaders(shape=(3, 8, 8), n=32, bs=8, dtype=torch.float32, n_classes=4, shuffle=False):
    x, y = torch.randn(n, *shape, dtype=dtype), torch.randint(0, n_classes, (n,))
    ds = list(zip(x, y))
    return DataLoaders(DataLoader(ds, bs=bs, shuffle=shuffle), DataLoader(ds, bs=bs), device=torch.device('cpu'))


def learner(model=None, dls=None, **kwargs):
    return Learner(dls or loaders(), model or convnet(), CrossEntropyLossFlat(), **kwargs)


def strides(learn):
    "All strides of the Learner's parameters, buffers, gradients and optimizer state."
    state = getattr(learn.opt, 'opt', learn.opt).state if learn.opt else {}
    return ([o.stride() for o in (*learn.model.parameters(), *learn.model.buffers())],
            [p.grad.stride() for p in learn.model.parameters() if p.grad is not None],
            [[v.stride() for v in state[p].values() if isinstance(v, torch.Tensor)]
             for p in learn.model.parameters() if p in state])
