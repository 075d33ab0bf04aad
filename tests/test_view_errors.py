"`view size is not compatible`: the note says where the error was raised, and that channels last is the cause."
import inspect
import sys
import traceback
from functools import partial

import fastai.callback.channelslast as fastai_cl
import pytest
import torch
from fastai.vision.all import (AvgMetric, Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException,
                               CancelValidException, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, Flatten, Hook, ImageBlock, Learner,
                               Metric, MSELossFlat, Optimizer, OptimWrapper, PILImage, Transform, TransformBlock, delegates, get_image_files)
from torch import nn
from torch.nn.utils import parameters_to_vector, prune

from .helpers import find, image_folder, learner, loaders

pytestmark = pytest.mark.filterwarnings('ignore')
ERROR, CAUSE, REMEDIES = 'view size is not compatible', 'is in channels last', ('`reshape`', '`learn.to_contiguous()`')


class Views(nn.Module):
    def forward(self, x): return x.view(x.shape[0], -1)


def net(f): return nn.Sequential(nn.Conv2d(3, 4, 3), f, nn.Linear(144, 4))
def images(n_out=4):
    ds = [(torch.randn(3, 8, 8), torch.randn(n_out, 8, 8)) for _ in range(8)]
    return DataLoaders(*[DataLoader(ds, bs=4)]*2, device=torch.device('cpu'))


def to_images(**kwargs): return Learner(images(), nn.Conv2d(3, 4, 3, padding=1), kwargs.pop('loss_func', MSELossFlat()), **kwargs)


def note(e) -> str:
    "The place that the note names. Checks that there is one note and that it is complete."
    text = ''.join(traceback.format_exception(e))
    assert text.count(CAUSE) == 1 and all(o in text for o in REMEDIES), text
    return text.split('Raised in ')[1].split('. This Learner')[0]


def raised(learn, run='fit', *args, error=RuntimeError, **kwargs):
    if run == 'fit' and not args: args = [1]
    with pytest.raises(error) as e: getattr(learn, run)(*args, **kwargs)
    return e.value


def in_channels_last(learn): return learn.to_channelslast(to_fp16=False)
def by_fastai(learn): return learn.add_cb(fastai_cl.ChannelsLast())


# parts of the Learner that raise it

def flat(x): return x.view(-1)
def loss(p, y): return (flat(p) - y.reshape(-1)).pow(2).mean()
def metric(p, y): return p.view(-1).mean()


class Loss(nn.Module):
    def __init__(self): super().__init__(); self.inner = Views()
    def forward(self, p, y): return (self.inner(p) - y.reshape(len(y), -1)).pow(2).mean()


class Callable:
    def __call__(self, p, y): return loss(p, y)


class Total(Metric):
    def reset(self): self.p = None
    def accumulate(self, learn): self.p = learn.pred
    @property
    def value(self): return self.p.view(-1).sum()
    @property
    def name(self): return 'my_total'


class Blocks(nn.Module):
    def __init__(self): super().__init__(); self.stem, self.blocks = nn.Conv2d(3, 4, 3), nn.ModuleList([nn.Identity(), Views()])
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks: x = b(x)
        return x


class Helped(nn.Module):
    "Its forward calls a function inside a function."
    def forward(self, x):
        def _inner(x): return flat(x).reshape(x.shape[0], -1)
        return _inner(x)


class Whole(nn.Conv2d):
    def forward(self, x): return super().forward(x).view(x.shape[0], -1)


class AtEvent(Callback):
    def __init__(self, event, f): self.event, self.f = event, f
    def __getattr__(self, k): return partial(self.f, self) if k == self.__dict__.get('event') else super().__getattr__(k)


def flat_weights(cb): parameters_to_vector(cb.model.parameters())
def prune_one(cb): prune.l1_unstructured(cb.model[0], 'weight', 0.3)
def prune_at_random(cb): prune.random_unstructured(cb.model[0], 'weight', 0.3)
def prune_all(cb): prune.global_unstructured([(cb.model[0], 'weight'), (cb.model[3], 'weight')], prune.L1Unstructured, amount=0.3)


class Hooked(Callback):
    "Hooks a layer's output."
    def before_fit(self): self.h = Hook(self.model[0], self.look)
    def look(self, m, i, o): return o.view(-1)


class Muon(torch.optim.SGD):
    "Like optimizers that view convolution weights as matrices."
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g['params']: p.grad = p.grad.view(len(p), -1).view_as(p)
        return super().step(closure)


