"Mixed precision with some layers in fp32 (`fp32_layers`), and the search for a candidate with such layers."
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from fastai.vision.all import Callback, Learner, MixedPrecision, load_learner
from torch import nn

from .helpers import convnet, difference, find, image_folder, learner, learner_state, loaders, model_state, names_library, rows_of

FULL, HALF = torch.float32, torch.bfloat16


def depthwise(m): return isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1


class Probe(nn.Module):
    "Records the dtypes of a layer's input and output."
    def __init__(self, inner): super().__init__(); self.inner, self.seen = inner, []
    def forward(self, x):
        out = self.inner(x)
        self.seen.append((x.dtype, out.dtype))
        return out


class Two(nn.Module):
    "Positional and keyword inputs, outputs in nested containers, integers."
    def __init__(self): super().__init__(); self.c, self.types = nn.Conv2d(8, 8, 1), []
    def forward(self, x, *, scale, n=3):
        y = self.c(x)
        self.types.append((x.dtype, scale.dtype, y.dtype, torch.is_autocast_enabled('cpu')))
        return dict(a=y*scale, b=(y, n)), torch.ones(1, dtype=torch.int64)


class Uses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.two, self.head, self.out = nn.Conv2d(3, 8, 3), Two(), nn.Linear(8, 4), []
    def forward(self, x):
        x = self.first(x)
        d, i = self.two(x, scale=x.mean())
        self.out.append((d['a'].dtype, d['b'][0].dtype, d['b'][1], i.dtype, d['a'].is_contiguous(memory_format=torch.channels_last)))
        return self.head(d['a'].mean((2, 3)))


def test_fp32_layers_cast_nested_inputs_to_fp32_and_outputs_back(has):
    has('bf16')
    m = Uses()
    learner(m).to_channelslast(amp_mode='bf16', fp32_layers='two').fit(1)
    assert {*m.two.types} == {(FULL, FULL, FULL, False)} and {*m.out} == {(HALF, HALF, 3, torch.int64, True)}


@pytest.mark.parametrize('asked, names', [('1', ['1']), (['1', '4'], ['1', '4']), (depthwise, ['3']), ([depthwise, '0'], ['0', '3']),
                                          (['2.inner'], ['2.inner'])])
