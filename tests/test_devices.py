"GPU conditions simulated on a CPU: skipped steps, worker processes, TF32, cuDNN's errors, too little memory, other devices."
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
from fastai.vision.all import Adam, Callback, DataLoader, DataLoaders, GradientAccumulation, fastuple
from torch import nn

from channelslast import CompilePredictions, CompileTraining, fused, less_random
from channelslast.command.demo import StepTimer
from channelslast.command.reference_timing import plain_loop, timed_fit_step
from channelslast.core import devices
from channelslast.core.devices import autocast_is_fast, fit_device, fp32_precision, is_out_of_memory, known_problem, synchronize
from channelslast.core.nested_tensors import first_half
from channelslast.find import candidates, layer_timing, number_check, predict_benchmark, train_benchmark
from channelslast.find.results import Timing
from channelslast.learner import channels_last as callback
from channelslast.learner.preserve_learner import preserve_learner
from .conftest import Steep, convnet, learner, loaders, shake
from .test_format_find import fake, find
from .test_format_summary import same, state

CUDA = torch.device('cuda:1')


# steps that the gradient scaler skips

class Steeper(nn.Module):
    "Gradients that overflow in fp16 while the scale is large, only in training mode: numbers are compared in eval mode."
    def forward(self, x): return Steep.apply(x) if self.training else x