class Again(torch.optim.LBFGS):
    "fastai calls `step` without the closure that LBFGS needs."
    def step(self): return super().step(lambda: torch.tensor(1., requires_grad=True))


class FlatFromTheStart(torch.optim.SGD):
    def __init__(self, params, **kwargs):
        params = list(params)
        self.flat = [p.data.view(-1) for p in params]
        super().__init__(params, **kwargs)


class Bare:
    "An optimizer that derives from no known class."
    def __init__(self, opt): self.__dict__.update(vars(opt), opt=opt)
    def __getattr__(self, k): return getattr(self.__dict__['opt'], k)
    def step(self):
        for pg in self.param_lists:
            for p in pg: p.data.view(-1)


def my_step(p, lr, **kwargs): p.data.view(-1).add_(p.grad.data.view(-1), alpha=-lr)
def wrapped(opt): return partial(OptimWrapper, opt=opt)


PLACES = dict(
    module=(lambda: learner(net(Views())), "module '1' (Views)"),
    deep=(lambda: learner(nn.Sequential(Blocks(), nn.Linear(144, 4))), "module '0.blocks.1' (Views)"),
    functions=(lambda: learner(net(Helped())), "module '1' (Helped)"), with_fastai_callbacks=(lambda: learner(net(Flatten())), "module '1' (Flatten)"),
    model=(lambda: learner(Whole(3, 4, 3)), 'the model (Whole)'),
    in_parallel=(lambda: learner(nn.DataParallel(net(Views()))), "module '1' (Views)"),
    loss_function=(lambda: to_images(loss_func=loss), 'loss function loss'), partial=(lambda: to_images(loss_func=partial(loss)), 'loss function loss'),
    lambda_loss=(lambda: to_images(loss_func=lambda p, y: flat(p).mean()), 'loss function <lambda>'),
    loss_module=(lambda: to_images(loss_func=Loss()), 'loss function Views'), loss_object=(lambda: to_images(loss_func=Callable()), 'loss function Callable'),
    metric_function=(lambda: to_images(metrics=metric), 'metric metric'), partial_metric=(lambda: to_images(metrics=partial(metric)), 'metric metric'),
    lambda_metric=(lambda: to_images(metrics=lambda p, y: flat(p)), 'metric <lambda>'), avg=(lambda: to_images(metrics=AvgMetric(metric)), 'metric metric'),
    metric_class=(lambda: to_images(metrics=Total()), 'metric my_total'), nameless=(lambda: to_images(metrics=Callable()), 'metric AvgMetric'),
    optimizer=(lambda: learner(opt_func=wrapped(Muon)), 'optimizer Muon'), lbfgs=(lambda: learner(opt_func=wrapped(Again)), 'optimizer Again'),
    fastai_step=(lambda: learner(opt_func=partial(Optimizer, cbs=[my_step])), 'optimizer Optimizer'),
    bare=(lambda: learner(opt_func=lambda *args, **kwargs: Bare(partial(Optimizer, cbs=[])(*args, **kwargs))), 'optimizer Bare'),
    hook=(lambda: learner(cbs=Hooked()), 'callback Hooked'),
    vector=(lambda: learner(cbs=AtEvent('before_batch', flat_weights)), 'callback AtEvent'),
    **{f.__name__: (lambda f=f: learner(cbs=AtEvent('after_step', f)), 'callback AtEvent') for f in (prune_one, prune_at_random, prune_all)})


STARTS = dict(ours=in_channels_last, fastai=by_fastai, bf16=lambda learn: learn.to_channelslast(amp_mode='bf16'))


@pytest.mark.parametrize('name, start', [(n, s) if s == 'ours' or n in ('module', 'loss_function', 'metric_class', 'optimizer', 'vector') else
                                         pytest.param(n, s, marks=pytest.mark.slow) for n in PLACES for s in STARTS])
def test_the_note_names_the_part_of_the_learner_that_raised(has, name, start):
    "In contiguous memory the same Learner runs."
    has('bf16')
    (make, place), start = PLACES[name], STARTS[start]
    assert note(e := raised(start(make()))) == place and ERROR in str(e) and (CAUSE in str(e)) == (sys.version_info < (3, 11))
    make().fit(1)


EVENTS = ('before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step '
          'after_batch after_train before_validate after_validate after_epoch after_fit').split()


