"Common uses of a fastai Learner give the same losses, predictions and choices in channels last, and in the fastest setting, as in contiguous."
import pytest
from fastai.vision.all import (Adam, CategoryBlock, ClassificationInterpretation, CutMix, DataBlock, EarlyStoppingCallback, GradientAccumulation,
                               GradientClip, ImageBlock, ImageDataLoaders, LabelSmoothingCrossEntropy, Lamb, Learner, MaskBlock, MixUp,
                               MixedPrecision, OptimWrapper, PILImage, PILMask, RAdam, RandomSplitter, Resize, SaveModelCallback, SGD, SimpleCNN,
                               accuracy, aug_transforms, load_learner, noop, np, partial, plt, ranger, resnet18, torch, unet_learner,
                               vision_learner, xresnet18)
from sklearn.datasets import load_digits

from channelslast import less_random

pytestmark = pytest.mark.filterwarnings('ignore')


DIGITS = load_digits()


def image(i): return PILImage.create((DIGITS.images[i]*255/16).astype(np.uint8)[..., None].repeat(3, -1))
def label(i): return int(DIGITS.target[i])
def mask(i): return PILMask.create((DIGITS.images[i] > 8).astype(np.uint8))


def classes(n=32, **kwargs):
    return DataBlock((ImageBlock, CategoryBlock(vocab=range(10))), get_items=lambda _: range(n), get_x=image, get_y=label,
                     splitter=RandomSplitter(seed=1), item_tfms=Resize(32), **kwargs).dataloaders(None, bs=8, device=torch.device('cpu'), num_workers=0)


def masks():
    return DataBlock((ImageBlock, MaskBlock(codes=['paper', 'ink'])), get_items=lambda _: range(8), get_x=image, get_y=mask,
                     splitter=RandomSplitter(seed=1), item_tfms=Resize(32)).dataloaders(None, bs=4, device=torch.device('cpu'), num_workers=0)


def small(**kwargs):
    dls, model = kwargs.pop('dls', None) or classes(), kwargs.pop('model', None) or SimpleCNN([3, 8, 16, 10])
    return Learner(dls, model, **dict(metrics=accuracy, lr=1e-3) | kwargs)


def losses(learn): return [o.item() for o in learn.recorder.losses] + [v for row in learn.recorder.values for v in row]
def fitted(learn, **kwargs):
    learn.fit(2, **kwargs)
    return losses(learn)


def fine_tune(switch, path):
    learn = switch(vision_learner(classes(20), resnet18, pretrained=False, metrics=accuracy))
    learn.freeze()
    learn.fine_tune(1, 1e-3)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-5, 1e-4))
    return losses(learn)


def unet(switch, path):
    learn = switch(unet_learner(masks(), resnet18, pretrained=False, n_out=2, lr=1e-4))
    out = fitted(learn)
    return out + [learn.get_preds()[0]]


def save_and_load(switch, path):
    learn = switch(small(path=path))
    learn.fit(3, cbs=SaveModelCallback(monitor='valid_loss'))
    learn.load('model')
    return [*losses(learn), *learn.validate()]


def resume(switch, path):
    "Continue from a checkpoint of the other format, including optimizer state."
    learn = small(path=path)
    learn.fit(1)
    learn.save('a')
    learn = switch(small(path=path))
    learn.load('a')
    first = fitted(learn)
    learn.save('b')
    back = small(path=path)
    back.load('b')
    return first + fitted(back)


def early(switch, path):
    learn = switch(small(lr=0.))
    learn.fit(5, cbs=EarlyStoppingCallback(patience=1))
    return [len(learn.recorder.values)]


def lr_find(switch, path):
    learn = switch(small(path=path))
    suggestion = learn.lr_find(num_it=20, show_plot=False)
    return [suggestion.valley, *losses(learn)[:15]]


def tta(switch, path):
    learn = switch(small(dls=classes(batch_tfms=aug_transforms())))
    learn.fit(1)
    return [learn.tta(n=2)[0]]


def interpretation(switch, path):
    learn = switch(small())
    learn.fit(1)
    interp = ClassificationInterpretation.from_learner(learn)
    return [torch.as_tensor(interp.confusion_matrix()), interp.top_losses(3)[0]]


def show(switch, path):
    plt.close('all')
    learn = switch(small())
    learn.fit(1)
    learn.show_results(max_n=4)
    figures = len(plt.get_fignums())
    plt.close('all')
    return [figures]


def predict(switch, path):
    learn = switch(small())
    learn.fit(1)
    return [learn.predict(image(3))[2], learn.get_preds(dl=learn.dls.test_dl([image(i) for i in range(5)]))[0]]


def folder(path):
    for i in range(24):
        (d := path/'images'/str(label(i))).mkdir(parents=True, exist_ok=True)
        image(i).save(d/f'{i}.png')
    return ImageDataLoaders.from_folder(path/'images', valid_pct=0.25, seed=1, bs=4, item_tfms=Resize(32), num_workers=0, device=torch.device('cpu'))


