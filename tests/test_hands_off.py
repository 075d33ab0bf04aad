"""At every moment, in every thread, for whoever copies, pickles or replicates a model, its modules are as they would be without
this library: only the strides of tensors differ, and layers of `fp32_layers` have hooks during a batch."""
import copy
import pickle
import sys
import warnings
import threading
from functools import partialmethod

import pytest
import torch
from fastai.vision.all import Callback, CancelBatchException, DataLoaders, Learner, SGD, load_learner
from torch import nn
from torch.utils.checkpoint import checkpoint

from channelslast import CompilePredictions, CompileTraining, FoldBatchNorm
from channelslast.core.compare import relative_error
from channelslast.core.compiling import own_code
from channelslast.core.rounding import Rounding
from channelslast.predict.fold_trace import ForwardTrace
from channelslast.summary.format_trace import FormatTrace
from .helpers import (block, convnet, difference, image_folder, in_threads, learner, loaders, model_state, names_library,
                      passes_in_new_process, preds_of, shake, truth_of, use_backend)

pytestmark = pytest.mark.filterwarnings('ignore:.*stays un', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
EVENTS = ('before_batch after_pred after_loss before_backward after_cancel_backward after_backward before_step after_cancel_step after_step '
          'after_cancel_batch after_batch').split()


@pytest.fixture(autouse=True)
def machine(request, monkeypatch, has):
    "A CPU that is fast in bf16, and whose kernels compute padded convolutions wrongly. Only OpenVINO really converts."
    has('bf16')
    params = getattr(request.node, 'callspec', None) and request.node.callspec.params
    converts = 'converted predictions' in str(params)
    request.getfixturevalue('compilations' if converts else 'uncompiled')
    if converts: use_backend(monkeypatch, 'openvino')
    monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: True)


def net(n=4):
    "Layers that oneDNN's kernels compute wrongly, pairs to fold, dropout, and a head, all of PyTorch's classes."
    return shake(nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), block(8, 8), nn.ConvTranspose2d(8, 8, 2, 2, padding=1), block(8, 8, groups=2), nn.Dropout(0.1),
                               nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n)))


def all_but_fp32_layers(learn): return learn.to_channelslast(amp_mode='bf16').add_cbs([FoldBatchNorm(), CompilePredictions(), CompileTraining()])


SETTINGS = { # what is done with a Learner, and with these layers
    'channels last': lambda learn, layers=(): learn.to_channelslast(to_fp16=False), 'bf16': lambda learn, layers=(): learn.to_channelslast(amp_mode='bf16'),
    'fp32_layers': lambda learn, layers=('0', '1', '7'): learn.to_channelslast(amp_mode='bf16', fp32_layers=layers),
    'folded': lambda learn, layers=(): learn.add_cb(FoldBatchNorm()), 'compiled predictions': lambda learn, layers=(): learn.add_cb(CompilePredictions()),
    'converted predictions': lambda learn, layers=(): learn.add_cb(CompilePredictions('openvino')),
    'compiled training': lambda learn, layers=(): learn.add_cb(CompileTraining()), 'all but fp32_layers': lambda learn, layers=(): all_but_fp32_layers(learn),
    'all': lambda learn, layers=('1',): all_but_fp32_layers(learn).to_channelslast(amp_mode='bf16', fp32_layers=layers)}
SLOW = 'bf16', 'all but fp32_layers', 'converted predictions'
settings = pytest.mark.parametrize('setting', [pytest.param(o, marks=pytest.mark.slow if o in SLOW else ()) for o in SETTINGS])


class AtEachEvent(Callback):
    "Calls `look(learn, event)` at each event of a batch."
    run_valid = True
    def __init__(self, look, order): self.look, self.order = look, order
    def _at(self, event): self.look(self.learn, event)


for e in EVENTS: setattr(AtEachEvent, e, partialmethod(AtEachEvent._at, e))


class CancelBatches(Callback):
    "Cancels one batch of each epoch before the model runs, another after it, and a third in the backward pass."
    order = 60
    def before_batch(self):
        if self.iter == 1: raise CancelBatchException
    def after_pred(self):
        if self.iter == 2: raise CancelBatchException
    def after_backward(self):
        if self.iter == 3: raise CancelBatchException