def steep(): return nn.Sequential(nn.Conv2d(3, 8, 3), Steeper(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture
def skipping(has, monkeypatch):
    "Steps of 20 ms, skipped ones of 2 ms; has one item per skipped step."
    real, found = train_benchmark.step_ms, []
    def _ms(learn, batch):
        real(learn, batch)
        if skipped := any(cb.skipped for cb in learn._grab_cbs(MixedPrecision)): found.append(1)
        return 2. if skipped else 20.
    monkeypatch.setattr(train_benchmark, 'step_ms', _ms)
    has('fp16')
    return found


@pytest.mark.parametrize('scaler', [{}, dict(growth_interval=1)])
def test_a_skipped_step_is_no_step(skipping, scaler):
    "✗ The fastest step of a candidate was one without the optimizer."
    t = find(learner(steep()), **scaler)
    assert skipping and {r.precision for r in t.rows} == {'fp32', 'fp16'}
    assert all(r.ms == 20. for r in t.rows if r.valid) and [r.valid for r in t.rows] == [True]*4


def test_accumulated_batches_are_not_skipped(has):
    "They never reach the scaler, whose flag for the step before stayed set."
    has('fp16')
    t = find(learner(steep(), cbs=GradientAccumulation(64)))
    assert [r.valid for r in t.rows] == [True]*4, t


def test_who_skips_each_step_is_out(skipping, monkeypatch):
    monkeypatch.setattr(train_benchmark, 'MAX_SKIPS', 3)
    t = find(learner(steep()))
    assert [r.note for r in t.rows] == ['', 'the gradient scaler skipped 3 steps in a row']*2 and not t.rows[1].valid


def test_the_judge_counts_no_skipped_step(has, monkeypatch):
    "Neither of a Learner, nor of the plain loop, nor of the demo."
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
    plain_loop(learner(steep(), opt_func=_opt), batch, Timing('channels_last', 'fp16'))()
    assert len(ran) == 1
    ran.clear()
    learn = learner(steep(), opt_func=_opt, dls=loaders(n=256)).to_channelslast()
    with learn.no_logging(): learn.fit(1, cbs=(timer := StepTimer()))
    assert 0 < len(ran) == len(timer.ms) < 32


# loaders with worker processes

class Slow:
    def __init__(self, n, seconds): self.n, self.seconds = n, seconds
    def __len__(self): return self.n
    def __getitem__(self, i):
        time.sleep(self.seconds)
        return torch.zeros(3, 4, 4), torch.tensor(0)


@pytest.mark.parametrize('workers, n', [(0, 64), (2, 64), (3, 200), (3, 8)])
def test_worker_processes_do_not_hide_a_slow_loader(workers, n):
    "✗ Eight workers that load a batch every 20 ms were measured as 0.2 ms, since their first batches were already loaded."
    dl = DataLoader(Slow(n, 0.03), bs=2, num_workers=workers)
    _, ms = train_benchmark.load_batches(learner(dls=DataLoaders(dl, dl, device=torch.device('cpu'))), dl)
    assert ms > 0.9*60/max(workers, 1)  # other load only makes it slower


def waves(workers, n, ms): return [ms*(1 + i//workers) for i in range(n)]


@pytest.mark.parametrize('came, workers, complete, ms', [
    ([], 0, False, 0.), ([50.], 0, False, 50.), ([50., 60., 70., 90.], 0, False, 10.),  # the first batch includes the setup
    (waves(4, 16, 100.), 4, True, 25.), (waves(16, 64, 400.), 16, True, 25.), (waves(1, 10, 30.), 1, True, 30.),
    (waves(4, 6, 100.), 4, False, 200/6),  # of a short epoch, all batches count
    ([21000.], 16, False, 21000/16), (waves(2, 8, 7000.)[:5], 2, False, 21000/5)])  # the time limit was reached
def test_milliseconds_of_a_batch(came, workers, complete, ms):
    assert train_benchmark._ms_per_batch(came, workers, complete) == pytest.approx(ms)


# TF32

def on(monkeypatch, capability=(8, 0), name='NVIDIA A100', bf16=True):
    "Simulate a GPU; returns the list of devices that it is asked about."
    monkeypatch.setattr(torch.cuda, 'device', lambda d: nullcontext(asked.append(d)))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d=None: name)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bf16)
    asked = []
    return asked


@pytest.mark.parametrize('capability, precision', [((7, 5), 'fp32'), ((8, 0), 'fp16'), ((12, 0), 'fp16')])
def test_where_cuda_computes_in_tf32(monkeypatch, capability, precision):
    on(monkeypatch, capability)
    assert fp32_precision(CUDA) == precision
    for d in 'mps', 'xpu', 'cpu': assert fp32_precision(torch.device(d)) == 'fp32'


def test_settings_of_the_new_api_are_read():
    "✗ After `torch.backends.fp32_precision = 'ieee'`, reading `cudnn.allow_tf32` raises, and so did folding."
    code = '''if True:
        import torch, warnings
        from unittest import mock
        from channelslast import FoldBatchNorm
        from channelslast.core.devices import fp32_precision
        from tests.conftest import convnet, learner, shake
        gpu, cpu = map(torch.device, ('cuda', 'cpu'))
        warnings.filterwarnings('error', message='FoldBatchNorm')
        with mock.patch('torch.cuda.get_device_capability', return_value=(9, 0)):
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
    '''
    subprocess.run([sys.executable, '-c', code], check=True, cwd=str(devices.__file__).rpartition('/channelslast/')[0])


class Rounded(nn.Module):
    "Outputs differ in channels last as much as a ResNet-50's do if only one format uses TF32."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x): return 20*self.net(x)*(1.004 if self.net[0].weight.stride(1) == 1 else 1)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('computed', ['fp32', 'fp16'])
def test_fp32_in_tf32_has_the_limits_of_fp16(has, monkeypatch, train, computed):
    has()
    monkeypatch.setattr(number_check, 'fp32_precision', lambda d: computed)
    t = find(learner(Rounded()), train=train)
    assert t.rows[1].valid == (computed == 'fp16')


def tf32(t):
    "Rounded to TF32's 10 bits."
    return t + (((t.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) - t.detach())


class InTF32(nn.Conv2d):
    "TF32 only in channels last: cuDNN may choose it for one format alone."
    def reset_parameters(self): nn.init.kaiming_normal_(self.weight)
    def forward(self, x):
        return self._conv_forward(tf32(x), tf32(self.weight), self.bias) if self.weight.stride(1) == 1 else super().forward(x)


@pytest.mark.parametrize('train', [True, False])
def test_convolutions_in_tf32(has, monkeypatch, train):
    has()
    monkeypatch.setattr(number_check, 'fp32_precision', lambda d: 'fp16')
    deep = [m for _ in range(8) for m in (InTF32(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    t = find(learner(nn.Sequential(InTF32(3, 8, 3, bias=False), *deep, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))), train=train)
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
    def __init__(self):
        super().__init__()
        self.body, self.rnn, self.head = convnet()[:6], Cudnn(16, 8, 2, batch_first=True, dropout=0.5), nn.Linear(8, 4)
    def forward(self, x):
        modes.append((self.body[1].training, self.rnn.training, self.rnn.dropout))
        return self.head(self.rnn(self.body(x).flatten(2).transpose(1, 2))[0][:, -1])


modes = []


def test_recurrent_layers_on_cuda(has, monkeypatch):
    "✗ The comparison in eval mode raised. Batch norms in the same model are still compared in eval mode."
    has()
    learn, real = learner(Recurrent()), number_check.check_numbers
    def _check(*args):
        modes.clear()
        real(*args)
        assert {*modes} == {(False, True, 0.)}
        modes.clear()
    monkeypatch.setattr(train_benchmark, 'check_numbers', _check)
    before = state(learn)
    t = find(learn)
    assert [r.valid for r in t.rows] == [True]*2 and {*modes} == {(True, True, 0.5)} and t.rows[1].grad_diff < 1e-3
    same(state(learn), before)
    assert learn.model.rnn.dropout == 0.5


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
def test_contiguous_fp32_without_memory_halves_the_batches(has, train):
    "✗ A batch as large as fp16 allows could not be measured at all."
    has('bf16')
    learn = learner(nn.Sequential(Large(3), convnet()))
    t = find(learn, train=train)
    assert all(r.valid for r in t.rows) and {*Large.seen[-8:]} == {2}
    assert 'Measured on 2 of the 8 items of each batch' in t.verdict


def test_without_memory_for_one_item_it_is_the_users_error(has):
    has()
    with pytest.raises(torch.OutOfMemoryError): find(learner(nn.Sequential(Large(0), convnet())))


def test_other_candidates_without_memory_are_out_alone(has):
    has('bf16')
    class Other(nn.Module):
        def forward(self, x):
            if torch.is_autocast_enabled('cpu'): raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return x
    t = find(learner(nn.Sequential(Other(), convnet())))
    assert [r.note for r in t.rows] == ['', 'out of memory']*2 and t.notes == []


@pytest.mark.parametrize('make', [
    lambda x: (x, x[:, 0]), lambda x: ([x, x], {'a': x}), lambda x: (fastuple(x, x), x), lambda x: {'image': x},
    lambda x: ([*x], [{'boxes': torch.ones(5, 4), 'label': o} for o in x])])  # of a detector
def test_half_of_a_batch(make):
    x = torch.arange(24.).view(4, 6)
    found, truth = first_half(make(x), 4), make(x[:2])
    assert type(found) == type(truth)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize('batch', [(torch.ones(3, 4),), (torch.tensor(1.), 'name'), torch.ones(3)])
def test_what_has_no_half_stays(batch): assert first_half(batch, 4) is batch


class Fragile(nn.Module):
    "In channels last, fails at the start of the backward pass, when all activations are alive. `refs` watches one of them."
    def __init__(self): super().__init__(); self.conv, self.net = nn.Conv2d(3, 3, 3, padding=1), convnet()
    def forward(self, x):
        x = self.conv(x)
        Fragile.refs.append(weakref.ref(x))
        out = self.net(x)
        def _raise(g): raise torch.OutOfMemoryError('out of memory')
        if out.requires_grad and self.conv.weight.stride(1) == 1: out.register_hook(_raise)
        return out
    refs = []


def test_a_step_that_failed_leaves_no_activations(has, monkeypatch):
    "✗ `learn.loss_grad` and the error's traceback kept them while the next candidate ran."
    has()
    Fragile.refs.clear()
    left = []
    def _free(device): left.append([r for r in Fragile.refs if r() is not None])
    monkeypatch.setattr(candidates, 'free_memory', _free)
    t = find(learner(Fragile()))
    assert t.rows[1].note == 'out of memory' and left == [[]]


def test_memory_goes_back_at_the_end(has, monkeypatch):
    has()
    freed = []
    monkeypatch.setattr(torch.cpu, 'empty_cache', lambda: freed.append(1), raising=False)
    find()
    assert freed


@pytest.mark.parametrize('e, oom', [(torch.OutOfMemoryError('x'), True), (RuntimeError('MPS backend out of memory (MPS'), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), True), (RuntimeError('CUBLAS_STATUS_ALLOC_FAILED when calling'), True),
    (RuntimeError('CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED'), True), (MemoryError(), True), (ValueError('out of memory'), False), (RuntimeError('shape'), False)])
def test_what_is_out_of_memory(e, oom): assert is_out_of_memory(e) == oom


def test_peak_memory_is_of_the_step_alone(monkeypatch):
    "Without the memory of the warm-up, which tries kernels, and without the copies of `preserve_learner`."
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda d: None)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda d: 50*2**20)
    c, me = SimpleNamespace(memory=40.), SimpleNamespace(device=CUDA, copied_bytes=20*2**20)
    with train_benchmark.TrainBenchmark.peak_memory(me, c): pass
    assert c.memory == 40.
    c.memory = None
    with train_benchmark.TrainBenchmark.peak_memory(me, c): pass
    assert c.memory == 30.


def test_memory_of_the_warm_up_does_not_count(has, monkeypatch):
    has()
    real = train_benchmark.TrainBenchmark.run
    def _run(self, *args):
        for c in self.candidates: c.memory = 1e6
        return real(self, *args)
    monkeypatch.setattr(train_benchmark.TrainBenchmark, 'run', _run)
    assert [r.memory for r in find().rows] == [None]*2


def test_the_copies_of_the_search_are_counted(has, monkeypatch):
    has()
    real, found = train_benchmark.TrainBenchmark.run, []
    monkeypatch.setattr(train_benchmark.TrainBenchmark, 'run', lambda self, *args: (found.append(self.copied_bytes), real(self, *args))[1])
    learn = learner()
    find(learn)
    held = [*learn.model.parameters(), *learn.model.buffers()]
    assert found[0] >= sum(t.numel()*t.element_size() for t in held)


# which device

def test_each_device_is_waited_for(monkeypatch):
    "✗ `torch.cuda.synchronize()` waits for the current device, so only the launches were timed on `cuda:1`."
    waited = []
    for m in torch.cuda, torch.xpu: monkeypatch.setattr(m, 'synchronize', lambda d: waited.append(d))
    monkeypatch.setattr(torch.mps, 'synchronize', lambda: waited.append('mps'))
    for d in map(torch.device, ('cuda:1', 'xpu:2', 'mps', 'cpu')): synchronize(d)
    assert waited == [CUDA, torch.device('xpu:2'), 'mps']


def test_peak_memory_of_xpu(monkeypatch):
    monkeypatch.setattr(torch.xpu, 'reset_peak_memory_stats', lambda d: None)
    monkeypatch.setattr(torch.xpu, 'max_memory_allocated', lambda d: 50*2**20)
    c, me = SimpleNamespace(memory=None), SimpleNamespace(device=torch.device('xpu'), copied_bytes=20*2**20)
    with train_benchmark.TrainBenchmark.peak_memory(me, c): pass
    assert c.memory == 30.


@pytest.mark.parametrize('name, capability, bf16, fast', [
    ('NVIDIA A100', (8, 0), True, {'fp16', 'bf16'}), ('Tesla T4', (7, 5), False, {'fp16'}), ('Tesla V100', (7, 0), False, {'fp16'}),
    ('NVIDIA GeForce GTX 1660 Ti', (7, 5), False, set()), ('Quadro T1000', (7, 5), False, set()), ('NVIDIA T400 4GB', (7, 5), False, set()),
    ('NVIDIA GeForce MX450', (7, 5), False, set()), ('Quadro RTX 4000', (7, 5), False, {'fp16'}), ('Tesla P100', (6, 0), False, set())])
def test_what_cuda_accelerates(monkeypatch, name, capability, bf16, fast):
    "fp16 needs tensor cores. The GPU in question is asked, not the current one."
    asked = on(monkeypatch, capability, name, bf16)
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda d: True)
    assert {m.value for m in AMPMode if autocast_is_fast(CUDA, m)} == fast and {*asked} == {CUDA}