def test_fp32_layers_alone_run_in_fp32_in_training_and_predictions(has, asked, names):
    has('bf16')
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), Probe(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learn = learner(m).to_channelslast(amp_mode='bf16', fp32_layers=asked)
    assert list(learn.mixed_precision.fp32_layers) == names
    computed, real = {}, nn.functional.conv2d
    def spy(x, w, *args):
        computed.setdefault(ids[id(w)], set()).add(torch.is_autocast_enabled('cpu'))
        return real(x, w, *args)
    ids = {id(c.weight): n for n, c in m.named_modules() if isinstance(c, nn.Conv2d)}
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(nn.functional, 'conv2d', spy)
        learn.fit(1); learn.validate(); learn.get_preds()
    assert computed == {n: {n not in names} for n in ids.values()}


class Shared(nn.Module):
    "A module that is used twice and has two names, with a module inside."
    def __init__(self):
        super().__init__()
        self.a = Probe(nn.Conv2d(3, 3, 1))
        self.again, self.l, self.types = self.a, nn.Linear(3, 4), []
    def forward(self, x):
        y = self.again(self.a(x))
        self.types.append(y.dtype)
        return self.l(y.mean((2, 3)))


@pytest.mark.parametrize('names', [['a'], ['a', 'a.inner']])
def test_shared_and_nested_modules_run_in_fp32(has, names):
    has('bf16')
    m = Shared()
    learner(m).to_channelslast(amp_mode='bf16', fp32_layers=names).fit(1)
    assert {*m.a.seen} == {(FULL, FULL)} and {*m.types} == {HALF}


def test_the_second_name_of_a_shared_module_is_unknown():
    with pytest.raises(ValueError, match="no module 'again'; did you mean"): learner(Shared()).to_channelslast(amp_mode='bf16', fp32_layers='again')


def test_fp32_layers_may_be_classes_and_modules():
    m = convnet()
    def _names(asked): return list(learner(m).to_channelslast(amp_mode='bf16', fp32_layers=asked).mixed_precision.fp32_layers)
    assert _names(nn.Conv2d) == ['0', '3', '5'] and _names((nn.Linear, nn.BatchNorm2d)) == ['1', '8'] and _names(m[3]) == ['3'] == _names([m[3]])


def test_fp32_layers_without_an_effect_warn():
    with pytest.warns(UserWarning, match='matched no module'): learner().to_channelslast(amp_mode='bf16', fp32_layers=lambda m: False)
    with pytest.warns(UserWarning, match='ignores fp32_layers: `to_fp16=False` adds'): learner().to_channelslast(to_fp16=False, fp32_layers='0')


def test_fp32_layers_replace_the_mixed_precision_and_stay_without_the_argument():
    learn = learner().to_channelslast(amp_mode='fp16').to_channelslast(amp_mode='bf16', fp32_layers='0')
    assert learn.mixed_precision.fp32_layers == ('0',) and learn.to_channelslast().mixed_precision.fp32_layers == ('0',)


# nothing is left behind

@pytest.mark.parametrize('where', ['inside', 'after', 'interrupt', 'loss'])
def test_an_error_in_a_fit_with_fp32_layers_leaves_the_modules_as_they_were(has, where):
    has('bf16')
    class Boom(nn.Module):
        def forward(self, x):
            if where != 'loss': raise KeyboardInterrupt if where == 'interrupt' else RuntimeError('boom')
            return x
    m = nn.Sequential(nn.Conv2d(3, 8, 3), Boom(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learn = learner(m).to_channelslast(amp_mode='bf16', fp32_layers=['0', '1'] if where == 'inside' else '0')
    if where == 'loss': learn.loss_func = lambda p, y: 1/0
    before = model_state(m)['modules']
    with pytest.raises((RuntimeError, KeyboardInterrupt, ZeroDivisionError)): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu') and difference(before, model_state(m)['modules']) == ''


def test_a_forward_that_the_user_set_on_an_fp32_layer_stays(has):
    has('bf16')
    m = convnet()
    own, calls = m[0].forward, []
    def custom(x):
        calls.append(torch.is_autocast_enabled('cpu'))
        return own(x)
    m[0].forward = custom
    learner(m).to_channelslast(amp_mode='bf16', fp32_layers='0').fit(1)
    assert m[0].forward is custom and {*calls} == {False}


def test_fp32_layers_outside_the_learner_in_copies_and_after_loading(has, tmp_path):
    has('bf16')
    learn = learner(path=tmp_path).to_channelslast(amp_mode='bf16', fp32_layers='0')
    learn.fit(1)
    with torch.autocast('cpu'): assert learn.model[0](torch.randn(2, 3, 8, 8)).dtype == HALF
    twin = deepcopy(learn)
    assert twin.mixed_precision.fp32_layers == ('0',) and twin.mixed_precision.learn is twin
    twin.fit(1)
    learn.save('a'); learn.load('a'); learn.fit(1)
    learn.freeze(); learn.fit(1)


def exported(path):
    learn = Learner(image_folder(path), convnet(n=2), path=path).to_channelslast(amp_mode='bf16', fp32_layers=depthwise)
    learn.fit(1)
    learn.export('e.pkl')
    return path/'e.pkl', path/'data'/'a'/'0.png'


def test_the_export_of_a_learner_with_fp32_layers_names_nothing_of_this_library(has, tmp_path):
    has('bf16')
    file, image = exported(tmp_path)
    assert not names_library(file.read_bytes().replace(b'fastai.callback.channelslast', b'')) and load_learner(file).predict(image)[0] in 'ab'


@pytest.mark.slow
def test_the_export_of_a_learner_with_fp32_layers_loads_without_this_library(has, tmp_path):
    has('bf16')
    file, image = exported(tmp_path)
    code = f"""
import sys; sys.modules['channelslast'] = None
from fastai.vision.all import *
print(load_learner({str(file)!r}).predict({str(image)!r})[0])"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip()[-1] in 'ab', out.stderr


def test_fp32_layers_of_a_compiled_model_run_in_fp32_in_the_learner_only(has):
    has('bf16')
    plain, dls, losses = convnet(), loaders(), []
    def backend(gm, inputs): return gm.forward
    for compiled in False, True:
        m = deepcopy(plain)
        learn = learner(torch.compile(m, backend=backend) if compiled else m, dls)
        learn.to_channelslast(amp_mode='bf16', fp32_layers=['0', '3'])
        assert learn.mixed_precision.fp32_layers == ('0', '3')
        learn.fit(1)
        losses.append([float(o) for o in learn.recorder.losses])
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad(), torch.autocast('cpu'): torch.testing.assert_close(learn.model.eval()(x), m(x), rtol=0, atol=0)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_fp32_layers_of_a_model_in_DataParallel_have_their_own_names(has):
    has('bf16')
    m = Shared()
    learn = learner(nn.DataParallel(m)).to_channelslast(amp_mode='bf16', fp32_layers='a')
    learn.fit(1)
    assert learn.mixed_precision.fp32_layers == ('a',) and {*m.a.seen} == {(FULL, FULL)}


class NewNorms(Callback):
    "Puts new batch norms into the model, as `DistributedTrainer` does for `sync_bn=True`."
    order = 11  # as there: after `MixedPrecision`
    def before_fit(self):
        self.seen = []
        class Norm(nn.BatchNorm2d):
            def forward(norm, x):
                self.seen.append((x.dtype, torch.is_autocast_enabled('cpu')))
                return super().forward(x)
        self.model[1] = Norm(8)


def test_fp32_layers_are_those_of_the_model_that_trains(has):
    has('bf16')
    learn = learner(cbs=NewNorms()).to_channelslast(amp_mode='bf16', fp32_layers=nn.BatchNorm2d)
    learn.fit(1)
    assert {*learn.new_norms.seen} == {(FULL, False)}


@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_fp32_layers_run_in_fp32_on_cuda(mode):
    m = Uses()
    learner(m, loaders().to(torch.device('cuda'))).to_channelslast(amp_mode=mode, fp32_layers='two').fit(1)
    assert {t[:3] for t in m.two.types} == {(FULL,)*3}


# depthwise convolutions in fp32, as a candidate

def depthwise_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, groups=4),
                         nn.ConvTranspose2d(8, 8, 2, groups=8), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_a_candidate_with_depthwise_convolutions_in_fp32_joins_each_half_precision(has, fake_steps):
    has('bf16', 'fp16'); fake_steps({})
    learn = learner(depthwise_net())
    learn.fit(1)
    before = learner_state(learn)
    t = find(learn, layers=True)
    assert [o for o in rows_of(t) if '+' in o] == ['channels last, fp16+fp32', 'channels last, bf16+fp32']
    for r in t.rows[-2:]:
        assert r.setting.fp32_layers == ('2', '4') and r.note == '2 of 5 convolutions in fp32' and r.valid and r.grad_diff is not None
    assert difference(before, learner_state(learn)) == ''


def dense_net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize('kwargs', [dict(layers=False), dict(formats='contiguous'), dict(precisions='fp32'), dict(model=dense_net)])
def test_no_such_candidate_joins(has, fake_steps, kwargs):
    "Without `layers`, channels last, half precision or depthwise convolutions."
    has('bf16'); fake_steps({})
    t = find(learner(kwargs.pop('model', depthwise_net)()), **dict(layers=True, num_it=1) | kwargs)
    assert not [o for o in rows_of(t) if '+' in o] and t.layers == ()


def test_depthwise_convolutions_inside_a_script_stay_in_half_precision(has, fake_steps):
    "Layers of a script run in C++ and can't be set one by one."
    has('bf16'); fake_steps({})
    part = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU())
    m = depthwise_net()
    m[1] = torch.jit.script(part)
    t = find(learner(m), layers=True, num_it=1)
    assert t.rows[-1].setting.fp32_layers == ('2', '4') and t.rows[-1].valid


@pytest.mark.parametrize('mixed, best', [(80., 'bf16+fp32'), (99., 'bf16')])
def test_to_fastest_keeps_layers_in_fp32_only_where_that_makes_the_step_clearly_faster(has, fake_steps, capsys, mixed, best):
    fake_steps({'contiguous, fp32': 140., 'channels last, fp32': 140., 'contiguous, bf16': 130., 'channels last, bf16+fp32': mixed})
    has('bf16')
    learn = learner(depthwise_net())
    for stays in '', 'stays ':
        assert learn.to_fastest(num_it=3, optimizer=False) is learn
        assert learn.format_timings.best.precision == best and len(learn._grab_cbs(MixedPrecision)) == 1
        assert learn.mixed_precision.fp32_layers == learn.format_timings.layers == (('2', '4') if '+' in best else ())
        assert f'Training {stays}in channels last, {best}: ' in capsys.readouterr().out
    learn.fit(1)