def run(learn, setting, look=lambda learn, event: None, orders=(-1000, 100), cancel=True):
    "Fit, validate and predict in this setting; at each event of a batch, callbacks of these orders look."
    SETTINGS[setting](learn)
    learn.add_cbs([AtEachEvent(look, o) for o in orders])
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.fit(2, 1e-2, cbs=CancelBatches() if cancel else None)
        learn.validate(); learn.get_preds()
    return learn


HOOKED = ('_forward_hooks', '_forward_pre_hooks', '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs', '_forward_hooks_always_called')


def modules_of(model, hooks=True) -> dict:
    "All that modules hold besides their tensors and modes, and the number of hooks on all modules."
    state = model_state(model)
    own = {n: (i, {k: v for k, v in d.items() if k != 'training' and (hooks or k not in HOOKED)}) for n, (i, d) in state['modules'].items()}
    return dict(own=own, names=state['names'], hooks=state['global_hooks'], classes=[type(m) for m in model.modules()],
                tensors=[(n, id(p), p.requires_grad, p.dtype, p.shape) for n, p in (*model.named_parameters(), *model.named_buffers())])


@settings
def test_at_each_event_the_model_is_as_without_the_library(setting):
    learn, seen, has_hooks = learner(net(), loaders(n=32)), [], setting in ('fp32_layers', 'all')
    model = learn.model
    before, before_with_hooks = modules_of(model, not has_hooks), modules_of(model)
    def _look(learn, event):
        assert learn.model is model and type(learn.model) is nn.Sequential
        assert difference(before, modules_of(model, not has_hooks)) == ''
        seen.append(event)
    run(learn, setting, _look)
    assert {*seen} == {*EVENTS} - {'after_cancel_backward', 'after_cancel_step'} and learn.model is model
    assert difference(before_with_hooks, modules_of(model)) == ''


def test_callbacks_that_run_last_meet_the_users_model():
    "Also those of a higher order than this library's."
    learn = learner(net(), loaders(n=32))
    model, seen = learn.model, set()
    run(learn, 'all but fp32_layers', lambda learn, event: seen.add(learn.model is model), [2_000_000, 1e12])
    assert seen == {True}


class MovesItself(nn.Linear):
    "A layer that notes where it is moved."
    def _apply(self, fn, recurse=True):
        vars(self).setdefault('moves', []).append(fn(torch.zeros(1)).device.type)
        return super()._apply(fn, recurse)


@pytest.mark.parametrize('cb', [None, FoldBatchNorm])
def test_a_prediction_moves_the_model_only_if_that_changes_something(cb, monkeypatch):
    moves, move = [], nn.Module._apply
    monkeypatch.setattr(nn.Module, '_apply', lambda self, fn, recurse=True: [moves.append(self), move(self, fn, recurse)][1])
    learn = learner(net(), cbs=cb and cb())
    preds_of(learn)
    assert bool([m for m in moves if m is learn.model]) == (cb is None)  # without callbacks for predictions, fastai's own way
    own = learner(nn.Sequential(net(), MovesItself(4, 4)), cbs=cb and cb())
    preds_of(own)
    assert own.model[1].moves == ['cpu']
    learn.model[0].to('meta')  # `Module.to` refuses to move it back
    with pytest.raises(NotImplementedError, match='meta tensor'): preds_of(learn)
    assert isinstance(learn.model, nn.Sequential)


class SetsItself(nn.Linear):
    "A layer that notes the modes that are set."
    def train(self, mode=True):
        vars(self).setdefault('modes', []).append(mode)
        return super().train(mode)


