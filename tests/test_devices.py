"GPUs simulated on a CPU: skipped steps, worker processes, TF32, cuDNN's errors, too little memory, which device is used."
import gc
import subprocess
import sys
import time
import warnings
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.distributed import ParallelTrainer
from fastai.vision.all import Adam, Callback, DataLoader, DataLoaders, GradientAccumulation, Learner, fastuple
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from channelslast import CompilePredictions, CompileTraining, FoldBatchNorm, fused, less_random
from channelslast.command.demo import StepTimer
from channelslast.core import devices
from channelslast.core.compare import perturb
from channelslast.core.devices import autocast_is_fast, fit_device, fp32_precision, is_out_of_memory, known_problem, synchronize
from channelslast.core.nested_tensors import first_items
from channelslast.core.replay import Record
from channelslast.find.numbers import TrainingNumbers
from .bench import timed_fit_step
from .helpers import (Fails, Steep, convnet, difference, find, learner, learner_state, loaders, passes_in_new_process, preds_of, rows_of,
                      setting_of, shake)

CUDA = torch.device('cuda:1')


# steps that the gradient scaler skips

class Steeper(nn.Module):
    "Gradients that overflow in fp16, only in training mode: numbers are compared in eval mode."
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x) if self.training else x


class Steepest(torch.autograd.Function):
    "The identity, whose gradient overflows in fp16 with each scale."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g + torch.inf if g.dtype is torch.half else g


def steep(f=Steep.apply):
    return nn.Sequential(nn.Conv2d(3, 8, 3), Steeper(f), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize('scaler', [{}, dict(growth_interval=1)], ids=['default', 'growing'])
def test_format_find_repeats_steps_that_the_scaler_skipped(has, clock, monkeypatch, scaler):
    "The fastest step of a candidate was one without the optimizer."
    has('fp16')
    real, skipped = Learner.one_batch, []
    def _one_batch(self, *args):
        real(self, *args)
        skipped.append(any(cb.skipped for cb in self._grab_cbs(MixedPrecision)))
        clock.pass_ms(2 if skipped[-1] else 20)
    monkeypatch.setattr(Learner, 'one_batch', _one_batch)
    t = find(learner(steep()), **scaler)
    assert any(skipped) and [r.precision for r in t.rows] == ['fp32', 'fp16']*2
    assert all(r.valid and r.ms == pytest.approx(20) for r in t.rows)


def test_format_find_does_not_take_accumulated_batches_for_skipped_steps(has):
    "They never reach the scaler, whose flag for the step before stayed set."
    has('fp16')
    t = find(learner(steep(), cbs=GradientAccumulation(40)), num_it=8)
    assert [r.valid for r in t.rows] == [True]*4, t


def test_format_find_drops_a_candidate_whose_steps_are_all_skipped(has):
    has('fp16')
    t = find(learner(steep(Steepest.apply)), num_it=1)
    assert [r.valid for r in t.rows] == [True, False]*2
    assert all('the gradient scaler skipped' in r.note for r in t.rows if not r.valid), t


def test_reference_timings_count_no_skipped_step(has):
    "Neither of the benchmark, nor of the demo."
    has('fp16')
    ran = []
    def _opt(params, **kw):
        opt = Adam(params, **kw)
        real = opt.step
        def _step(*args, **kwargs):
            ran.append(1)
            return real(*args, **kwargs)
        opt.step = _step
        return opt
    learn = learner(steep(), opt_func=_opt).to_channelslast()
    batch = learn.dls.one_batch()
    timed_fit_step(learn, batch)()
    assert len(ran) == 1 and learn.scaler.get_scale() < 65536
    ran.clear()
    learn = learner(steep(), opt_func=_opt, dls=loaders(n=256)).to_channelslast()
    with learn.no_logging(): learn.fit(1, cbs=(timer := StepTimer()))
    assert 0 < len(ran) == len(timer.ms) < 32


# the loader's time

class Slow:
    def __init__(self, n, seconds): self.n, self.seconds = n, seconds
    def __len__(self): return self.n
    def __getitem__(self, i):
        time.sleep(self.seconds)
        return torch.zeros(3, 4, 4), torch.tensor(0)


def loader_ms(train):
    dls = DataLoaders(train, train, device=torch.device('cpu'))
    return find(learner(dls=dls), num_it=1, formats='contiguous', precisions='fp32', optimizer=False).loader_ms


@pytest.mark.parametrize('workers, n', [(0, 64), (2, 64), (3, 200), (3, 8)])
def test_loader_ms_of_a_loader_with_worker_processes(workers, n):
    "Eight workers that load a batch every 20 ms were measured as 0.2 ms, since their first batches were already loaded."
    assert loader_ms(DataLoader(Slow(n, 0.03), bs=2, num_workers=workers)) > 0.9*60/max(workers, 1)  # other load only makes it slower


class Waves:
    "A loader whose batches arrive in waves, one per worker, each `ms` after the last one. The first one also takes `setup` ms."
    taken = 0
    def __init__(self, clock, ms, workers, n, setup=0.):
        self.clock, self.ms, self.num_workers, self.n, self.setup, self.bs = clock, ms, workers, n, setup, 8
    def to(self, device): return self
    def __len__(self): return self.n
    def __iter__(self):
        for i in range(self.n):
            if i % max(self.num_workers, 1) == 0: self.clock.pass_ms(self.ms + (0 if i else self.setup))
            Waves.taken = i + 1
            yield torch.zeros(8, 3, 4, 4), torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize('ms, workers, n, setup, expected', [
    (50, 0, 1, 0, 50), (10, 0, 50, 40, 10),  # the first batch includes the setup
    (100, 4, 999, 0, 25), (400, 16, 999, 0, 25), (30, 1, 999, 0, 30),
    (100, 4, 6, 0, 200/6)])  # of a short epoch, all batches count
def test_loader_ms_is_the_time_per_batch(clock, fake_steps, ms, workers, n, setup, expected):
    fake_steps({})
    assert loader_ms(Waves(clock, ms, workers, n, setup)) == pytest.approx(expected)


@pytest.mark.parametrize('ms, workers, expected', [(300_000, 16, 300_000/16), (300_000, 2, 150_000), (300_000, 0, 300_000)])
def test_loader_ms_of_a_very_slow_loader_takes_only_its_first_batch(clock, fake_steps, ms, workers, expected):
    fake_steps({})
    assert loader_ms(Waves(clock, ms, workers, 999)) == pytest.approx(expected) and Waves.taken == 1


def test_loader_ms_counts_the_batches_that_came_before_the_time_was_over(clock, fake_steps):
    fake_steps({})
    assert 3000 < loader_ms(Waves(clock, 7000, 2, 99)) < 5000 and Waves.taken < 99


# TF32

def on(monkeypatch, capability=(8, 0), name='NVIDIA A100', bf16=True):
    "Simulate the properties of a GPU; returns the list of devices that it is asked about."
    monkeypatch.setattr(torch.cuda, 'device', lambda d: nullcontext(asked.append(d)))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d=None: name)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bf16)
    asked = []
    return asked