@pytest.mark.parametrize('event', EVENTS)
def test_the_note_names_a_callback_that_raised_in_an_event(event):
    "fastai changes the message of an error in a callback; the note stays."
    cb = AtEvent(event, flat_weights)
    cb.order = 100  # after the weights were converted
    assert note(e := raised(in_channels_last(learner(cbs=cb)))) == 'callback AtEvent'
    assert ERROR in str(e) and f'`{event}`' in str(e)


@pytest.mark.parametrize('stage, error', [('fit', CancelFitException), ('epoch', CancelEpochException), ('train', CancelTrainException),
                                          ('batch', CancelBatchException), ('validate', CancelValidException)])
def test_the_note_names_a_callback_that_raised_in_the_event_after_a_cancel(stage, error):
    def _cancel(cb): raise error
    at = 'before_validate' if stage == 'validate' else 'before_batch'
    assert note(raised(in_channels_last(learner(cbs=[AtEvent(at, _cancel), AtEvent(f'after_cancel_{stage}', flat_weights)])))) == 'callback AtEvent'


RUNS = ['fit', 'fit_one_cycle', 'fine_tune', 'lr_find', 'validate', 'get_preds', 'predict', 'tta', 'show_results']
FAST_EVENTS = {('fit', 'after_fit'), ('lr_find', 'after_fit'), ('get_preds', 'after_fit'), ('validate', 'before_epoch')}


@pytest.mark.parametrize('run, event', [(r, e) if e is None or (r, e) in FAST_EVENTS else pytest.param(r, e, marks=pytest.mark.slow)
                                        for r in RUNS for e in (None, 'before_epoch', 'after_fit')])
def test_the_note_is_on_errors_of_each_method_that_runs_the_model(run, event, tmp_path):
    "Errors in the model, and in events."
    dls, m = image_folder(tmp_path), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten() if event else Views(), nn.Linear(784, 2))
    learn = in_channels_last(Learner(dls, m, path=tmp_path, cbs=[cb := AtEvent(event, flat_weights)]))
    cb.order = 100
    args = [1] if run.startswith(('fit', 'fine')) else []
    if run == 'predict': args = [PILImage.create(dls.valid_ds.items[0])]
    assert note(raised(learn, run, *args)) == ('callback AtEvent' if event else "module '1' (Views)")


class Decodes:
    "A loss function that decodes predictions."
    reduction = 'mean'
    def __call__(self, p, y): return nn.functional.mse_loss(p, y, reduction=self.reduction)
    def activation(self, x): return x
    def decodes(self, x): return x.view(-1)


def test_the_note_names_a_loss_function_that_decodes_or_the_callback_that_gathers_losses():
    learn = in_channels_last(to_images(loss_func=Decodes()))
    assert note(raised(learn, 'get_preds', with_decoded=True)) == 'loss function Decodes'
    assert note(raised(learn, 'get_preds', with_loss=True)) == 'callback GatherPredsCallback'
    learn.to_contiguous().get_preds(with_decoded=True, with_loss=True)


class Target(Transform):
    def encodes(self, o): return torch.randn(3, 16, 16)
    def decodes(self, x): return x.view(-1)


@pytest.mark.parametrize('run', ['predict', 'show_results'])
def test_the_note_names_the_function_of_a_transform(run, tmp_path):
    "It is neither part of the Learner nor in a library's file."
    image_folder(tmp_path)
    dls = DataBlock((ImageBlock, TransformBlock(type_tfms=Target())), get_items=get_image_files).dataloaders(tmp_path, bs=4, device=torch.device('cpu'))
    learn = in_channels_last(Learner(dls, nn.Conv2d(3, 3, 3, padding=1), MSELossFlat(), path=tmp_path))
    args = [PILImage.create(dls.valid_ds.items[0])] if run == 'predict' else []
    assert note(raised(learn, run, *args)) == 'function Target.decodes'


def test_the_note_names_the_learner_if_no_Python_function_raised():
    @torch.jit.script
    def loss(p: torch.Tensor, y: torch.Tensor): return p.view(-1).mean()
    assert note(raised(in_channels_last(to_images(loss_func=loss)))) == 'the Learner'


def test_the_note_names_an_optimizer_that_raised_while_it_was_made():
    learn = in_channels_last(learner(opt_func=wrapped(FlatFromTheStart)))
    learn.fit(1)
    assert note(raised(learn, 'fit', 1, reset_opt=True)) == 'optimizer FlatFromTheStart'
    assert note(raised(learn, 'create_opt')) == 'optimizer FlatFromTheStart'


