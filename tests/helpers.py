"What several test files need: small models and Learners, all that a Learner holds, a clock under the test's control."
import gc
import multiprocessing
import random
import re
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
import torchvision
from fastai.vision.all import (CrossEntropyLossFlat, DataLoader, DataLoaders, ImageDataLoaders, Learner, MixedPrecision)
from PIL import Image
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from channelslast import ChannelsLast, CompilePredictions, CompileTraining, FoldBatchNorm
from channelslast.__main__ import cli
from channelslast.learner.fused_optimizer import FusedOptimizer
from channelslast.predict.runtimes import missing_packages


# models and Learners

def convnet(c=3, n=4):
    return nn.Sequential(nn.Conv2d(c, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, groups=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n))


class Mixed(nn.Module):
    "1-D, 2-D and 3-D convolutions whose parameters all get gradients."
    def __init__(self):
        super().__init__()
        self.c3, self.c2, self.c1 = nn.Conv3d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 4)
    def forward(self, x):
        x = self.c3(x[:, :, None] if x.dim() == 4 else x).mean(2)
        return self.head(self.c1(self.c2(x).mean(2)).mean(2))


class Breaks(nn.Module):
    "A model that looks at its data, so that it can't be compiled as a whole."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x): return self.net(x*2 if x.mean() > 0 else x)


class Bomb(nn.Module):
    "Has a batch norm, dropout, a buffer that it replaces, a counter and a list. Raises `error` in its k-th forward pass."
    def __init__(self, k=0, error=RuntimeError):
        super().__init__()
        self.c, self.bn, self.d, self.l = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Linear(8, 4)
        self.calls, self.seen = 0, []
        self.register_buffer('b', torch.zeros(1))
        self.arm(k, error)
    def arm(self, k, error=RuntimeError):
        "Raise in the k-th forward pass from now on; never if `k` is 0. The count is shared with clones of the attributes."
        self.k, self.error, self.passes = k, error, Count()
        return self
    def forward(self, x):
        self.passes.n += 1
        if self.passes.n == self.k: raise self.error('boom')
        self.calls += 1; self.seen.append(self.calls); self.b = self.b + 1
        x = self.bn(self.c(x))
        with torch.no_grad(): self.l.bias.add_(0.1)
        return self.l(self.d(x.mean((2, 3))))


class Count:
    "A number that no copy of attributes restores."
    __slots__ = 'n',
    def __init__(self): self.n = 0


class Steep(torch.autograd.Function):
    "The identity with a much larger gradient, which overflows in fp16 while the scale is large."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g*1e6


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


def image_folder(path, n=16):
    "DataLoaders whose transforms can be pickled, as `export` needs: `n` images in `path/'data'/'a'` and `'b'`."
    for i in range(n):
        (d := path/'data'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.randint(0, 255, (16, 16, 3), dtype=np.uint8)).save(d/f'{i}.png')
    return ImageDataLoaders.from_folder(path/'data', valid_pct=0.25, bs=4, num_workers=0)


class WrongInChannelsLast(nn.Module):
    "Wrong results in channels last, as in PyTorch issue 67239."
    def forward(self, x): return x.flip(1) if x.is_contiguous(memory_format=torch.channels_last) else x


class Fails(nn.Module):
    "Raises `error` for inputs for which `when(x)` is true."
    def __init__(self, error, when): super().__init__(); self.error, self.when = error, when
    def forward(self, x):
        if self.when(x): raise self.error
        return x


class SumsInFp32(TorchDispatchMode):
    "Half-precision products are summed in fp32, as on GPUs. CPUs without fp16 sum them in fp16, which takes up to three times as long."
    PRODUCTS = 'convolution', 'convolution_backward', 'addmm', 'mm', 'bmm', 'baddbmm'
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        halves = {t.dtype for t in args if isinstance(t, torch.Tensor)} & {torch.float16, torch.bfloat16}
        if func.overloadpacket.__name__ not in self.PRODUCTS or not halves: return func(*args, **kwargs or {})
        def _cast(x, dtype): return tree_map(lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, x)
        return _cast(func(*_cast(args, torch.float32), **kwargs or {}), *halves)