@pytest.fixture
def tf32(monkeypatch):
    "`tf32()`: the user has allowed TF32 in convolutions, which makes no difference to a CPU without it."
    return lambda: monkeypatch.setattr(torch.backends.mkldnn, 'conv', SimpleNamespace(fp32_precision='tf32'), raising=False)


@pytest.mark.parametrize('capability, precision', [((7, 5), 'fp32'), ((8, 0), 'fp16'), ((12, 0), 'fp16')])
def test_fp32_precision_of_gpus_is_fp16_where_they_compute_in_tf32(monkeypatch, capability, precision):
    on(monkeypatch, capability)
    assert fp32_precision(CUDA) == precision
    for d in 'mps', 'xpu', 'cpu': assert fp32_precision(torch.device(d)) == 'fp32'


def set_fp32_precisions():
    gpu, cpu = map(torch.device, ('cuda', 'cpu'))
    warnings.filterwarnings('error', message='FoldBatchNorm')
    torch.cuda.get_device_capability = lambda device: (9, 0)
    found = [fp32_precision(gpu)]
    torch.backends.cudnn.allow_tf32 = False
    found.append(fp32_precision(gpu))
    torch.set_float32_matmul_precision('high')
    found.append(fp32_precision(gpu))
    torch.set_float32_matmul_precision('highest')
    if hasattr(torch.backends, 'fp32_precision'):
        for p in 'ieee', 'tf32':
            torch.backends.fp32_precision = p
            found.append(fp32_precision(gpu))
        torch.backends.mkldnn.conv.fp32_precision = 'bf16'
        found.append(fp32_precision(cpu))
        torch.backends.fp32_precision = 'ieee'
        torch.backends.mkldnn.conv.fp32_precision = 'ieee'
    assert found == ['fp16', 'fp32', 'fp16', 'fp32', 'fp16', 'bf16'][:len(found)], found
    learn = learner(shake(convnet()), cbs=FoldBatchNorm())
    with learn.no_bar(): learn.get_preds()
    assert learn.fold_batch_norm.folded == 1


@pytest.mark.skipif(sys.platform != 'linux', reason='forks')
def test_fp32_precision_reads_pytorchs_new_settings_and_its_old_ones():
    "After `torch.backends.fp32_precision = 'ieee'`, reading `cudnn.allow_tf32` raises, and so did folding."
    assert passes_in_new_process(set_fp32_precisions)


class Rounded(nn.Module):
    "Outputs differ in channels last as much as a ResNet-50's do if only one format uses TF32."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x): return 20*self.net(x)*(1.004 if self.net[0].weight.stride(1) == 1 else 1)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('computed', ['fp32', 'tf32'])
def test_format_find_allows_fp32_the_differences_of_fp16_only_in_tf32(tf32, train, computed):
    if computed == 'tf32': tf32()
    assert find(learner(Rounded()), train=train, num_it=1).rows[1].valid == (computed == 'tf32')