@pytest.mark.parametrize('chip, fast', [('Apple M1 Pro', {'fp16'}), ('Apple M2', {'fp16'}), ('Apple M3 Max', {'fp16', 'bf16'}), ('', {'fp16', 'bf16'})])
def test_what_mps_accelerates(monkeypatch, chip, fast):
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda d: True)
    monkeypatch.setattr(devices, '_apple_chip', lambda: chip)
    monkeypatch.setattr(torch, '__version__', '2.8.0')
    assert {m.value for m in AMPMode if autocast_is_fast('mps', m)} == fast


@pytest.mark.parametrize('fp64', [True, False])
def test_fp16_on_xpu_needs_fp64(monkeypatch, fp64):
    "The gradient scaler computes in fp64."
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda d: True)
    monkeypatch.setattr(torch.xpu, 'get_device_properties', lambda d: SimpleNamespace(has_fp64=fp64))
    assert autocast_is_fast('xpu', AMPMode.FP16) == fp64 and autocast_is_fast('xpu', AMPMode.BF16)


def test_pytorchs_own_loaders_have_no_device(monkeypatch):
    "fastai then moves the model to its default device."
    monkeypatch.setattr(devices, 'default_device', lambda: CUDA)
    learn = learner()
    assert fit_device(learn) == torch.device('cpu')
    plain = torch.utils.data.DataLoader([(torch.zeros(3, 8, 8), 0)])
    assert fit_device(learner(dls=DataLoaders(plain, plain))) == CUDA
    learn.dls._device = None
    assert fit_device(learn) == torch.device('cpu')  # the model stays where it is