def find(learn=None, **kwargs):
    "`format_find` with few steps, without layers in fp32."
    return (learn or learner()).format_find(**dict(num_it=4, show_plot=False, layers=False, optimizer=False) | kwargs)


def backend_name(backend): return 'compiled' if backend == 'inductor' else backend


def rows_of(timings) -> dict:
    "The rows of a result of `format_find` by their setting, named as in `setting_of`."
    def _name(r):
        kinds = ['folded']*r.folded + ['fused']*r.fused + [backend_name(r.compiled)]*bool(r.compiled)
        return ', '.join([r.memory_format.replace('_', ' '), r.precision] + kinds)
    return {_name(r): r for r in timings.rows}


# what a Learner holds

def values_of(o, depth=4):
    "The plain values in an object, nested ones too; tensors by value, other objects by identity."
    if isinstance(o, torch.Tensor): return o.detach().clone()
    if isinstance(o, (random.Random, torch.Generator, np.random.RandomState)):
        return (o.getstate if isinstance(o, random.Random) else o.get_state)()
    if isinstance(o, np.random.Generator): return str(o.bit_generator.state)
    if isinstance(o, (bool, int, float, str, bytes, type(None))): return o
    if isinstance(o, dict): return {k if isinstance(k, str) else id(k): values_of(v, depth - 1) for k, v in o.items()} if depth else None
    if isinstance(o, (list, tuple)): return [values_of(v, depth - 1) for v in o] if depth else None
    if isinstance(o, np.ndarray): return torch.as_tensor(o.copy())
    return id(o)


def model_state(model) -> dict:
    "Everything that a model holds: tensors by value, identity, memory and strides; modules by their attributes and hooks."
    own = {'_parameters', '_buffers', '_modules'}
    def _tensor(t):
        if nn.parameter.is_lazy(t) or t.is_meta: return id(t)
        value = t.dequantize() if t.is_quantized else t.to_dense()
        memory = (t.data_ptr(), t.stride()) if t.layout is torch.strided else t.layout
        return (id(t), memory, t.dtype, t.requires_grad, value.detach().clone(),
                None if t.grad is None else (id(t.grad), t.grad.stride(), t.grad.clone()))
    return dict(tensors={n: _tensor(t) for n, t in (*model.named_parameters(), *model.named_buffers())}, names=[*model.state_dict()],
                modules={n: (id(m), {k: values_of(v) for k, v in vars(m).items() if k not in own}) for n, m in model.named_modules()},
                global_hooks=[len(getattr(nn.modules.module, k)) for k in ('_global_forward_hooks', '_global_forward_pre_hooks')])


def optimizer_state(opt):
    "Everything that an optimizer holds, by value; None if there is none."
    if opt is None: return None
    inner = getattr(opt, 'opt', opt)
    return dict(id=id(opt), attributes=sorted(vars(opt)), groups=values_of(list(inner.param_groups) if hasattr(inner, 'param_groups') else []),
                hypers=values_of([dict(h) for h in opt.hypers]), state=[(id(p), values_of(s)) for p, s in inner.state.items()],
                strides=[t.stride() for s in inner.state.values() for t in s.values() if isinstance(t, torch.Tensor)])