def rounded_to_tf32(t): return t + (((t.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) - t.detach())  # 10 bits


class InTF32(nn.Conv2d):
    "TF32 only in channels last: cuDNN may choose it for one format alone."
    def reset_parameters(self): nn.init.kaiming_normal_(self.weight)
    def forward(self, x):
        return self._conv_forward(rounded_to_tf32(x), rounded_to_tf32(self.weight), self.bias) if self.weight.stride(1) == 1 else super().forward(x)


@pytest.mark.parametrize('train', [True, False])
def test_format_find_accepts_a_deep_network_with_one_format_in_tf32(tf32, train):
    tf32()
    deep = [m for _ in range(8) for m in (InTF32(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    t = find(learner(nn.Sequential(InTF32(3, 8, 3, bias=False), *deep, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))), train=train, num_it=1)
    off = t.rows[1].grad_diff if train else t.rows[1].pred_diff
    assert all(r.valid for r in t.rows) and off > 1e-5  # otherwise nothing was rounded


# recurrent layers

class Cudnn(nn.LSTM):
    "Raises in the backward pass in eval mode, as cuDNN does."
    def forward(self, x):
        out, state = super().forward(x)
        def _raise(g): raise RuntimeError('cudnn RNN backward can only be called in training mode')
        if not self.training and out.requires_grad: out.register_hook(_raise)
        return out, state


class Recurrent(nn.Module):
    def __init__(self, rnn=Cudnn):
        super().__init__()
        self.body, self.rnn, self.head = convnet()[:6], rnn(16, 8, 2, batch_first=True, dropout=0.5), nn.Linear(8, 4)
    def forward(self, x):
        modes.add((self.body[1].training, self.rnn.training, self.rnn.dropout))
        return self.head(self.rnn(self.body(x).flatten(2).transpose(1, 2))[0][:, -1])


modes = set()


def test_format_find_measures_recurrent_layers_that_have_no_backward_pass_in_eval_mode():
    "Numbers are compared in eval mode, except batch norms and the recurrent layers, which only lose their dropout."
    learn = learner(Recurrent())
    modes.clear()
    before = learner_state(learn)
    t = find(learn)
    assert all(r.valid for r in t.rows) and t.rows[1].grad_diff < 1e-3
    assert modes == {(True, True, 0.5), (True, True, 0.)}
    assert difference(before, learner_state(learn)) == '' and learn.model.rnn.dropout == 0.5


# too little memory

class Large(nn.Module):
    "Runs out of memory in fp32 with more than `most` images."
    seen = []
    def __init__(self, most): super().__init__(); self.most = most
    def forward(self, x):
        Large.seen.append(len(x))
        if len(x) > self.most and not torch.is_autocast_enabled('cpu'): raise torch.OutOfMemoryError('CUDA out of memory. Tried to')
        return x


@pytest.mark.parametrize('train', [True, False])
def test_format_find_halves_the_batches_until_contiguous_fp32_has_memory(has, train):
    "A batch as large as fp16 allows could not be measured at all."
    has('bf16')
    t = find(learner(nn.Sequential(Large(3), convnet())), train=train)
    assert all(r.valid for r in t.rows) and {*Large.seen[-8:]} == {2}
    assert 'Measured on 2 of the 8 items of each batch' in t.verdict


def test_format_find_without_memory_for_one_item_raises_the_error():
    with pytest.raises(torch.OutOfMemoryError): find(learner(nn.Sequential(Large(0), convnet())))


def test_format_find_drops_only_the_candidates_without_memory(has):
    has('bf16')
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    t = find(learner(nn.Sequential(Fails(error, lambda x: torch.is_autocast_enabled('cpu')), convnet())))
    assert [r.note for r in t.rows] == ['', 'out of memory']*2 and t.notes == []


@pytest.mark.parametrize('make', [
    lambda x: (x, x[:, 0]), lambda x: ([x, x], {'a': x}), lambda x: (fastuple(x, x), x), lambda x: {'image': x},
    lambda x: ([*x], [{'boxes': torch.ones(5, 4), 'label': o} for o in x])],  # of a detector
    ids=['tuple', 'nested', 'fastuple', 'dict', 'detector'])
def test_first_items_of_a_batch_takes_of_all_that_is_as_long_as_the_batch(make):
    x = torch.arange(24.).view(4, 6)
    found, truth = first_items(make(x), 4, 2), make(x[:2])
    assert type(found) is type(truth)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize('batch', [(torch.ones(3, 4),), (torch.tensor(1.), 'name'), torch.ones(3)], ids=['shorter', 'scalar', 'tensor'])
def test_first_items_of_what_has_no_items_are_the_same_object(batch): assert first_items(batch, 4, 2) is batch


class Fragile(nn.Module):
    "In channels last, fails at the start of the backward pass, when all activations are alive. `refs` watches one of them."
    refs = []
    def __init__(self): super().__init__(); self.conv, self.net = nn.Conv2d(3, 3, 3, padding=1), convnet()
    def forward(self, x):
        x = self.conv(x)
        Fragile.refs.append(weakref.ref(x))
        out = self.net(x)
        def _raise(g): raise torch.OutOfMemoryError('out of memory')
        if out.requires_grad and self.conv.weight.stride(1) == 1: out.register_hook(_raise)
        return out


def test_format_find_frees_the_activations_of_a_failed_step_before_the_next_one(monkeypatch):
    "`learn.loss_grad` and the error's traceback kept them while the next candidate ran."
    left = []
    monkeypatch.setattr(torch.cpu, 'empty_cache', lambda: left.append([r for r in Fragile.refs if r() is not None]), raising=False)
    t = find(learner(Fragile()), num_it=1)
    assert t.rows[1].note == 'out of memory' and Fragile.refs and len(left) > 1 and left[0] == []


class Kept(torch.autograd.Function):
    "Keeps an activation for the backward pass, in which more than 4 items have no memory."
    kept = []
    @staticmethod
    def forward(ctx, x):
        y = x*2
        ctx.save_for_backward(y)
        Kept.kept.append(StorageWeakRef(y.untyped_storage()))
        return y
    @staticmethod
    def backward(ctx, g):
        if len(g) > 4: raise torch.OutOfMemoryError('out of memory')
        return 2*g


def test_format_find_frees_a_failed_step_before_it_tries_half_a_batch():
    "Its loss held all activations, so that half a batch had no memory either."
    alive = []
    class Keeps(nn.Module):
        def forward(self, x):
            alive.append((len(x), sum(not r.expired() for r in Kept.kept)))
            return Kept.apply(x)
    t = find(learner(nn.Sequential(nn.Conv2d(3, 3, 1), Keeps(), convnet())), num_it=1)
    assert 'Measured on 4 of the 8' in t.verdict and alive[:2] == [(8, 0), (4, 0)]


class InTrainingOnly(nn.Conv2d):
    "Fails in eval mode, as detectors do without their losses."
    kept = []
    def forward(self, x):
        out = super().forward(x)
        if self.training: return out
        InTrainingOnly.kept.append(StorageWeakRef(out.untyped_storage()))
        raise ValueError('no loss in eval mode')


def test_what_a_failed_comparison_recorded_is_freed_before_the_next_steps():
    "Its results stayed until the end, beside those of each step."
    alive, records = [], []
    class Looks(nn.Module):
        def forward(self, x):
            gc.collect()
            alive.append(sum(r() is not None for r in records))
            if not self.training and x.is_contiguous(memory_format=torch.channels_last): raise torch.OutOfMemoryError('out of memory')
            return x
    real = Record.__init__
    def _init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if self.keep: records.append(weakref.ref(self))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, '__init__', _init)
        t = find(learner(nn.Sequential(nn.Conv2d(3, 3, 1), Looks(), convnet())))
    assert t.rows[1].note == 'out of memory' and len(records) == 1 and alive[-3:] == [0, 0, 0]


def test_a_failed_pass_of_contiguous_fp32_is_freed_at_once(monkeypatch):
    "A reference cycle of the error held it until the next garbage collection."
    left, real = [], TrainingNumbers.run_baseline
    def _run(self):
        gc.disable()
        real(self)
        left.extend(not r.expired() for r in InTrainingOnly.kept)
        gc.enable()
    monkeypatch.setattr(TrainingNumbers, 'run_baseline', _run)
    find(learner(nn.Sequential(InTrainingOnly(3, 3, 1), convnet())), num_it=1)
    assert left and not any(left)


def test_results_to_compare_are_kept_in_main_memory(monkeypatch):
    "A step of a batch of large items (3-D, detection) may take nearly all that the device has."
    moved, real = [], torch.Tensor.to
    def _to(t, *args, **kwargs):
        out = real(t, *args, **kwargs)
        if args == ('cpu',): moved.append(out)
        return out
    monkeypatch.setattr(torch.Tensor, 'to', _to)
    model, x = convnet(), torch.randn(2, 3, 8, 8)
    with Record(model) as record: model(x)
    kept = [t for ts in record.values.values() for t in ts]
    assert len(kept) > 3 and {*map(id, kept)} == {*map(id, moved)}


def test_format_find_releases_its_memory_at_the_end(monkeypatch):
    "Then neither batches nor copies of weights are alive."
    refs, alive = {}, []
    class Seen(nn.Conv2d):
        def forward(self, x):
            for t in x, self.weight: refs.setdefault(t.untyped_storage().data_ptr(), StorageWeakRef(t.untyped_storage()))
            return super().forward(x)
    learn = learner(nn.Sequential(Seen(3, 3, 1), convnet()))
    own = {p.untyped_storage().data_ptr() for p in learn.model.parameters()}
    def _empty_cache(): alive.append([k for k, r in refs.items() if k not in own and not r.expired()])
    monkeypatch.setattr(torch.cpu, 'empty_cache', _empty_cache, raising=False)
    find(learn, num_it=1)
    assert len(refs) > 1 and alive and alive[-1] == []


@pytest.mark.parametrize('e, oom', [(torch.OutOfMemoryError('x'), True), (RuntimeError('MPS backend out of memory (MPS'), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), True), (RuntimeError('CUBLAS_STATUS_ALLOC_FAILED when calling'), True),
    (RuntimeError('CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED'), True), (RuntimeError('unable to find an engine to execute'), True),
    (MemoryError(), True), (ValueError('out of memory'), False), (RuntimeError('shape'), False), (KeyError('a'), False)], ids=repr)
def test_is_out_of_memory_knows_the_errors_of_all_devices(e, oom): assert is_out_of_memory(e) == oom


@pytest.mark.parametrize('device, train', [('cuda', True), ('xpu', True), ('cuda', False)])
def test_memory_is_that_of_a_step_without_the_warm_up_and_without_the_copies_of_the_search(gpu, fake_steps, device, train):
    "The first step of each candidate takes more, to try kernels."
    mode, warm = gpu(device), set()
    class Takes(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('b', torch.zeros(2**20))  # 4 MiB
        def forward(self, x):
            mode.peak = (50 if (setting := setting_of(learn)) in warm else 1000)*2**20
            warm.add(setting)
            return x
    fake_steps({})
    learn = mode.learner(nn.Sequential(Takes(), convnet()))
    for copies in 0, 4:  # the copies of a fresh Learner, whose model is still on the CPU, are there, too
        t = find(learn, train=train)
        assert len(t.rows) == (2 if train else 4) and all(49.9 < r.memory + copies < 50.1 for r in t.rows), t
        learn.model.to(device)
        warm.clear()


def test_folded_weights_of_only_one_candidate_are_alive_while_memory_is_measured(gpu, has, fake_steps):
    "Otherwise each candidate's peak memory would include several copies of the model."
    used, held = {}, []
    class Seen(nn.Conv2d):
        def forward(self, x):
            used[weakref.ref(self.weight)] = setting_of(learn)
            return super().forward(x)
    def _on_reset(): held.append({k for r, k in used.items() if (w := r()) is not None and 'folded' in k and not torch.equal(w.float().cpu(), own)})
    has('bf16'); fake_steps({})
    mode = gpu()
    mode.on_reset = _on_reset
    learn = mode.learner(shake(nn.Sequential(Seen(3, 8, 3, padding=1, bias=False), *convnet()[1:])))
    own = learn.model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # autocast needs a real GPU
        t = find(learn, train=False)
    assert sum(r.folded for r in t.rows) == len(set().union(*held)) == 4 and max(map(len, held)) == 1


# which device

def test_synchronize_waits_for_the_given_device(monkeypatch):
    "`torch.cuda.synchronize()` waits for the current device, so only the launches were timed on `cuda:1`."
    waited = []
    for m in torch.cuda, torch.xpu: monkeypatch.setattr(m, 'synchronize', lambda d: waited.append(d))
    monkeypatch.setattr(torch.mps, 'synchronize', lambda: waited.append('mps'))
    for d in map(torch.device, ('cuda:1', 'xpu:2', 'mps', 'cpu')): synchronize(d)
    assert waited == [CUDA, torch.device('xpu:2'), 'mps']


@pytest.mark.parametrize('name, capability, bf16, fast', [
    ('NVIDIA A100', (8, 0), True, {'fp16', 'bf16'}), ('Tesla T4', (7, 5), False, {'fp16'}), ('Tesla V100', (7, 0), False, {'fp16'}),
    ('NVIDIA GeForce GTX 1660 Ti', (7, 5), False, set()), ('Quadro T1000', (7, 5), False, set()), ('NVIDIA T400 4GB', (7, 5), False, set()),
    ('NVIDIA GeForce MX450', (7, 5), False, set()), ('Quadro RTX 4000', (7, 5), False, {'fp16'}), ('Tesla P100', (6, 0), False, set())])
def test_autocast_is_fast_on_cuda_with_tensor_cores(accelerates_itself, monkeypatch, name, capability, bf16, fast):
    "The GPU in question is asked, not the current one."
    asked = on(monkeypatch, capability, name, bf16)
    assert {m.value for m in AMPMode if autocast_is_fast(CUDA, m)} == fast and {*asked} == {CUDA}


@pytest.fixture
def accelerates_itself(monkeypatch):
    "Autocast is available on all devices, as far as PyTorch says."
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda d: True)


@pytest.fixture
def chip(monkeypatch):
    "`chip('Apple M2')`: the name of this machine's processor; '' if the system does not tell."
    def _forget():
        for o in vars(devices).values(): getattr(o, 'cache_clear', lambda: None)()
    def _chip(name):
        _forget()
        def _output(*args, **kwargs):
            if not name: raise FileNotFoundError
            return f'{name}\n'
        monkeypatch.setattr(subprocess, 'check_output', _output)
    yield _chip
    _forget()


@pytest.mark.parametrize('name, fast', [('Apple M1 Pro', {'fp16'}), ('Apple M2', {'fp16'}), ('Apple M3 Max', {'fp16', 'bf16'}), ('', {'fp16', 'bf16'})])
def test_autocast_is_fast_on_mps_in_bf16_except_on_m1_and_m2(accelerates_itself, monkeypatch, chip, name, fast):
    chip(name)
    monkeypatch.setattr(torch, '__version__', '2.8.0')
    assert {m.value for m in AMPMode if autocast_is_fast('mps', m)} == fast


@pytest.mark.parametrize('fp64', [True, False])
def test_autocast_is_fast_on_xpu_in_fp16_only_with_fp64(accelerates_itself, monkeypatch, fp64):
    "The gradient scaler computes in fp64."
    monkeypatch.setattr(torch.xpu, 'get_device_properties', lambda d: SimpleNamespace(has_fp64=fp64))
    assert autocast_is_fast('xpu', AMPMode.FP16) == fp64 and autocast_is_fast('xpu', AMPMode.BF16)


def test_fit_device_with_pytorchs_own_loaders_is_fastais_default(monkeypatch):
    "They have no device. fastai then moves the model to its default device."
    plain = torch.utils.data.DataLoader([(torch.zeros(3, 8, 8), 0)])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    assert fit_device(learner(dls=DataLoaders(plain, plain))) == CUDA


def test_fit_device_of_a_cpus_learner_does_not_start_cuda(monkeypatch):
    "fastai's `default_device` asks CUDA for its current device, which starts it."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: pytest.fail('CUDA was started'))
    learn = learner()
    assert fit_device(learn) == torch.device('cpu')
    learn.dls._device = None
    assert fit_device(learn) == torch.device('cpu')  # the model stays where it is