@pytest.mark.parametrize('cb', [None, FoldBatchNorm])
def test_a_prediction_sets_the_mode_only_if_that_changes_something(cb, monkeypatch):
    modes, train = [], nn.Module.train
    monkeypatch.setattr(nn.Module, 'train', lambda self, mode=True: [modes.append((self, mode)), train(self, mode)][1])
    learn = learner(net(), cbs=cb and cb())
    norm = learn.model[1][1]
    def _modes(): modes.clear(); preds_of(learn); return [mode for m, mode in modes if m is norm]
    assert _modes() == [False] and _modes() == ([False] if cb is None else [])
    norm.training = True  # only this one
    assert _modes() == [False] and not norm.training
    norm.train = lambda mode=True: [modes.append((norm, 'own')), train(norm, mode)][1]
    assert _modes() == ['own']
    own = learner(nn.Sequential(net(), SetsItself(4, 4)), cbs=cb and cb())
    for n in 1, 2: preds_of(own); assert own.model[1].modes == [False]*n


def new_weights(model, seed=1):
    "A state dict of other weights for the model."
    torch.manual_seed(seed)
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}


@settings
def test_a_copy_made_at_any_event_computes_with_its_own_weights(setting):
    copies, x = {}, torch.randn(4, 3, 8, 8)
    def _look(learn, event): copies.setdefault((event, learn.training), copy.deepcopy(learn.model))
    learn = run(learner(net(), loaders(n=32)), setting, _look, orders=[100])
    fresh, weights = net().eval(), new_weights(learn.model)
    fresh.load_state_dict(weights)
    for (event, training), model in copies.items():
        model.load_state_dict(weights)
        with torch.no_grad(): torch.testing.assert_close(model.eval()(x), fresh(x), msg=f'{event}, {training}')
        assert not any('forward' in vars(m) for m in model.modules())
    assert len(copies) == 14


@settings
def test_a_copy_made_at_any_event_trains_on_its_own(setting):
    "An exponential moving average, a second student: its gradients reach its own weights only."
    copies = []
    def _look(learn, event):
        if learn.training and len(copies) < 40: copies.append(copy.deepcopy(learn.model))
    learn = run(learner(net(), loaders(n=32)), setting, _look, orders=[100], cancel=False)
    learn.model.zero_grad()
    for model in copies:
        model.to(memory_format=torch.contiguous_format).zero_grad()  # its own kernels are not those of a batch
        model.train()(torch.randn(4, 3, 8, 8)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters()) and all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


def without_library(f):
    "Run `f` in a new process in which this library can't be imported. True if it raised nothing."
    def _run():
        for k in [o for o in sys.modules if o.split('.')[0] == 'channelslast']: sys.modules[k] = None
        f()
    return passes_in_new_process(_run)


OTHERS = [o for o in SETTINGS if o != 'converted predictions'] # which needs OpenVINO


@pytest.mark.parametrize('names', [['channels last', 'fp32_layers', 'all but fp32_layers'], pytest.param(OTHERS, marks=pytest.mark.slow),
                                   pytest.param(['converted predictions'], marks=pytest.mark.slow)], ids=['some settings', 'all settings', 'converted'])
def test_pickles_made_at_any_event_load_and_compute_without_the_library(names, tmp_path):
    x, pickles = torch.randn(4, 3, 8, 8), {}
    for setting in names:
        def _look(learn, event):
            if (key := (setting, event, learn.training)) in pickles: return
            data, fresh = pickle.dumps(learn.model), net().eval()
            assert not names_library(data), key
            fresh.load_state_dict(learn.model.state_dict())
            with torch.no_grad(), torch.autocast('cpu', enabled=False): pickles[key] = data, fresh(x)
        run(learner(net(), loaders(n=32)), setting, _look, orders=[100])
    @torch.no_grad()
    def _load():
        for key, (data, truth) in pickles.items():
            model = pickle.loads(data).eval()
            torch.testing.assert_close(model(x), truth, msg=str(key))
            with torch.autocast('cpu', torch.bfloat16): model(x)
    assert without_library(_load) and len(pickles) == 14*len(names)