def learner_state(learn) -> dict:
    """Everything that must not change while something only looks or measures: model, optimizer, callbacks, attributes,
    random states, autocast."""
    loader = learn.dls.train if len(learn.dls.loaders) else None
    return dict(model=model_state(learn.model), optimizer=optimizer_state(learn.opt), opt_func=id(learn.opt_func),
                callbacks=[(id(o), {k: values_of(v) for k, v in vars(o).items() if k != 'learn'}) for o in learn.cbs],
                attributes=sorted(vars(learn)), training=learn.training, python=random.getstate(), numpy=values_of(np.random.get_state()),
                torch=torch.get_rng_state(), autocast=(torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu')),
                grad=torch.is_grad_enabled(), loader=None if loader is None else loader.rng.getstate())


def difference(a, b, path='') -> str:
    "Where two states differ; '' if they are equal."
    if isinstance(a, torch.Tensor):
        equal = isinstance(b, torch.Tensor) and a.shape == b.shape and (a == b).logical_or((a != a) & (b != b)).all()
        return '' if equal else f'{path} has other values'
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys(): return f'{path}: other keys'
        return next(filter(None, (difference(a[k], b[k], f'{path}/{k}') for k in a)), '')
    if isinstance(a, (list, tuple)):
        if not isinstance(b, (list, tuple)) or len(a) != len(b): return f'{path}: other length'
        return next(filter(None, (difference(x, y, f'{path}/{i}') for i, (x, y) in enumerate(zip(a, b)))), '')
    return '' if a == b else f'{path}: {a!r} became {b!r}'


def strides(learn):
    "All strides of the Learner's parameters, buffers, gradients and optimizer state."
    state = getattr(learn.opt, 'opt', learn.opt).state if learn.opt else {}
    return ([o.stride() for o in (*learn.model.parameters(), *learn.model.buffers())],
            [p.grad.stride() for p in learn.model.parameters() if p.grad is not None],
            [[v.stride() for v in state[p].values() if isinstance(v, torch.Tensor)]
             for p in learn.model.parameters() if p in state])


def names_library(pickled) -> bool:
    "True if the bytes name one of this package's modules. A path may: the checkout or its environment."
    return bool(re.search(rb'channelslast(?![/\\])', pickled))


# devices

class PretendGPU(TorchFunctionMode):
    """A device, such as `'cuda:1'`, `'xpu'` or `'mps'`, that computes on the CPU, without autocast. Tensors that are made there or
    moved there say so, and what is computed from them; a move copies. As on the device, `torch.equal` raises for tensors of two
    devices, and random functions for another device's generator. `peak` are the bytes that the device reports as its peak memory.
    `on_reset` is called when that is reset. To wait for the device takes `wait_ms` of a `Clock`."""
    def __init__(self, monkeypatch, device, clock=None, wait_ms=0., capability=(7, 0)):
        super().__init__()
        self.device, self.cpu, self.peak, self.there, self.on_reset = torch.device(device), torch.device('cpu'), 0, {}, lambda: None
        functions = dict(synchronize=lambda d=None: clock.pass_ms(wait_ms) if clock else None, empty_cache=lambda: None,
                         reset_peak_memory_stats=lambda d=None: self.on_reset(), max_memory_allocated=lambda d=None: self.peak,
                         get_device_capability=lambda d=None: capability)
        for name, f in functions.items(): monkeypatch.setattr(getattr(torch, self.device.type), name, f, raising=False)
        real = torch.Generator
        class OnCPU(real):
            def __new__(cls, device='cpu'): return real.__new__(cls)
            def __init__(self, device='cpu'): self.made_for = torch.device(device)
            device = property(lambda self: self.made_for)
        monkeypatch.setattr(torch, 'Generator', OnCPU)
    def is_there(self, t): return t.layout is torch.strided and t.untyped_storage()._cdata in self.there
    def move(self, t):
        if isinstance(t, torch.Tensor) and t.layout is torch.strided:
            self.there[t.untyped_storage()._cdata] = StorageWeakRef(t.untyped_storage())  # keeps the address from a second use
        return t
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, devices, name = kwargs or {}, [], getattr(func, '__name__', '')
        if func is torch.device or name == '_parse_to': return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__: return self.device if self.is_there(args[0]) else func(*args)
        def _on_cpu(o):
            if not isinstance(o, torch.device) and not (isinstance(o, str) and o.split(':')[0] in ('cpu', self.device.type)): return o
            devices.append(o := torch.device(o))
            return self.cpu if o.type == self.device.type else o
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.layout is torch.strided]
        there, used = [t for t in inputs if self.is_there(t)], kwargs.get('generator')
        if func is torch.equal and 0 < len(there) < len(inputs): raise RuntimeError('Expected all tensors to be on the same device')
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        target = any(o.type == self.device.type for o in devices) if devices else bool(there) and func != torch.Tensor.cpu
        if used is not None and (used.made_for.type == self.device.type) != target:
            raise RuntimeError(f"Expected a '{self.device.type if target else 'cpu'}' device type for generator but found another")
        if func == torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor): target = self.is_there(args[1])
        out = func(*args, **kwargs)
        if name in ('to', 'cpu') and isinstance(out, torch.Tensor) and target != self.is_there(args[0]):
            if out.layout is torch.strided and out.untyped_storage()._cdata == args[0].untyped_storage()._cdata: out = out.clone()
        if target and name not in ('copy_', '__set__', '__setitem__'): tree_map(self.move, out)
        return out
    def learner(self, model=None, dls=None, **kwargs):
        dls = dls or loaders()
        dls.device = self.device
        return learner(model, dls, **kwargs)