def test_format_find_keeps_its_batches_on_the_device(gpu, monkeypatch):
    "Before a first fit, batches went to the CPU, where the model still was, so each step copied its batch again."
    mode, real, moved = gpu(), Learner.one_batch, []
    def _one_batch(self, i, b):
        moved.extend(map(mode.is_there, b))
        real(self, i, b)
    monkeypatch.setattr(Learner, 'one_batch', _one_batch)
    find(mode.learner(), num_it=1)
    assert moved and all(moved)


class OnAnother(Callback):
    "Holds the device of its process, as `DistributedTrainer` does."
    def __init__(self): self.accelerator = SimpleNamespace(device=torch.device('cpu:0'))


def test_format_find_measures_on_the_processs_own_device_and_restores_that_of_the_loaders():
    "Loaders made before the process group is initialized are on the first GPU in all processes."
    seen = set()
    class Looks(nn.Module):
        def forward(self, x):
            seen.update([str(learn.dls.device), str(learn.dls.train.device)])
            return x
    learn = learner(nn.Sequential(Looks(), convnet()), cbs=OnAnother())
    assert fit_device(learn) == torch.device('cpu:0') != learn.dls.device
    find(learn, num_it=1)
    assert seen == {'cpu:0'} and learn.dls.device == learn.dls.train.device == torch.device('cpu')