def export(switch, path):
    learn = switch(small(dls=folder(path), path=path))
    learn.fit(1)
    learn.export('e.pkl')
    loaded = load_learner(path/'e.pkl')
    return [loaded.predict(image(3))[2], learn.predict(image(3))[2]]


def precisions(before, after):
    def _habit(switch, path):
        learn = after(switch(before(small())))
        assert len(learn._grab_cbs(MixedPrecision)) <= 1
        return fitted(learn)
    return _habit


def compiled(when, backend):
    def _habit(switch, path):
        torch.compiler.reset()
        learn = small()
        if when == 'after': switch(learn)
        learn.model = torch.compile(learn.model, backend=backend)
        if when == 'before': switch(learn)
        return fitted(learn)
    return _habit


def training(**kwargs): return lambda switch, path: fitted(switch(small(**{k: v() if k in ('model', 'loss_func') else v for k, v in kwargs.items()})))
def wrapped(**kwargs): return training(opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, **kwargs)))


SLOW = dict(fine_tune=fine_tune, unet=unet, xresnet=training(model=lambda: xresnet18(n_out=10, sa=True)), compile_before=compiled('before', 'aot_eager'))
FAST = dict(
    mixup=training(cbs=MixUp), cutmix=training(cbs=CutMix), label_smoothing=training(loss_func=LabelSmoothingCrossEntropy),
    gradient_accumulation=training(cbs=partial(GradientAccumulation, 16)()), gradient_clip=training(cbs=GradientClip(0.1)),
    save_and_load=save_and_load, resume=resume, early_stopping=early, lr_find=lr_find, tta=tta, interpretation=interpretation,
    show_results=show, predict=predict, export=export,
    to_fp16_before=precisions(lambda o: o.to_fp16(), noop), to_fp16_after=precisions(noop, lambda o: o.to_fp16()),
    to_bf16_before=precisions(lambda o: o.to_bf16(), noop), to_bf16_after=precisions(noop, lambda o: o.to_bf16()),
    to_fp32_before=precisions(lambda o: o.to_fp32(), noop), to_fp32_after=precisions(noop, lambda o: o.to_fp32()),
    compile_after=compiled('after', 'eager'),
    Adam=training(opt_func=Adam), SGD=training(opt_func=partial(SGD, mom=0.9)), RAdam=training(opt_func=RAdam), Lamb=training(opt_func=Lamb),
    ranger=training(opt_func=ranger), AdamW=wrapped(foreach=False), AdamW_foreach=wrapped(foreach=True), AdamW_fused=wrapped(fused=True))
HABITS = FAST | SLOW


def run(habit, switch, path):
    with less_random():
        path.mkdir()
        return habit(switch, path)


NAMES = [*FAST, *(pytest.param(o, marks=pytest.mark.slow) for o in SLOW)]
PREDICTING = 'tta', 'interpretation', 'show_results', 'predict', 'export'


def assert_close(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        torch.testing.assert_close(torch.as_tensor(y, dtype=torch.float64), torch.as_tensor(x, dtype=torch.float64), rtol=2e-3, atol=2e-3)


@pytest.fixture
def in_fp32(has, monkeypatch):
    "Half precision has its own tests with their own tolerance."
    has()
    monkeypatch.setattr(plt, 'show', noop)


@pytest.mark.parametrize('name', NAMES)
def test_a_habit_gives_the_same_numbers_in_channels_last_as_in_contiguous(name, tmp_path, in_fp32):
    mixed = not name.startswith('to_')
    plain = run(HABITS[name], noop, tmp_path/'contiguous')
    assert_close(plain, run(HABITS[name], lambda learn: learn.to_channelslast(to_fp16=mixed), tmp_path/'last'))


@pytest.mark.parametrize('name, train', [
    *(pytest.param(o, True, id=o, marks=[pytest.mark.slow]*(o in SLOW)) for o in HABITS),
    *(pytest.param(o, False, id=f'{o}-predictions', marks=[pytest.mark.slow]*(o not in PREDICTING)) for o in HABITS)])
def test_a_habit_gives_the_same_numbers_after_to_fastest_as_in_contiguous(name, train, tmp_path, in_fp32):
    "Whichever setting is the fastest: nothing is pretended, so it may differ from run to run."
    measured = []
    def _switch(learn):
        measured.append(learn.to_fastest(train=train, num_it=1, layers=False).format_timings)
        return learn
    plain = run(HABITS[name], noop, tmp_path/'contiguous')
    assert_close(plain, run(HABITS[name], _switch, tmp_path/'fastest'))
    assert len(measured) == 1 and measured[0].train == train and {r.memory_format for r in measured[0].rows if r.valid} == {'contiguous', 'channels_last'}