def test_a_cpus_learner_does_not_start_cuda(monkeypatch):
    "fastai's `default_device` asks CUDA for its current device, which starts it."
    monkeypatch.setattr(devices, 'default_device', lambda: pytest.fail('CUDA was started'))
    assert fit_device(learner()) == torch.device('cpu')


def test_batches_wait_on_the_device(monkeypatch):
    "✗ Before a first fit, batches went to the CPU, where the model still was, so each step copied its batch again."
    monkeypatch.setattr(train_benchmark, 'synchronize', lambda d: None)
    dls = loaders()
    dls.device = torch.device('meta')
    batches, _ = train_benchmark.load_batches(learner(dls=dls), dls.train)
    assert all(t.is_meta for b in batches for t in b)


def test_a_chip_without_a_name():
    if sys.platform == 'darwin': pytest.skip('this one has a name')
    assert devices._apple_chip() == ''


class OnAnother(Callback):
    "Holds the device of its process, as `DistributedTrainer` does."
    def __init__(self): self.accelerator = SimpleNamespace(device=torch.device('cpu:0'))


def test_each_process_measures_on_its_own_device():
    "✗ Loaders made before the process group is initialized are on the first GPU in all processes."
    learn = learner(cbs=OnAnother())
    assert fit_device(learn) == torch.device('cpu:0') != learn.dls.device
    with preserve_learner(learn):
        assert not learn._grab_cbs(OnAnother) and fit_device(learn) == learn.dls.device == learn.dls.train.device == torch.device('cpu:0')
    assert learn.dls.device == learn.dls.train.device == torch.device('cpu')


