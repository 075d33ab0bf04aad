"What `format_find` measures and compares starts from the same state for each setting, and nothing of it stays."
import random
import signal
from functools import partial

import numpy as np
import pytest
import torch
from fastai.vision.all import (SGD, Callback, CancelBatchException, CancelFitException, CancelTrainException, CutMix, DataLoader, DataLoaders, Learner,
                               Recorder)
from fastcore.basics import noop
from torch import nn
from torch.utils.data import DataLoader as TorchLoader

from channelslast.core.devices import torch_version
from .helpers import convnet, difference, find, learner, learner_state, loaders, rows_of, shake


class Video(nn.Module):
    "Keeps a recurrent state from batch to batch."
    def __init__(self, rnn=nn.LSTM):
        super().__init__()
        self.conv, self.rnn, self.head, self.h = nn.Conv2d(3, 16, 3, 2, 1), rnn(16, 16, batch_first=True), nn.Linear(16, 4), None
    def forward(self, x):
        out, h = self.rnn(self.conv(x).flatten(2).transpose(1, 2), self.h)
        self.h = tuple(t.detach() for t in h) if isinstance(h, tuple) else h.detach()
        return self.head(out[:, -1])


class Product(nn.Module):
    "The same with a plain product."
    def __init__(self): super().__init__(); self.conv, self.w, self.head, self.h = nn.Conv2d(3, 16, 3), nn.Parameter(torch.eye(16)), nn.Linear(16, 4), None
    def forward(self, x):
        h = self.conv(x).mean((2, 3))
        if self.h is not None: h = h + self.h.mm(self.w)
        self.h = h.detach()
        return self.head(h)


STATEFUL = dict(lstm=Video, gru=lambda: Video(nn.GRU), rnn=lambda: Video(nn.RNN), product=Product)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', STATEFUL)
def test_a_state_that_is_kept_between_batches_neither_fails_nor_counts_as_a_difference(has, name, train):
    "bf16's state met fp32's weights, and fp32 in channels last began where contiguous fp32 had ended."
    has('bf16')
    learn = learner(STATEFUL[name]())
    before = learner_state(learn)
    t = find(learn, train=train, num_it=2)
    assert len(t.rows) >= 4 and all(r.valid for r in t.rows), t
    assert rows_of(t)['channels last, fp32'].__dict__['grad_diff' if train else 'pred_diff'] < 1e-5
    assert difference(before, learner_state(learn)) == '' and learn.model.h is None


class Counts(nn.Module):
    "Counts its passes in an attribute, a list, a buffer and an attribute's tensor."
    def __init__(self):
        super().__init__()
        self.net, self.n, self.seen, self.t = shake(convnet()), 0, [], torch.zeros(1)
        self.register_buffer('b', torch.zeros(1))
    def forward(self, x):
        starts.append((len(x), self.n, len(self.seen), self.t.item(), self.b.item()))
        self.n += 1; self.seen.append(1); self.t += 1; self.b += 1
        return self.net(x)


starts = []


@pytest.mark.parametrize('train', [True, False])
def test_each_compared_pass_starts_from_the_state_before_the_first_step(train):
    "They have 4 of the 16 items; timed steps go on where the same setting's last one ended."
    learn = learner(Counts(), loaders(n=32, bs=16))
    starts.clear()
    find(learn, train=train, num_it=4, optimizer=False)
    compared, timed = [o[1:] for o in starts if o[0] == 4], [o for o in starts if o[0] == 16]
    assert len(compared) >= 3 and {*compared} == {(0, 0, 0., 0.)}
    assert [o[1] for o in timed][:2] == [0, 0] and max(o[1] for o in timed) == max(o[2] for o in timed) >= 3


class Keeps(Callback):
    "Keeps the last batch, as callbacks with a memory do, and mixes it into the next one."
    last = None
    def before_batch(self):
        kept.append(self.last is not None and self.last.is_contiguous(memory_format=torch.channels_last))
        now = self.x.detach().clone(memory_format=torch.preserve_format)
        if self.last is not None: self.learn.xb = (self.x + 0*self.last[:len(self.x)],)
        self.last = now