def test_exports_made_in_a_fit_load_and_predict_without_the_library(tmp_path):
    "After an epoch: fastai's `export` clears what events of a batch need."
    paths, expected, dls = [tmp_path/'0.pkl', tmp_path/'1.pkl'], [], image_folder(tmp_path, 8)
    image = dls.valid_ds.items[0]
    for path, setting in zip(paths, ['fp32_layers', 'all but fp32_layers']):
        model_then = net(2)
        class ExportInFit(Callback): # pickled by value, since no process can import it
            def after_train(self):
                if self.epoch: return
                model_then.load_state_dict(self.model.state_dict())
                self.learn.export(path)
        learn = Learner(dls, net(2), nn.CrossEntropyLoss(), path=tmp_path, cbs=ExportInFit())
        SETTINGS[setting](learn)
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        expected.append(model_then)
        assert type(load_learner(path).model) is nn.Sequential
    x = dls.test_dl([image]).one_batch()[0]
    def _load():
        for path, model in zip(paths, expected):
            with torch.no_grad(): truth = model.eval()(x)[0]
            learn = load_learner(path)
            with learn.no_bar(): assert relative_error(learn.predict(image)[2], truth) < 3e-2
    assert without_library(_load)


# threads

THREADS = {'folded': ['folded']*3, 'channels last': ['channels last']*3, 'fp32_layers': ['fp32_layers']*3, 'compiled predictions': ['compiled predictions']*3,
           'converted predictions': ['converted predictions']*3,
           'mixed': ['folded', 'fp32_layers', 'compiled predictions']}


@pytest.mark.parametrize('names', [pytest.param(o, marks=pytest.mark.slow if o in ('channels last', 'converted predictions') else ()) for o in THREADS])
def test_three_Learners_predict_with_one_model_in_three_threads(names):
    "Weights, keys and modules stay, bit for bit, and predictions are right, also those of the first batch."
    model, dls = net().eval(), loaders(n=16)
    model.to(memory_format=torch.channels_last)  # `ChannelsLast` would do it in one of the threads
    learns = [SETTINGS[o](learner(model, dls)) for o in THREADS[names]]
    for o in learns: o.dls = DataLoaders(*[dl.new() for dl in dls.loaders], device=dls.device)  # iterated in one thread
    truth, before, found = truth_of(learns[0]), model_state(model), [[] for _ in learns]
    def _predict(learn, found):
        for _ in range(15): found.append(preds_of(learn))
    assert in_threads(*[lambda o=o, f=f: _predict(o, f) for o, f in zip(learns, found)]) == []
    assert difference(before, model_state(model)) == ''
    for name, outs in zip(THREADS[names], found):
        assert len(outs) == 15 and all(relative_error(o, truth) < (5e-2 if name == 'fp32_layers' else 1e-4) for o in outs), name
    assert not names_library(pickle.dumps(model))


def test_a_model_pickles_and_copies_while_other_threads_predict():
    model, copies, done = net().eval(), [], threading.Event()
    learns = [SETTINGS[o](learner(model.to(memory_format=torch.channels_last), loaders(n=16))) for o in ('folded', 'compiled predictions')]
    def _copy():
        while not done.is_set() and len(copies) < 200: copies.append((copy.deepcopy(model), pickle.loads(pickle.dumps(model))))
    def _predict():
        try:
            for _ in range(4):
                for o in learns: preds_of(o)
        finally: done.set()
    assert in_threads(_copy, _predict) == [] and copies
    before = {k: {*vars(m)} for k, m in model.named_modules()}
    for pair in copies:
        for o in pair:
            assert {k: {*vars(m)} for k, m in o.named_modules()} == before
            for a, b in zip(o.state_dict().values(), model.state_dict().values()): assert torch.equal(a, b)


def test_Learners_of_different_precisions_predict_with_one_model_in_threads_and_remove_their_hooks():
    "Hooks of `fp32_layers` come and go in each Learner's batches; each thread has an autocast state of its own."
    model = net().eval().to(memory_format=torch.channels_last)
    learns = [SETTINGS[o](learner(model, loaders(n=16))) for o in ('fp32_layers', 'bf16', 'channels last')]
    expected = [preds_of(o) for o in learns]
    found = [[] for _ in learns]
    errors = in_threads(*[lambda o=o, f=f: f.extend(preds_of(o) for _ in range(5)) for o, f in zip(learns, found)])
    assert errors == [] and not any(vars(m)[k] for m in model.modules() for k in HOOKED) and not torch.is_autocast_enabled('cpu')
    for truth, outs in zip(expected, found):
        for o in outs: assert relative_error(o, truth) < 5e-2