def test_what_is_left_out_is_said(fake):
    fake({})
    assert 'without `ParallelTrainer` and its communication' in find(learner(cbs=ParallelTrainer([0]))).verdict


def test_cudnns_flag_is_said(fake, monkeypatch):
    fake({})
    monkeypatch.setattr(sys.modules['channelslast.find.format_find'], 'fit_device', lambda learn: SimpleNamespace(type=kind, device='cpu'))
    monkeypatch.setattr(sys.modules['channelslast.find.format_find'], 'free_memory', lambda d: None)
    for kind, benchmark in ('cuda', False), ('cuda', True), ('cpu', False):
        with less_random(benchmark=benchmark):
            notes = sys.modules['channelslast.find.format_find']._notes(learner(), 8, 8, wrapped=[])
        assert bool(notes) == (kind == 'cuda' and not benchmark)


# timing

@pytest.mark.parametrize('ms, num_it, rounds', [(3., None, 60), (10., None, 25), (3., 4, 4)])
def test_very_short_steps_take_more_rounds(has, fake, ms, num_it, rounds):
    "✗ Fifteen rounds of 3 ms fit into one slow phase of the machine, so the choice was never certain."
    has(); fake(lambda key, n: ms*(1 + 0.3/(1 + n)))  # no two steps take equally long
    find(num_it=num_it)
    assert len(fake.steps) == 2*(1 + rounds)