kept = []


def test_what_a_callback_holds_is_the_settings_own():
    "The order of the settings alternates, but none gets what another one has left."
    kept.clear()
    seen = []
    class Look(nn.Module):
        def forward(self, x): seen.append((x.is_contiguous(memory_format=torch.channels_last), kept[-1], len(x))); return x
    find(learner(nn.Sequential(Look(), convnet()), cbs=Keeps()), num_it=6, optimizer=False)
    assert not any(had and not last for last, had, _ in seen)


# batches that a step writes into, and numbers that callbacks read

class InPlace(nn.Module):
    "Normalizes its input in place."
    def __init__(self): super().__init__(); self.net = shake(convnet())
    def forward(self, x): return self.net(x.sub_(0.45).div_(0.225))


@pytest.mark.parametrize('model, cbs, train', [(convnet, CutMix, True), (InPlace, None, True), (InPlace, None, False)])
def test_each_pass_takes_the_batch_as_it_was_loaded(has, fake_steps, model, cbs, train):
    "`CutMix` writes into it, and so do models that normalize in place. A contiguous batch is not copied by a conversion."
    has('bf16'); fake_steps({})
    batch = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    loaded = [t.clone() for t in batch]
    t = find(learner(shake(model()), DataLoaders(*[[batch]*2]*2, device=torch.device('cpu')), cbs=cbs and cbs()), train=train, num_it=2)
    assert len(t.rows) >= 4 and all(r.valid for r in t.rows), t
    assert all(map(torch.equal, batch, loaded))


class Progressive(Callback):
    "Smaller images in every other batch, and a strength that grows."
    def before_batch(self):
        if self.training: self.learn.xb = (self.xb[0][..., :8 - 2*(self.train_iter % 2)]*(1 + 20*self.pct_train),)


class ReadsLoader(Callback):
    def before_batch(self): self.learn.xb = (self.xb[0]*len(self.dl),)


@pytest.mark.parametrize('cb', [Progressive, ReadsLoader])
@pytest.mark.parametrize('fitted', [False, True])
def test_callbacks_read_the_same_counters_and_loader_in_each_pass(has, fake_steps, cb, fitted):
    has('bf16'); fake_steps({})
    learn = learner(shake(convnet()), cbs=cb())
    if fitted: learn.fit(1)
    before = learner_state(learn)
    t = find(learn, num_it=2)
    assert len(t.rows) >= 4 and all(r.valid for r in t.rows), t
    assert difference(before, learner_state(learn)) == ''


@pytest.mark.parametrize('error', [CancelBatchException, CancelFitException, CancelTrainException])
@pytest.mark.parametrize('fitted', [False, True])
def test_a_callback_that_cancels_measured_batches_is_one_clear_error(error, fitted):
    class Cancels(Callback):
        on = False
        def before_batch(self):
            self.learn.xb = self.xb
            if self.on: raise error
    learn = learner(cbs=Cancels())
    if fitted: learn.fit(1)
    learn.cancels.on = True
    with pytest.raises(ValueError, match=f'A callback raises `{error.__name__}` in a measured batch'): find(learn, num_it=1)


# what a model and a loader hold

def losses_after(measure, make):
    "The losses of a fit of a new Learner, after `measure(learn)`."
    torch.manual_seed(0)
    learn = make()
    measure(learn)
    torch.manual_seed(1)
    learn.fit(1)
    return learn.recorder.losses


class Resizes(nn.Module):
    "A buffer gets its size in the first pass, as in quantization-aware training."
    def __init__(self): super().__init__(); self.net = shake(convnet()); self.register_buffer('mean', torch.empty(0))
    def forward(self, x):
        y = self.net(x)
        if not self.mean.numel(): self.mean.resize_(4).zero_()
        self.mean += y.detach().mean(0)
        return y