def compiles(compile=torch.compile) -> bool:
    "True if PyTorch compiles a new function now."
    graphs = []
    compile(own_code(lambda x: x + 1), backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(torch.ones(1))
    return bool(graphs)


class Overlap:
    "Two threads call `.first()` and `.second()` in blocks: the second one begins in the first, and ends after it, unless it has to wait."
    def __init__(self): self.inside, self.both, self.left = (threading.Event() for _ in range(3))
    def first(self): self.inside.set(); self.both.wait(0.3)
    def second(self): self.both.set(); self.left.wait(0.3)
    def run(self, first, second):
        def _second(): assert self.inside.wait(10); second()
        def _first():
            first()
            self.left.set()
        return in_threads(_first, _second)


MODES = {'folded': ForwardTrace, 'rounding': lambda model: Rounding(1e-6), 'summary': lambda model: FormatTrace(model, torch.ones(1), 'loss')}


@pytest.mark.parametrize('names', [('folded', 'folded'), ('rounding', 'folded'), ('folded', 'summary')], ids=', '.join)
def test_PyTorch_compiles_after_modes_that_overlap_in_two_threads(names):
    "It notes for the whole process that a mode is on."
    def _run():
        overlap = Overlap()
        def _first():
            with MODES[names[0]](net()): overlap.first()
        def _second():
            with MODES[names[1]](net()): overlap.second()
        assert compiles() and overlap.run(_first, _second) == [] and compiles()
    assert passes_in_new_process(_run)


def test_PyTorch_compiles_after_compiled_steps_that_overlap_in_two_threads(uncompiled):
    "It has one stance for the whole process."
    def _run():
        overlap, learns = Overlap(), [learner(convnet(), cbs=CompileTraining()) for _ in range(2)]
        for o in learns:
            with o.no_bar(), o.no_logging(): o.fit(1)  # compiles
        parts, own = [overlap.first, overlap.second], threading.local()
        def _output(out):
            if vars(own).get('part'): own.__dict__.pop('part')()
            return out
        uncompiled.output = _output
        def _fit(learn, part):
            own.part = part
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert compiles() and overlap.run(*[lambda o=o, p=p: _fit(o, p) for o, p in zip(learns, parts)]) == [] and compiles()
        assert all(o.compile_training.compiled == 1 and not o.compile_training.reason for o in learns)
    assert passes_in_new_process(_run)


# replicas and layers in fp32

def replica(module):
    "A shallow copy with the same hooks and other submodules, as `torch.nn.parallel.replicate` makes for each GPU."
    new = module.__new__(type(module))
    vars(new).update(vars(module))
    for k in '_parameters', '_buffers', '_modules': vars(new)[k] = dict(vars(module)[k])
    for k, m in vars(new)['_modules'].items(): vars(new)['_modules'][k] = replica(m)
    return new


def give_weights(model, weights):
    "Other tensors, not other values of the shared ones."
    for name, m in model.named_modules():
        for d in vars(m)['_parameters'], vars(m)['_buffers']:
            for k, t in d.items():
                if t is not None: d[k] = weights[f'{name}.{k}'.lstrip('.')]


def test_replicas_made_in_a_batch_compute_with_their_own_weights_and_keep_fp32_layers():
    "As `DataParallel` makes and runs them, each in a thread of its own."
    x, found, dtypes = torch.randn(4, 3, 8, 8), {}, []
    model = net()
    weights = [new_weights(model, i) for i in range(2)]
    real = nn.functional.linear
    def _run(learn, i, copied):
        give_weights(copied, weights[i])
        with torch.autocast('cpu', torch.bfloat16), torch.no_grad(): found[i] = copied.eval()(x)
    class Replicate(Callback):
        order = 100
        def after_pred(self):
            if self.iter or self.training: return
            copies = [replica(self.model) for _ in range(2)]
            assert in_threads(*[lambda i=i, c=c: _run(self.learn, i, c) for i, c in enumerate(copies)]) == []
    learn = SETTINGS['fp32_layers'](learner(model, loaders(n=16), cbs=Replicate()))
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(nn.functional, 'linear', lambda x, w, b: (dtypes.append((x.dtype, torch.is_autocast_enabled('cpu'))), real(x, w, b))[1])
        learn.validate()
    assert {*dtypes} == {(torch.float32, False)} and {*found} == {0, 1}
    for i, out in found.items():
        fresh = net().eval()
        fresh.load_state_dict(weights[i])
        with torch.no_grad(): assert relative_error(out.float(), fresh(x)) < 3e-2
        assert out.dtype == torch.bfloat16
    assert relative_error(found[0].float(), found[1].float()) > 0.1


def test_layers_in_fp32_run_in_fp32_in_the_second_pass_of_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self, on): super().__init__(); self.net, self.on = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)), on
        def forward(self, x): return (checkpoint(self.net, x, use_reentrant=False) if self.on else self.net(x)).mean((2, 3))
    got = []
    for on in False, True:
        torch.manual_seed(0)
        learn = learner(Checkpointed(on), loaders(n=8), opt_func=SGD).to_channelslast(amp_mode='bf16', fp32_layers='net.2')
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
        got.append([p.grad for p in learn.model.parameters()])
    assert all(map(torch.equal, *got))