def measure_synchronized():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    class Sync(nn.SyncBatchNorm):
        def forward(self, x):
            sizes.add(self.process_group is not None and torch.distributed.get_world_size(self.process_group))
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
    sizes = set()
    learn = learner(nn.Sequential(nn.Conv2d(3, 8, 3), Sync(8), *convnet(8)))
    t = find(learn, num_it=1)
    assert sizes == {1} and learn.model[1].process_group is None and 'Measured without the communication of `SyncBatchNorm`.' in t.notes


@pytest.mark.skipif(sys.platform != 'linux', reason='forks')
def test_format_find_leaves_out_the_communication_of_SyncBatchNorm_and_says_so():
    "A step that fails in one process would let the others wait."
    assert passes_in_new_process(measure_synchronized)


def test_format_find_notes_that_communication_is_left_out():
    assert 'without `ParallelTrainer` and its communication' in find(learner(cbs=ParallelTrainer([0])), num_it=1).verdict


@pytest.mark.parametrize('device, benchmark', [('cuda', False), ('cuda', True), ('cpu', False)])
def test_format_find_notes_that_cudnns_benchmark_is_off(gpu, device, benchmark):
    learn = gpu(device).learner() if device == 'cuda' else learner()
    with less_random(benchmark=benchmark): notes = find(learn, num_it=1).notes
    assert any('cudnn.benchmark = False' in o for o in notes) == (device == 'cuda' and not benchmark)


# a fresh Learner, whose model is still on the CPU: the first fit moves it