def passes_in_new_process(f):
    "Run `f` in a fork of this process, for settings that can't be restored. True if it raised nothing."
    def _run():
        torch.set_num_threads(1)  # a fork has no other threads
        f()
    process = multiprocessing.get_context('fork').Process(target=_run)
    process.start()
    process.join(100)
    process.kill()
    return process.exitcode == 0


# time

def setting_of(learn) -> str:
    "The Learner's setting, such as `'channels last, bf16+fp32, folded, compiled'`."
    mp = next(iter(learn._grab_cbs(MixedPrecision)), None)
    precision = mp.amp_mode.value + '+fp32'*bool(getattr(mp, 'fp32_layers', ())) if mp else 'fp32'
    parts = ['channels last' if learn._grab_cbs(ChannelsLast) else 'contiguous', precision]
    parts += ['folded']*bool(learn._grab_cbs(FoldBatchNorm))
    parts += ['fused']*(learn.training and isinstance(learn.opt, FusedOptimizer))
    compiled = learn._grab_cbs(CompileTraining if learn.training else CompilePredictions)
    return ', '.join(parts + [backend_name(cb.backend) for cb in compiled])


class Clock:
    "Stands in for `time.perf_counter`: time passes only where a test says so."
    def __init__(self): self.now = 0.
    def __call__(self): return self.now
    def pass_ms(self, ms): self.now += ms/1e3


# the command line

def run_command(monkeypatch, capsys, *args, command=cli) -> tuple: # Exit status or message, standard output, standard error
    "Run `channelslast`, or another command, with these arguments."
    monkeypatch.setattr(sys, 'argv', ['channelslast', *args])
    code = 0
    try: command()
    except SystemExit as e: code = e.code
    except KeyboardInterrupt: code = 'KeyboardInterrupt'  # would end pytest
    return code, *capsys.readouterr()


def use_small_models(monkeypatch, **models):
    """torchvision's classifiers are `convnet`s, or the result of `models[name]()`. Each has its name in `.arch`."""
    names, real = torchvision.models.list_models(module=torchvision.models), torchvision.models.get_model
    def _get_model(name, num_classes=10, **kwargs):
        if name not in names: return real(name, num_classes=num_classes, **kwargs)
        model = models[name]() if name in models else convnet(n=num_classes)
        model.arch = name
        return model
    monkeypatch.setattr(torchvision.models, 'get_model', _get_model)


class Load:
    "Stands in for the process that `python -m tests.bench --busy` runs. `Load.running` counts those that run."
    running = 0
    def __init__(self, *args, **kwargs): Load.running += 1
    def kill(self): Load.running -= 1
    def wait(self): pass


# threads