def test_the_note_names_the_innermost_part_once_if_a_callback_predicts():
    class Predicts(Callback):
        def after_epoch(self): self.learn.model[1] = Views(); self.learn.get_preds(inner=True)
    learn = in_channels_last(learner(net(nn.Flatten()), cbs=Predicts()))
    assert note(raised(learn)) == "module '1' (Views)"


@pytest.mark.parametrize('compile', [lambda m: torch.compile(m, backend='eager'), lambda m: m.compile(backend='eager') or m, torch.jit.script,
                                     lambda m: nn.Sequential(m[0], torch.jit.script(m[1]), m[2])], ids=['compile', 'in place', 'script', 'a part'])
def test_the_note_is_on_errors_of_compiled_and_scripted_models(compile):
    "The error has another text there, and PyTorch adds its own note on the place."
    learn = Learner(loaders(), compile(net(Views())), CrossEntropyLossFlat())
    place = note(raised(in_channels_last(learn), error=Exception))
    assert place.startswith(('the model (', "module '1' ("))


# the error itself is unchanged; other errors have no note

class CustomError(RuntimeError):
    def __init__(self, code, message): super().__init__(code, message); self.code = code


def raising(error):
    class Raises(nn.Module):
        def forward(self, x): raise error
    return net(Raises())


def test_the_error_itself_stays_the_same():
    error = CustomError(7, 'view size is not compatible with mine')
    e = raised(in_channels_last(learner(raising(error))))
    assert e is error and e.args[1:] == ('view size is not compatible with mine',) and e.code == 7 and note(e) == "module '1' (Raises)"


@pytest.mark.parametrize('error', [RuntimeError('out of memory'), ValueError(), KeyError('view'), RuntimeError('shape is invalid for input of size 3')])
def test_other_errors_have_no_note(error):
    e = raised(in_channels_last(learner(raising(error))), error=type(error))
    assert e is error and CAUSE not in ''.join(traceback.format_exception(e)) and vars(e).keys() <= {'__notes__'}


@pytest.mark.parametrize('run', ['fit', 'validate', 'get_preds'])
def test_errors_of_a_contiguous_learner_have_no_note(run):
    "Neither do those of a Learner that was in channels last before."
    class Turned(nn.Module):
        def forward(self, x): return x.transpose(1, 2).view(x.shape[0], -1)
    for learn in learner(net(Turned())), in_channels_last(learner(net(Turned()))).to_contiguous():
        assert CAUSE not in ''.join(traceback.format_exception(raised(learn, run)))


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_of_a_loader_have_no_note(workers):
    "A loader's tensors are contiguous: the Learner converts only batches."
    class Turned:
        def __len__(self): return 4
        def __getitem__(self, i): return torch.randn(3, 4, 5).transpose(1, 2).view(-1), torch.tensor(0)
    class Own:
        def __len__(self): return 1
        def __iter__(self): yield Turned()[0]
    for dl in DataLoader(Turned(), bs=2, num_workers=workers), torch.utils.data.DataLoader(Turned(), 2, num_workers=workers), Own():
        learn = in_channels_last(learner(dls=DataLoaders(dl, dl, device=torch.device('cpu'))))
        assert CAUSE not in ''.join(traceback.format_exception(raised(learn, error=Exception)))


# format_find, format_summary

def test_format_find_drops_the_candidates_with_the_error_and_shortens_its_note(has):
    has()
    learn = learner(net(Views()))
    t = find(learn, num_it=1)
    assert [r.valid for r in t.rows] == [r.memory_format == 'contiguous' for r in t.rows]
    assert all(len(r.note) < 130 and r.note.startswith('RuntimeError: ') for r in t.rows if not r.valid)
    assert t.best.memory_format == 'contiguous' and learn.validate()


def test_format_summary_raises_the_error_with_the_note():
    assert note(raised(in_channels_last(learner(net(Views()))), 'format_summary')) == "module '1' (Views)"


# the methods

@pytest.mark.parametrize('name', ['fit', 'validate', 'get_preds', 'predict', 'tta', 'show_results', 'one_batch', 'create_opt'])
def test_explained_methods_of_Learner_keep_their_names_and_signatures(name):
    f = getattr(Learner, name)
    assert f.__name__ == name and f.__qualname__.endswith(name) and len(inspect.signature(f).parameters) == len(inspect.signature(f.__wrapped__).parameters)
    @delegates(f)
    def g(**kwargs): pass
    assert 'kwargs' not in inspect.signature(g).parameters or name in ('predict', 'show_results')