class Poisoned(nn.BatchNorm2d):
    "In channels last, a running variance becomes infinite, while the loss stays finite."
    def forward(self, x):
        out = super().forward(x)
        if self.training and self.weight.requires_grad and x.is_contiguous(memory_format=torch.channels_last): self.running_var.data.fill_(torch.inf)
        return out


class Renorm(nn.Module):
    "Normalizes with the running mean in training, too."
    def __init__(self): super().__init__(); self.register_buffer('mean', torch.zeros(1, 8, 1, 1))
    def forward(self, x):
        if self.training: self.mean.lerp_(x.detach().mean((0, 2, 3), keepdim=True), 0.5)
        return x - self.mean.clone()


def test_format_find_sees_infinite_buffers_of_a_model_that_it_moved(gpu):
    "A move makes new buffers: only the old ones were looked at."
    t = find(gpu().learner(nn.Sequential(nn.Conv2d(3, 8, 3), Poisoned(8), convnet(8))))
    assert t.rows[0].valid and '1.running_var is not finite' in t.rows[1].note


def test_format_find_restores_buffers_of_a_model_that_it_moved(gpu, monkeypatch):
    "Each comparison of numbers starts from the same buffers."
    mode, seen = gpu(), []
    class Looks(Renorm):
        def forward(self, x):
            if len(x) == 4: seen.append(self.mean.abs().max().item())
            return super().forward(x)
    assert all(r.valid for r in find(mode.learner(nn.Sequential(nn.Conv2d(3, 8, 3), Looks(), convnet(8)))).rows)
    assert len(seen) > 2 and not any(seen)


@pytest.mark.parametrize('device', ['mps', 'xpu', 'cuda:1'])
def test_format_find_fuses_the_optimizer_only_where_the_device_of_the_fit_can(gpu, device):
    "Asked before the move, the CPU's kernels were taken for those of Apple's and Intel's GPUs: ValueError."
    t = find(gpu(device).learner(), optimizer=True)
    assert any(r.fused for r in t.rows) == (device == 'cuda:1') and all(r.valid for r in t.rows)


class Weighted(nn.Module):
    "A loss with a parameter, as ArcFace and learned uncertainties have."
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(4))
    def forward(self, out, y): return nn.functional.cross_entropy(out*self.scale, y)


class Shifted(nn.Module):
    "Moves a tensor, which is no buffer, to the device of its input."
    def __init__(self): super().__init__(); self.net, self.mean = shake(convnet()), torch.full((1, 3, 1, 1), 0.45)
    def forward(self, x):
        self.mean = self.mean.to(x.device)
        return self.net(x - self.mean)


def test_a_loss_function_with_parameters_moves_to_the_device(gpu):
    learn = gpu().learner()
    learn.loss_func = Weighted()
    assert all(r.valid for r in find(learn).rows)


def test_a_tensor_that_the_model_moves_itself_does_not_end_predictions(gpu):
    learn = gpu().learner(Shifted(), cbs=FoldBatchNorm())
    for _ in range(2): preds_of(learn)
    assert learn.fold_batch_norm.works
    assert all(r.valid for r in find(gpu().learner(Shifted()), train=False).rows)


def test_rounding_errors_of_numbers_on_the_cpu_are_drawn_on_the_device(gpu):
    "Operations on a GPU take them, such as `x*torch.tensor(0.7)`; a generator draws on its own device only."
    mode = gpu()
    for device in 'cpu', mode.device:
        x, generator = torch.rand(9).to(device), torch.Generator(mode.device).manual_seed(0)
        y = perturb(x, 1e-2, generator)
        assert y.device == x.device and (x*0.98 < y).all() and (y < x*1.02).all() and (x != y).all()


# timing

def test_format_find_takes_more_steps_the_shorter_they_are_but_at_most_num_it(fake_steps):
    "A few rounds of 3 ms fit into one slow phase of the machine, so the choice was never certain."
    def _steps(ms, **kwargs):
        times[:] = [ms]
        fake_steps.settings.clear()
        find(**dict(num_it=None) | kwargs)
        return len(fake_steps.settings)
    times = []
    fake_steps(lambda setting, n: times[0]*(1 + 0.3/(1 + n)))  # no two steps take equally long
    assert _steps(3.) > 1.5*_steps(20.) > 1.5*_steps(20., num_it=8) > 1.5*_steps(3., num_it=4)


@pytest.mark.filterwarnings('ignore')  # autocast needs a real GPU
@pytest.mark.parametrize('device, slow_steps, valid', [('cuda', 9, False), ('cuda', 2, True), ('cpu', 2, False), ('cpu', 1, True)])
def test_a_candidate_is_dropped_as_emulated_if_its_first_steps_are_slow(has, gpu, fake_steps, device, slow_steps, valid):
    "On a GPU, the second step may still choose kernels."
    has('bf16')
    fake_steps(lambda setting, n: 100. if 'bf16' not in setting else 1e5 if fake_steps.settings.count(setting) <= slow_steps else 80.)
    t = find(gpu().learner() if device == 'cuda' else learner(), formats='contiguous')
    r = rows_of(t)['contiguous, bf16']
    assert r.valid == valid and (valid or 'times as long as in contiguous fp32' in r.note)
    assert t.best is (r if valid else t.rows[0])


def test_a_fused_optimizer_copies_no_list_to_the_device(monkeypatch):
    "A GPU waits for such a copy, up to twice per group and step."
    learn = learner(opt_func=fused(Adam))
    with learn.no_logging(): learn.fit(1)
    x, y = learn.dls.one_batch()
    learn.loss_func(learn.model(x), y).backward()
    real = torch.tensor
    def _tensor(data, *args, **kwargs):
        assert not isinstance(data, list)
        return real(data, *args, **kwargs)
    monkeypatch.setattr(torch, 'tensor', _tensor)
    learn.opt.step()