@pytest.mark.parametrize('kind, ms', [('cpu', 100.), ('cuda', 10.)])
def test_layers_on_a_gpu_are_launched_one_behind_the_other(monkeypatch, kind, ms):
    monkeypatch.setattr(layer_timing, 'elapsed_ms', lambda device, f: (f(), 100.)[1])
    m, ran = nn.Conv2d(3, 3, 1), []
    m.register_forward_hook(lambda *args: ran.append(1))
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
        m.forward = lambda x, f=m.forward: (ran.append(1), f(x))[1]
        assert layer_timing.layer_ms(m, x, SimpleNamespace(type=kind), torch.bfloat16, False) == ms
    assert len(ran) == 100/ms and x.grad is None and m.weight.grad is None


@pytest.mark.parametrize('firsts, apart, steps', [((2001.,)*3, {}, 3), ((2001.,)*2, {}, 2 + 1 + 3), ((2001.,)*2, {'cpu'}, 2)])
def test_elsewhere_a_second_step_may_be_slow_too(has, fake, monkeypatch, firsts, apart, steps):
    monkeypatch.setattr(train_benchmark, 'SYNCHRONOUS', apart)
    half = 'contiguous', 'bf16'
    has('bf16'); fake(lambda key, n: 100. if key != half else firsts[k - 1] if (k := fake.steps.count(half)) <= len(firsts) else 80.)
    find(formats='contiguous')
    assert fake.steps.count(half) == steps


def test_fused_steps_copy_no_list(monkeypatch):
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


def test_the_backward_pass_is_traced_in_one_thread():
    "CUDA's backward pass has its own thread, whose sequence numbers belong to other modules."
    seen = []
    class Look(nn.Module):
        def forward(self, x):
            x = x*1
            if x.requires_grad: x.register_hook(lambda g: seen.append(torch._C._is_multithreading_enabled()))
            return x
    learner(nn.Sequential(nn.Conv2d(3, 3, 1), Look(), convnet())).format_summary()
    assert seen == [False] and torch._C._is_multithreading_enabled()


# random states

def test_no_device_is_started_for_its_random_states(monkeypatch):
    "✗ Starting CUDA raised in a forked process, even for a model on the CPU."
    def _raise(): raise RuntimeError('Cannot re-initialize CUDA in forked subprocess')
    seeds, was = [], torch.initial_seed()
    for name, f in dict(is_available=lambda: True, is_initialized=lambda: False, get_rng_state_all=_raise, manual_seed_all=seeds.append).items():
        monkeypatch.setattr(torch.cuda, name, f)
    with less_random(seed=7): pass
    assert seeds[-1] == torch.initial_seed() == was != 7


def test_norms_without_float64(monkeypatch):
    "Intel Arc and Apple GPUs have no float64."
    asked = []
    monkeypatch.setattr(torch.linalg, 'vector_norm', lambda t, dtype: (asked.append(dtype), 3.)[1])
    for kind in 'xpu', 'mps', 'cuda', 'cpu':
        number_check._norm([SimpleNamespace(is_cpu=kind == 'cpu', is_cuda=kind == 'cuda', dtype=torch.float32)])
    assert asked == [None, None, torch.float64, torch.float64]


# devices where channels last is wrong or slow

@pytest.mark.parametrize('kind, version, hip, told, miopen, said', [
    ('mps', '2.6.0', None, None, 0, 'wrong gradients'), ('mps', '2.13.0', None, None, 0, 'wrong gradients'),
    ('mps', '2.14.1', None, None, 0, '30 times'), ('mps', '2.15.0', None, None, 0, ''), ('cpu', '2.6.0', None, None, 0, ''),
    ('cuda', '2.14.1+cu130', None, None, 0, ''), ('cuda', '2.14.1', '7.2', None, 3006000, 'MIOPEN'), ('cuda', '2.14.1', '7.2', '1', 3006000, ''),
    ('cuda', '2.10.0', '7.0', None, 3005000, ''), ('cuda', '2.10.0', '6.4', None, 3004000, 'MIOPEN'), ('cuda', '2.10.0', '7.0', '0', 3005000, 'MIOPEN'),
    ('cuda', '2.8.0', '7.0', 'yes', 3005000, 'MIOPEN')])