def test_a_model_that_catches_an_error_of_a_layer_in_fp32_goes_on_in_half_precision():
    dtypes = []
    class Fails(nn.Linear):
        def forward(self, x): dtypes.append(x.dtype); raise ArithmeticError
    class Catches(nn.Module):
        def __init__(self): super().__init__(); self.fails, self.l = Fails(192, 4), nn.Linear(192, 4)
        def forward(self, x):
            try: return self.fails(x.flatten(1).bfloat16())
            except ArithmeticError: out = self.l(x.flatten(1))
            dtypes.append(out.dtype)
            return out
    learn = learner(Catches(), loaders(n=8)).to_channelslast(amp_mode='bf16', fp32_layers='fails')
    preds_of(learn)
    assert dtypes == [torch.float32, torch.bfloat16] and not torch.is_autocast_enabled('cpu')


# interrupts

def raises_now():
    "A function that raises from its k-th call after `.arm(k, error)`; `k` 0: never. No attribute of a model shows that it counts."
    k, calls, error = 0, 0, None
    def _now():
        nonlocal calls
        calls += 1
        if k and calls >= k: raise error('now')
    def _arm(new_k, new_error=KeyboardInterrupt):
        nonlocal k, calls, error
        k, calls, error = new_k, 0, new_error
    _now.arm = _arm
    return _now


class Raises(nn.Module):
    "Network whose middle may raise; all passes are counted, also those of copies."
    def __init__(self, now): super().__init__(); self.net, self.head, self.now = net(8), nn.Linear(8, 4), now
    def forward(self, x):
        x = self.net(x)
        self.now()
        return self.head(x)


INTERRUPTED = [pytest.param(o, marks=() if o in ('fp32_layers', 'folded', 'compiled predictions', 'compiled training') else pytest.mark.slow)
               for o in SETTINGS if o != 'converted predictions']


@pytest.mark.parametrize('error', [KeyboardInterrupt, pytest.param(ArithmeticError, marks=pytest.mark.slow)])
@pytest.mark.parametrize('where', ['forward', 'loss', 'callback'])
@pytest.mark.parametrize('setting', INTERRUPTED)
def test_an_interruption_leaves_the_model_as_it_was(setting, where, error):
    now, other = raises_now(), raises_now()
    learn = learner(Raises(now if where == 'forward' else other), loaders(n=16))
    loss = learn.loss_func
    learn.loss_func = lambda pred, y: (where == 'loss' and now(), loss(pred, y))[1]
    class Interrupt(Callback):
        order = 100
        def after_batch(self): where == 'callback' and now()
    learn.add_cb(Interrupt())
    SETTINGS[setting](learn, ['net.0', 'head'])
    model = learn.model
    with learn.no_bar(), learn.no_logging():
        preds_of(learn)  # converts the model
        before = modules_of(model)
        for k in range(1, 4):
            state = model_state(model)
            now.arm(k, error)
            with pytest.raises(error):
                for _ in range(4): learn.validate()
            now.arm(0)
            assert learn.model is model and difference({**state, 'modules': 0}, {**model_state(model), 'modules': 0}) == ''
            assert difference(before, modules_of(model)) == '' and not torch.is_autocast_enabled('cpu')
            now.arm(k, error)
            with pytest.raises(error): learn.fit(3)
            now.arm(0)
            assert difference(before, modules_of(model)) == '' and not torch.is_autocast_enabled('cpu') and learn.model is model
            assert relative_error(preds_of(learn), truth_of(learn)) < (5e-2 if hasattr(learn, 'mixed_precision') else 1e-4)