def test_format_summary_traces_the_backward_pass_in_one_thread():
    "CUDA's backward pass has its own thread, whose sequence numbers belong to other modules."
    seen = []
    class Look(nn.Module):
        def forward(self, x):
            x = x*1
            if x.requires_grad: x.register_hook(lambda g: seen.append(torch._C._is_multithreading_enabled()))
            return x
    learner(nn.Sequential(nn.Conv2d(3, 3, 1), Look(), convnet())).format_summary()
    assert seen == [False] and torch._C._is_multithreading_enabled()


# random states and numbers

def test_less_random_starts_no_device(monkeypatch):
    "Starting CUDA raised in a forked process, even for a model on the CPU."
    def _raise(): raise RuntimeError('Cannot re-initialize CUDA in forked subprocess')
    seeds, was = [], torch.initial_seed()
    for name, f in dict(is_available=lambda: True, is_initialized=lambda: False, get_rng_state_all=_raise, manual_seed_all=seeds.append).items():
        monkeypatch.setattr(torch.cuda, name, f)
    with less_random(seed=7): pass
    assert seeds[-1] == torch.initial_seed() == was != 7


@pytest.mark.parametrize('device, wide', [('xpu', False), ('mps', False), ('cuda', True), ('cpu', True)])
def test_gradients_are_compared_in_fp64_where_the_device_has_it(gpu, monkeypatch, device, wide):
    "Intel Arc and Apple GPUs have no float64. A CPU's float32 norm of 100 million numbers is 1% off."
    asked, real = set(), torch.linalg.vector_norm
    learn = learner() if device == 'cpu' else gpu(device).learner()
    if device != 'cpu':
        was = torch.Tensor.is_cpu, torch.Tensor.is_cuda
        monkeypatch.setattr(torch.Tensor, 'is_cpu', False)
        monkeypatch.setattr(torch.Tensor, 'is_cuda', device == 'cuda')
        assert was != (torch.Tensor.is_cpu, torch.Tensor.is_cuda)
    def _norm(*args, dtype=None, **kwargs):
        asked.add(dtype)
        return real(*args, dtype=dtype, **kwargs)
    monkeypatch.setattr(torch.linalg, 'vector_norm', _norm)
    find(learn, num_it=1)
    assert asked and (torch.float64 in asked) == wide


def test_gradients_of_contiguous_fp32_leave_the_device(monkeypatch):
    "There, they would be one more copy of the model."
    moved, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda t: (moved.append(t.shape), real(t))[1])
    learn = learner()
    find(learn, num_it=1)
    assert {p.shape for p in learn.model.parameters()} <= {*moved}


def test_results_of_one_candidate_are_freed_before_the_next_one_is_compared(has):
    "Otherwise its activations in main memory and its gradients on the device stay during the next comparison."
    has('bf16')
    last, alive = [''], []
    class Looks(nn.Conv2d):
        def forward(self, x):
            if (setting := setting_of(learn)) not in (last[0], 'contiguous, fp32'):
                alive.append(sum(isinstance(o, torch.Tensor) and o.shape == (8, 7, 6, 6) for o in gc.get_objects()))
            last[0] = setting
            return super().forward(x)
    learn = learner(nn.Sequential(Looks(3, 7, 3), nn.ReLU(), convnet(7)))
    gc.collect(); gc.freeze()  # objects that exist already are not listed
    find(learn, num_it=1)
    assert len(alive) > 6 and not any(alive)


# devices where channels last is wrong or slow

@pytest.mark.parametrize('kind, version, hip, told, miopen, said', [
    ('mps', '2.13.0', None, None, 0, 'wrong gradients'),
    ('mps', '2.14.1', None, None, 0, '30 times'), ('mps', '2.15.0', None, None, 0, ''), ('cpu', '2.8.0', None, None, 0, ''),
    ('cuda', '2.14.1+cu130', None, None, 0, ''), ('cuda', '2.14.1', '7.2', None, 3006000, 'MIOPEN'), ('cuda', '2.14.1', '7.2', '1', 3006000, ''),
    ('cuda', '2.10.0', '7.0', None, 3005000, ''), ('cuda', '2.10.0', '6.4', None, 3004000, 'MIOPEN'), ('cuda', '2.10.0', '7.0', '0', 3005000, 'MIOPEN'),
    ('cuda', '2.8.0', '7.0', 'yes', 3005000, 'MIOPEN')])
def test_known_problem_of_a_device_and_pytorch(monkeypatch, kind, version, hip, told, miopen, said):
    monkeypatch.setattr(torch, '__version__', version)
    monkeypatch.setattr(torch.version, 'hip', hip)
    monkeypatch.setattr(torch.backends.cudnn, 'version', lambda: miopen)
    monkeypatch.setenv('PYTORCH_MIOPEN_SUGGEST_NHWC', told) if told else monkeypatch.delenv('PYTORCH_MIOPEN_SUGGEST_NHWC', raising=False)
    found = known_problem(torch.device(kind))
    assert bool(found) == bool(said) and said in found