def in_threads(*functions):
    "Run them at the same time, with many switches between threads. Returns the errors."
    errors, interval = [], sys.getswitchinterval()
    def _run(f):
        try: f()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=_run, args=(f,)) for f in functions]
    sys.setswitchinterval(1e-5)
    try:
        for t in threads: t.start()
        for t in threads: t.join()
    finally: sys.setswitchinterval(interval)
    return errors


# predictions and compilations

REFUSED = 'Unsupported'  # the compiler's error for `Breaks`
BACKENDS = 'inductor', 'openvino', 'onnxruntime'


def each_backend(*fast):
    "Run a test with the compiler and both runtimes; those that are not `fast` in the slow suite."
    fast = fast or ('inductor', 'openvino')
    return pytest.mark.parametrize('backend', [pytest.param(o, marks=() if o in fast else pytest.mark.slow) for o in BACKENDS], indirect=True)


def use_backend(monkeypatch, backend):
    "From now on, `CompilePredictions()` means this backend. Skips the test where it is not installed."
    install = missing_packages(backend)
    if install: pytest.skip(f'needs `{install}`')
    monkeypatch.setitem(sys.modules, 'openvino_telemetry', None)  # no test sends events, whoever imports OpenVINO first
    monkeypatch.setattr(CompilePredictions.__init__, '__defaults__', (backend,))


def block(i, o, act=True, **kwargs): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **kwargs), nn.BatchNorm2d(o), *([nn.ReLU(True)] if act else []))


class Pairs(nn.Module):
    "Two pairs of convolution and batch norm, a third pair connected by `between(self, x)`, which a test may set, and a head."
    def __init__(self, between=None, c=3):
        super().__init__()
        self.one, self.two = block(c, 8, bias=False), block(8, 8, act=False)
        self.conv, self.norm, self.head = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.between = between or pair_alone
        shake(self)
    def forward(self, x): return self.head(self.between(self, self.two(self.one(x))).mean((2, 3)))


def pair_alone(self, x): return self.norm(self.conv(x))  # a lambda could not be pickled


def preds_of(learn, **kwargs):
    "The Learner's predictions, without the loss function's activation."
    with learn.no_bar(): return learn.get_preds(act=lambda x: x, **kwargs)[0]


def truth_of(learn):
    "What the model itself gives for the Learner's validation set now, in eval mode."
    training = [m for m in learn.model.modules() if m.training]
    learn.model.eval()
    with torch.no_grad(): out = torch.cat([learn.model(b[0]) for b in learn.dls.valid])
    for m in training: m.training = True
    return out


class Compilations(list):
    """Stands in for `torch.compile`. A list with the calls of each compiled function, and these with the shape of the first
    input. `alive()` counts those that exist. Without `real`, functions run as they are, and no compiler is needed. Tests of
    such functions may set `.output(out)`, which changes each output, and `.fits(n)`: False if the guards fail in the n-th call."""
    def __init__(self, monkeypatch, real=None):
        self.refs, self.real, self.output, self.fits, self.running = [], real, lambda out: out, lambda n: True, threading.local()
        monkeypatch.setattr(torch, 'compile', self.compile)
        if not real: monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: getattr(self.running, 'compiled', False))

    def compile(self, f, backend='inductor', **kwargs):
        calls = []
        self.append(calls)
        run = self.real(f, backend=backend, **kwargs) if self.real else lambda *args, **kw: self._run(f, backend, calls, args, kw)
        def _run(*args, **kw):
            calls.append(tuple(next(o.shape for o in (*args, *kw.values()) if isinstance(o, torch.Tensor))))
            return run(*args, **kw)
        self.refs.append(weakref.ref(_run))
        return _run

    def alive(self) -> int:
        gc.collect()
        return sum(r() is not None for r in self.refs)

    def _run(self, f, backend, calls, args, kwargs):
        if not self.fits(len(calls)):  # then PyTorch traces and compiles again, or does not, depending on its stance
            if callable(backend): backend(None, [])
            return f(*args, **kwargs)
        self.running.compiled = True
        try: return self.output(f(*args, **kwargs))
        finally: self.running.compiled = False