def test_weakness(monkeypatch, kind, version, hip, told, miopen, said):
    monkeypatch.setattr(torch, '__version__', version)
    monkeypatch.setattr(torch.version, 'hip', hip)
    monkeypatch.setattr(torch.backends.cudnn, 'version', lambda: miopen)
    monkeypatch.setenv('PYTORCH_MIOPEN_SUGGEST_NHWC', told) if told else monkeypatch.delenv('PYTORCH_MIOPEN_SUGGEST_NHWC', raising=False)
    found = known_problem(torch.device(kind))
    assert bool(found) == bool(said) and said in found


def test_a_weakness_is_said_once_and_not_of_what_was_measured(has, fake, monkeypatch):
    has(); fake({('channels_last', 'fp32'): 50.})
    monkeypatch.setattr(callback, 'known_problem', lambda d: 'channels last is slow here')
    learn = learner().to_channelslast(to_fp16=False)
    with learn.no_logging(), pytest.warns(UserWarning, match='is slow here') as said: learn.fit(1); learn.fit(1)
    assert len([o for o in said if 'is slow here' in str(o.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*is slow here')
        learn = learner().to_fastest(num_it=3)
        with learn.no_logging(): learn.fit(1)
    assert learn.format_timings.best.memory_format == 'channels_last'


def test_measuring_warns_of_nothing(has, monkeypatch):
    "Numbers and times are measured anyway, and a candidate is not chosen yet."
    has()
    monkeypatch.setattr(callback, 'model_device', lambda m: CUDA)
    with less_random(deterministic=True, benchmark=False), warnings.catch_warnings():
        warnings.filterwarnings('error', message='cuDNN is deterministic')
        assert all(r.valid for r in find().rows)


@pytest.mark.parametrize('version, fast', [('2.7.1', False), ('2.8.0', True), ('2.15.0', True)])
def test_fp16_on_mps_needs_a_scaler_that_works(monkeypatch, version, fast):
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda d: True)
    monkeypatch.setattr(torch, '__version__', version)
    assert autocast_is_fast('mps', AMPMode.FP16) == fast


def test_the_reference_leaves_the_device(has, monkeypatch):
    "On the device, its gradients would be one more copy of the model."
    has()
    moved, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda t: (moved.append(t.shape), real(t))[1])
    learn = learner()
    find(learn)
    assert {p.shape for p in learn.model.parameters()} <= {*moved}


def test_one_comparison_is_over_before_the_next(has, monkeypatch):
    "Otherwise a recorded pass in main memory and its gradients on the device stay during the next comparison."
    has('bf16')
    refs, real = [], number_check.Comparison.run_candidate
    def _run(self, c):
        assert not [r for r in refs if r() is not None]
        found = real(self, c)
        refs.append(weakref.ref(found[0]))
        return found
    monkeypatch.setattr(number_check.Comparison, 'run_candidate', _run)
    find()
    assert len(refs) == 3


def test_folded_weights_of_one_candidate_at_a_time(has, monkeypatch):
    "Otherwise, on GPUs, each candidate's peak memory includes five copies of the model."
    has('bf16')
    monkeypatch.setattr(predict_benchmark, 'SYNCHRONOUS', {})
    monkeypatch.setattr(predict_benchmark.selection, 'FAR_FACTOR', 1e9)  # all are folded too, however busy the machine
    real, held = predict_benchmark.step_ms, []
    def _ms(learn, batch):
        held.append(sum(c.folded and c.fold.works for c in benchmarks[0].candidates))
        return real(learn, batch)
    benchmarks, init = [], predict_benchmark.PredictBenchmark.__init__
    monkeypatch.setattr(predict_benchmark.PredictBenchmark, '__init__', lambda self, *args: (benchmarks.append(self), init(self, *args))[1])
    monkeypatch.setattr(predict_benchmark, 'step_ms', _ms)
    t = find(train=False)
    assert sum(r.folded for r in t.rows) > 1 and max(held) == 1


def test_nothing_of_a_search_is_alive_when_memory_goes_back(has, monkeypatch):
    has()
    refs, real = [], train_benchmark.TrainBenchmark.__init__
    def _init(self, *args):
        refs.append(weakref.ref(self))
        real(self, *args)
    monkeypatch.setattr(train_benchmark.TrainBenchmark, '__init__', _init)
    def _free(device):
        gc.collect()
        assert refs and refs[0]() is None
        refs.append(1)
    monkeypatch.setattr(sys.modules['channelslast.find.format_find'], 'free_memory', _free)
    find()
    assert len(refs) == 2


# on a GPU itself

GPU = torch.device('cuda', 0)


def on_gpu(model, n=64, bs=16, **kwargs): return learner(model, loaders((3, 32, 32), n=n, bs=bs).to(GPU), **kwargs)


@pytest.mark.cuda
def test_cuda_measures_everything():
    "Training with cuDNN's LSTM, and predictions: all candidates are valid and report their memory."
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.rnn, self.head = convnet()[:6], nn.LSTM(16, 8, 2, batch_first=True, dropout=0.5), nn.Linear(8, 4)
        def forward(self, x): return self.head(self.rnn(self.body(x).flatten(2).transpose(1, 2))[0][:, -1])
    for train in True, False:
        t = on_gpu(Rows()).format_find(show_plot=False, train=train)
        assert all(r.valid and r.memory > 0 for r in t.rows if r.ms) and len(t.rows) >= 4, t
    learn = on_gpu(Rows()).to_fastest()
    with learn.no_logging(): learn.fit(1)


@pytest.mark.cuda
def test_cuda_tf32_is_no_wrong_number():
    "In a deep network with TF32 enabled."
    from torchvision.models import resnet50
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(torch.backends.cudnn, 'allow_tf32', True)
        t = on_gpu(resnet50(num_classes=4)).format_find(show_plot=False, precisions='fp32')
    assert all(r.valid for r in t.rows), t


@pytest.mark.cuda
def test_cuda_batches_wait_there():
    "Before a first fit, when the model is still on the CPU, and with PyTorch's own loaders, which have no device."
    from torch.utils.data import DataLoader as Plain
    learn = on_gpu(convnet())
    batches, _ = train_benchmark.load_batches(learn, learn.dls.train)
    assert all(t.device == GPU for b in batches for t in b)
    dl = Plain([(torch.randn(3, 32, 32), torch.tensor(1)) for _ in range(16)], batch_size=8)
    assert find(learner(convnet(), DataLoaders(dl, dl)), num_it=2).rows[0].memory > 0


@pytest.mark.cuda
def test_cuda_skips_no_step():
    t = on_gpu(steep()).format_find(precisions='fp16', show_plot=False, growth_interval=1)
    assert all(r.valid for r in t.rows), t


@pytest.mark.cuda
def test_cuda_without_memory_halves_the_batches():
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
def test_cuda_fused_steps_wait_for_nothing():
    learn = on_gpu(convnet(), opt_func=fused(Adam))
    with learn.no_logging(): learn.fit(1)
    x, y = learn.dls.one_batch()
    learn.loss_func(learn.model(x), y).backward()
    torch.cuda.set_sync_debug_mode('error')
    try: learn.opt.step()
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.cuda
def test_cuda_backward_conversions_have_their_modules():
    "They belong to the same modules as on the CPU. (cuDNN's norms keep the format, a CPU's instance norm doesn't.)"
    class Flat(nn.Module):
        def forward(self, x): return x.flatten(2).softmax(-1).view(x.shape)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Flat(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    def _names(learn): return {(r.module, r.backward) for r in learn.to_channelslast(to_fp16=False).format_summary().lost}
    expected = _names(learner(net, loaders((3, 32, 32))))
    assert {b for _, b in expected} == {False, True} and _names(on_gpu(net)) == expected


@pytest.mark.cuda
def test_cuda_random_states_come_back():
    torch.rand(1, device=GPU)
    before = torch.cuda.get_rng_state(GPU)
    with less_random(): torch.rand(9, device=GPU)
    assert torch.equal(before, torch.cuda.get_rng_state(GPU))


@pytest.mark.cuda
def test_cuda_compiled_predictions():
    "The same numbers, memory of the frozen weights once, freed with the callback."
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
def test_cuda_compiled_training():
    "With the gradient scaler; the code that was measured trains the Learner."
    from torchvision.models import resnet18
    learn = on_gpu(resnet18(num_classes=4), cbs=CompileTraining()).to_channelslast()
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert learn.compile_training.compiled == 1 and not learn.compile_training.reason
    assert all(p.isfinite().all() for p in learn.model.parameters())
    t = on_gpu(resnet18(num_classes=4)).format_find(compile=True, show_plot=False)
    assert all(r.valid for r in t.rows), t