def test_training_in_channels_last_warns_once_of_a_known_problem_unless_the_format_was_measured(gpu, fake_steps, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.14.1')
    mode = gpu('mps')
    learn = mode.learner().to_channelslast(to_fp16=False)
    with learn.no_logging(), pytest.warns(UserWarning, match='30 times') as said: learn.fit(1); learn.fit(1)
    assert len([o for o in said if '30 times' in str(o.message)]) == 1
    fake_steps({'channels last, fp32': 50.})
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*30 times')
        learn = mode.learner().to_fastest(num_it=3)
        with learn.no_logging(): learn.fit(1)
    assert learn.format_timings.best.memory_format == 'channels_last'


def test_format_find_does_not_warn_of_deterministic_cudnn_but_training_does(gpu):
    "While measuring, nothing is chosen yet: numbers and times are measured anyway."
    mode = gpu()
    with less_random(deterministic=True, benchmark=False), warnings.catch_warnings():
        warnings.filterwarnings('error', message='cuDNN is set to deterministic')
        assert all(r.valid for r in find(mode.learner(), num_it=1).rows)
        learn = mode.learner().to_channelslast(to_fp16=False)
        with learn.no_logging(), pytest.raises(UserWarning, match='can fail'): learn.fit(1)


# on a GPU itself

GPU = torch.device('cuda', 0)


def on_gpu(model=None, n=64, bs=16, **kwargs): return learner(model, loaders((3, 32, 32), n=n, bs=bs).to(GPU), **kwargs)


@pytest.mark.cuda
def test_cuda_format_find_measures_cudnns_lstm_with_its_memory():
    for train in True, False:
        t = on_gpu(Recurrent(nn.LSTM)).format_find(show_plot=False, train=train)
        assert all(r.valid and r.memory > 0 for r in t.rows if r.ms) and len(t.rows) >= 4, t
    learn = on_gpu(Recurrent(nn.LSTM)).to_fastest()
    with learn.no_logging(): learn.fit(1)


@pytest.mark.cuda
def test_cuda_format_find_accepts_a_deep_network_in_tf32(monkeypatch):
    from torchvision.models import resnet50
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    t = on_gpu(resnet50(num_classes=4)).format_find(show_plot=False, precisions='fp32')
    assert all(r.valid for r in t.rows), t


@pytest.mark.cuda
def test_cuda_format_find_keeps_its_batches_on_the_device(monkeypatch):
    "Before a first fit, when the model is still on the CPU, and with PyTorch's own loaders, which have no device."
    real, found = Learner.one_batch, set()
    def _one_batch(self, i, b):
        found.update(t.device for t in b)
        real(self, i, b)
    monkeypatch.setattr(Learner, 'one_batch', _one_batch)
    find(on_gpu())
    dl = torch.utils.data.DataLoader([(torch.randn(3, 32, 32), torch.tensor(1)) for _ in range(16)], batch_size=8)
    assert find(learner(dls=DataLoaders(dl, dl)), num_it=2).rows[0].memory > 0
    assert found == {GPU}


@pytest.mark.cuda
def test_cuda_format_find_repeats_skipped_steps():
    t = on_gpu(steep()).format_find(precisions='fp16', show_plot=False, growth_interval=1)
    assert all(r.valid for r in t.rows), t


@pytest.mark.cuda
def test_cuda_format_find_halves_the_batches_until_contiguous_fp32_has_memory():
    "With GPU memory for one image in fp32, but not for 64."
    class Wide(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.head = nn.Conv2d(3, 256, 3, padding=1), nn.Linear(256, 4)
        def forward(self, x): return self.head(self.conv(nn.functional.interpolate(x, size=256)).relu().mean((2, 3)))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + 6e9)/total, GPU)
    try: t = on_gpu(Wide(), bs=64).format_find(show_plot=False, precisions='fp32', layers=False)
    finally: torch.cuda.set_per_process_memory_fraction(1., GPU)
    assert all(r.valid for r in t.rows) and 'of the 64 items' in t.verdict


@pytest.mark.cuda
def test_cuda_a_fused_optimizer_waits_for_nothing():
    learn = on_gpu(opt_func=fused(Adam))
    with learn.no_logging(): learn.fit(1)
    x, y = learn.dls.one_batch()
    learn.loss_func(learn.model(x), y).backward()
    torch.cuda.set_sync_debug_mode('error')
    try: learn.opt.step()
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.cuda
def test_cuda_format_summary_names_the_modules_of_backward_conversions():
    "They belong to the same modules as on the CPU. (cuDNN's norms keep the format, a CPU's instance norm doesn't.)"
    class Flat(nn.Module):
        def forward(self, x): return x.flatten(2).softmax(-1).view(x.shape)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Flat(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    def _names(learn): return {(r.module, r.backward) for r in learn.to_channelslast(to_fp16=False).format_summary().lost}
    expected = _names(learner(net, loaders((3, 32, 32))))
    assert {b for _, b in expected} == {False, True} and _names(on_gpu(net)) == expected


@pytest.mark.cuda
def test_cuda_less_random_restores_the_random_states():
    torch.rand(1, device=GPU)
    before = torch.cuda.get_rng_state(GPU)
    with less_random(): torch.rand(9, device=GPU)
    assert torch.equal(before, torch.cuda.get_rng_state(GPU))


@pytest.mark.cuda
def test_cuda_compiled_predictions_are_the_same_and_hold_the_weights_once():
    "Their memory is freed with the callback."
    from torchvision.models import resnet18
    learn = on_gpu(shake(resnet18(num_classes=4)), n=32)
    with learn.no_bar(), learn.no_logging():
        expected = learn.get_preds()[0]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        learn.add_cb(CompilePredictions())
        for _ in range(2): torch.testing.assert_close(learn.get_preds()[0], expected, rtol=1e-2, atol=1e-3)
        assert learn.compile_predictions.compiled, learn.compile_predictions.reason
        weights = sum(p.nbytes for p in learn.model.parameters())
        assert torch.cuda.memory_allocated() - before < 1.5*weights
        learn.remove_cb(CompilePredictions)
        gc.collect()
        assert torch.cuda.memory_allocated() - before < 0.2*weights
        learn.to_fastest(train=False, compile=True)
        assert all(r.valid for r in learn.format_timings.rows), learn.format_timings


@pytest.mark.cuda
def test_cuda_compiled_training_learns_with_the_gradient_scaler():
    "The code that was measured trains the Learner."
    from torchvision.models import resnet18
    learn = on_gpu(resnet18(num_classes=4), cbs=CompileTraining()).to_channelslast()
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert learn.compile_training.compiled == 1 and not learn.compile_training.reason
    assert all(p.isfinite().all() for p in learn.model.parameters())
    t = on_gpu(resnet18(num_classes=4)).format_find(compile=True, show_plot=False)
    assert all(r.valid for r in t.rows), t