class Draws(nn.Module):
    "Drops inputs with random generators of its own."
    def __init__(self):
        super().__init__()
        self.net, self.own, self.numpy = shake(convnet()), torch.Generator().manual_seed(0), np.random.default_rng(0)
    def forward(self, x): return self.net(x*(torch.rand(x.shape, generator=self.own) > 0.3)*(1 + self.numpy.random()))


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('model', [Resizes, Draws])
def test_buffers_of_changing_size_and_a_models_own_generators_start_anew(has, fake_steps, model, train):
    has('bf16'); fake_steps({})
    def _measure(learn):
        t = find(learn, train=train, num_it=2)
        assert len(t.rows) >= 4 and all(r.valid for r in t.rows), t
    assert losses_after(noop, lambda: learner(model())) == losses_after(_measure, lambda: learner(model()))


class EpochSampler:
    "Shuffles by the number of the epoch, which it counts."
    def __init__(self): self.epoch = 0
    def __len__(self): return 32
    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(32, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class OwnBatches:
    def __init__(self): self.rng = np.random.RandomState(0)
    def __len__(self): return 4
    def __iter__(self): return iter(self.rng.permutation(32).reshape(4, 8).tolist())


class Order:
    def __init__(self): self.order = [*range(32)]


class Jitters:
    "A dataset with a random generator, a counter, and an object whose list it reverses."
    def __init__(self, items): self.items, self.rng, self.n, self.inner = items, np.random.default_rng(0), 0, Order()
    def __len__(self): return 32
    def __getitem__(self, i):
        self.n += 1
        self.inner.order.reverse()
        x, y = self.items[i]
        return x*self.rng.random() + self.n + self.inner.order[0], y


LOADERS = dict(sampler=lambda ds: dict(dataset=ds, batch_size=8, sampler=EpochSampler()), batches=lambda ds: dict(dataset=ds, batch_sampler=OwnBatches()),
               dataset=lambda ds: dict(dataset=Jitters(ds), batch_size=8))


@pytest.mark.parametrize('kwargs', LOADERS.values(), ids=LOADERS)
def test_samplers_and_datasets_continue_as_if_nothing_was_measured(kwargs):
    def _make():
        ds = [(torch.randn(3, 8, 8), torch.tensor(i % 4)) for i in range(32)]
        return learner(dls=DataLoaders(*[TorchLoader(**kwargs(ds)) for _ in range(2)], device=torch.device('cpu')))
    assert losses_after(noop, _make) == losses_after(partial(find, num_it=1), _make)


class Reads:
    "Counts the lines that it reads. The count can't be restored without the position in the file."
    def __init__(self, path): self.file, self.n = open(path), 0
    def next(self): self.n += 1; return float(self.file.readline())


class FromFile:
    def __init__(self, path): self.reader, self.rng = Reads(path), random.SystemRandom()
    def __len__(self): return 32
    def __getitem__(self, i): return torch.full((3, 8, 8), self.reader.next()), torch.tensor(i % 4)


def test_a_file_behind_a_loader_and_what_counts_in_it_stay_together(tmp_path):
    (tmp_path/'numbers.txt').write_text(''.join(f'{i}\n' for i in range(10_000)))
    ds = FromFile(tmp_path/'numbers.txt')
    find(learner(dls=DataLoaders(*[TorchLoader(ds, 8)]*2, device=torch.device('cpu'))), num_it=1)
    assert ds.reader.n > 0 and ds.reader.next() == ds.reader.n - 1


class Silent(nn.Module):
    "Gives no output: the loss takes it from an attribute."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x): self.out = self.net(x)


def test_a_model_that_returns_nothing_is_measured():
    model = Silent()
    t = find(Learner(loaders(), model, lambda pred, y: nn.functional.cross_entropy(model.out, y)), num_it=1)
    assert len(t.rows) >= 2 and all(r.valid for r in t.rows), t