@pytest.mark.parametrize('k', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('setting', ['folded', 'compiled predictions'])
def test_an_interruption_while_a_copy_is_prepared_leaves_everything_and_the_next_prediction_prepares_again(setting, k):
    "The passes of the first batch: the model's own, and those of its copy."
    now = raises_now()
    learn = SETTINGS[setting](learner(Raises(now), loaders(n=8)))
    before = model_state(learn.model.eval())
    now.arm(k)
    try: preds_of(learn)
    except KeyboardInterrupt: pass
    else: assert k > 2  # fewer passes than that
    now.arm(0)
    assert difference(before, model_state(learn.model)) == ''
    for _ in range(2): assert relative_error(preds_of(learn), truth_of(learn)) < 1e-4
    assert learn.fold_batch_norm.folded == 2 if setting == 'folded' else learn.compile_predictions.compiled


@pytest.mark.parametrize('setting', ['compiled predictions', 'compiled training'])
def test_an_interruption_while_compiling_leaves_everything_and_the_next_batch_compiles_again(setting, uncompiled):
    learn = SETTINGS[setting](learner(convnet(), loaders(n=16)))
    learn.model[3].padding = 0, 0
    before, train = modules_of(learn.model), setting == 'compiled training'
    def _interrupt(out):
        uncompiled.output = lambda out: out
        raise KeyboardInterrupt
    uncompiled.output = _interrupt
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(2) if train else learn.validate()
        assert difference(before, modules_of(learn.model)) == '' and not torch.is_autocast_enabled('cpu')
        learn.fit(2) if train else learn.validate()
    assert (learn.compile_training if train else learn.compile_predictions).compiled


# the parts of PyTorch that have no public name

PRIVATE = {'torch._dynamo.eval_frame': 'compiled', 'torch._inductor.codecache': 'compiled', 'torch.utils._python_dispatch': 'folded',
           'torch.multiprocessing.reductions': 'folded', 'torch.nn.utils.fusion': 'folded', 'torch._functorch.config': '', 'torch.utils._pytree': '',
           'torch._higher_order_ops': ''}


def without_module(name, off):
    "Import the library again, in a process without this module, and use all of it that predicts."
    for k in [o for o in sys.modules if o.split('.')[0] == 'channelslast']: del sys.modules[k]
    sys.modules[name] = None
    import channelslast
    learn = learner(shake(convnet()), loaders(n=16), cbs=[channelslast.FoldBatchNorm(), channelslast.CompilePredictions()])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for _ in range(2): assert relative_error(preds_of(learn), truth_of(learn)) < 1e-4
    told = [str(o.message) for o in told]
    folded, compiled = bool(learn.fold_batch_norm.folded), bool(learn.compile_predictions.compiled)
    reasons = {k: any(k in o and 'stays un' in o for o in told) for k in ('FoldBatchNorm', 'CompilePredictions')}
    assert folded != reasons['FoldBatchNorm'] and compiled != reasons['CompilePredictions'], (folded, compiled, told)
    assert folded == (off != 'folded') and (off != 'compiled' or not compiled), (folded, compiled, told)
    learn.remove_cbs([channelslast.FoldBatchNorm, channelslast.CompilePredictions])
    with learn.no_bar(), learn.no_logging(): learn.to_channelslast(to_fp16=False).fit(1)


@pytest.mark.parametrize('name', PRIVATE)
def test_without_a_private_module_of_PyTorch_the_library_works_and_one_feature_is_off_with_its_reason(name, traced):
    import torch._inductor.codecache, torch._functorch.config # noqa
    assert passes_in_new_process(lambda: without_module(name, PRIVATE[name]))