class Interrupts(random.Random):
    "Ctrl-C arrives while its state is restored."
    def setstate(self, state):
        signal.raise_signal(signal.SIGINT)
        super().setstate(state)


@pytest.fixture
def interrupts():
    "Ctrl-C raises `KeyboardInterrupt`, also in a process that a shell runs in the background, where it is ignored."
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, own)


def test_an_interruption_of_the_restoration_waits_for_its_end(interrupts):
    class Random(nn.Module):
        def __init__(self): super().__init__(); self.net, self.rng = convnet(), Interrupts(0)
        def forward(self, x): return self.net(x*self.rng.random())
    learn = learner(Random())
    before, state = learner_state(learn), learn.model.rng.getstate()
    with pytest.raises(KeyboardInterrupt): learn.format_summary()
    assert learn.model.rng.getstate() == state and difference(before, learner_state(learn)) == ''
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# a loss in half precision, and what reads it

def judged():
    judge = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)).requires_grad_(False)
    def loss(p, t): return judge(torch.cat([p, t], 1)).square().mean()
    return loss


def images(n=8): return DataLoaders(*[DataLoader([(torch.randn(3, 16, 16), torch.randn(3, 16, 16)) for _ in range(2*n)], bs=n)]*2)


@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_a_loss_that_runs_a_network_is_fp32_after_it_so_that_the_recorder_takes_it(has, mode):
    has(mode)
    learn = Learner(images(), nn.Conv2d(3, 3, 3, padding=1), judged()).to_channelslast(amp_mode=mode)
    seen = []
    class Look(Callback):
        def after_loss(self): seen.append((self.loss.dtype, self.loss_grad.dtype))
        order = 50
    with learn.no_logging(): learn.fit(1, cbs=Look())
    assert {*seen} == {(torch.float32,)*2} and len(learn.recorder.losses)


def test_a_setting_whose_fit_would_fail_is_out_with_a_note(has, fake_steps):
    "A recorder that takes no loss but that of contiguous fp32."
    has('bf16'); fake_steps({'contiguous, bf16': 10.})
    class Picky(Recorder):
        def after_batch(self):
            if modes[-1]: raise TypeError('not this one')
            super().after_batch()
    modes = []
    class Mode(nn.Module):
        def forward(self, x): modes.append(torch.is_autocast_enabled('cpu')); return x
    learn = learner(nn.Sequential(Mode(), convnet()))
    learn.remove_cb(learn.recorder)
    learn.add_cb(Picky())
    before = learner_state(learn)
    learn.recorder = learn.picky
    t = find(learn, num_it=2, formats='contiguous')
    r = rows_of(t)['contiguous, bf16']
    assert not r.valid and r.note == 'Picky fails: TypeError: not this one' and t.best is t.rows[0]
    del learn.recorder
    assert difference(before, learner_state(learn)) == ''


class Critic(nn.Module):
    "The loss is a difference of nearly equal means."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 3))
    def forward(self, x): return self.net(x).mean() - self.net(x.flip(0) + 1e-6*x).mean()


@pytest.mark.parametrize('seed', range(5))
def test_a_loss_near_zero_is_judged_by_what_rounding_explains(has, seed):
    has('bf16')
    torch.manual_seed(seed)
    for r in find(Learner(loaders((3, 16, 16)), Critic(), lambda p, y: p, opt_func=SGD), num_it=1).rows: assert r.valid, r


def test_a_wrong_loss_is_still_found(has):
    has('bf16')
    class Wrong(Critic):
        def forward(self, x):
            out = super().forward(x)
            return out + (1e-2 if self.net[0].weight.stride(1) == 1 else 0)
    rows = rows_of(find(Learner(loaders((3, 16, 16)), Wrong(), lambda p, y: p, opt_func=SGD), num_it=1))
    assert [r.valid for k, r in rows.items() if 'last' in k] == [False]*2 and 'numbers differ' in rows['channels last, fp32'].note


# what the comparison costs

def test_numbers_are_compared_on_four_items_with_few_passes(has):
    has('bf16')
    sizes = []
    class Look(nn.Module):
        def forward(self, x): sizes.append((len(x), torch.is_grad_enabled())); return x
    t = find(learner(nn.Sequential(Look(), shake(convnet())), loaders(n=128, bs=64)), num_it=1, optimizer=False)
    compared = [n for n, _ in sizes if n != 64]
    assert {*compared} == {4} and len(t.rows) == 4 and len(compared) <= 1 + 3*3  # baseline; a pass, a replay, rounding


def test_weights_and_optimizer_state_are_searched_for_infinity_once_per_setting(monkeypatch):
    calls, real = [], torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, 'isfinite', lambda t: (calls.append(t.dim()), real(t))[1])
    def _count(n):
        calls.clear()
        find(learner(shake(convnet())), num_it=n)
        return len(calls)
    assert _count(12) == _count(4) > 0


def test_a_model_with_a_higher_order_operator_is_measured_without_the_comparison(has):
    class Flex(nn.Module):
        "Can't run under a dispatch mode, as `flex_attention`."
        def __init__(self): super().__init__(); self.net = convnet()
        def forward(self, x):
            if torch.utils._python_dispatch._len_torch_dispatch_stack(): raise NotImplementedError('no rule registered for HOP flex_attention and mode')
            return self.net(x)
    has('bf16')
    for train in True, False:
        t = find(learner(Flex()), num_it=1, train=train)
        assert all(r.valid for r in t.rows) and any('dispatch mode' in o for o in t.notes), t


@pytest.mark.skipif(torch_version() < (2, 9), reason='PyTorch 2.8 traces flex_attention with an error')
def test_flex_attention_itself_is_measured():
    flex = pytest.importorskip('torch.nn.attention.flex_attention').flex_attention
    class Attend(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)
        def forward(self, x):
            q = self.conv(x).flatten(2).transpose(1, 2)[:, None]
            return self.head(flex(q, q, q).mean((1, 2)))
    t = find(learner(Attend()), train=False, num_it=1)
    assert all(r.valid for r in t.rows), t


def test_a_users_own_compiled_callback_is_said_to_stay(fake_steps, uncompiled, capsys):
    from channelslast import CompilePredictions, CompileTraining
    fake_steps({'channels last, fp32': 50.})
    for train, kind in (True, CompileTraining), (False, CompilePredictions):
        learn = learner(shake(convnet()), cbs=kind()).to_fastest(train=train, num_it=2, layers=False)
        assert f'Measured uncompiled: `{kind.__name__}` stays. Pass `compile=True` to measure it, too.' in capsys.readouterr().out
        assert len(learn._grab_cbs(kind)) == 1


def test_loader_ms_of_fastais_loader_with_many_workers():
    "fastai's `num_workers` is 1 in the main process."
    import time
    class Slow:
        def __len__(self): return 400
        def __getitem__(self, i): time.sleep(0.02); return torch.zeros(3, 4, 4), torch.tensor(0)
    dl = DataLoader(Slow(), bs=8, num_workers=12)
    learn = learner(dls=DataLoaders(dl, dl))
    assert find(learn, num_it=1, formats='contiguous').loader_ms > 0.9*8*20/12


@pytest.mark.parametrize('train', [True, False])
def test_a_model_that_the_user_compiled_is_compiled_for_the_steps_but_not_for_the_comparison(train):
    "Another compilation for four items would take as long, and use up one of few that PyTorch allows."
    sizes = []
    def _backend(graph, inputs):
        sizes.extend(len(t) for t in inputs if isinstance(t, torch.Tensor) and t.shape[1:] == (3, 8, 8))
        return graph.forward
    learn = learner(torch.compile(shake(convnet()), backend=_backend, dynamic=False))
    assert all(r.valid for r in find(learn, train=train, num_it=2).rows) and {*sizes} == {8}
