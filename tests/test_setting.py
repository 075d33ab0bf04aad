"`Setting`: read from a Learner, applied to one, and printed as the line that sets it."
from copy import deepcopy

import pytest
from fastai.vision.all import Adam, MixedPrecision

from channelslast import *  # noqa: F403 - the printed lines need these names, as a notebook's cell does
from channelslast import CompilePredictions, CompileTraining, FoldBatchNorm, fused
from channelslast.learner.setting import FORMATS, PRECISIONS, Setting
from .helpers import convnet, learner, loaders, shake

SETTINGS = [(Setting(f, p, layers*(p != 'fp32'), folded=not train and extra, compiled='inductor'*extra, fused=train and extra), train)
            for f in FORMATS for p in PRECISIONS for layers in ((), ('0', '3')) if layers == () or p != 'fp32'
            for train in (True, False) for extra in (False, True)]


@pytest.fixture(autouse=True)
def fast_in_both(has): has('fp16', 'bf16')


@pytest.mark.parametrize('setting, train', SETTINGS, ids=lambda o: str(o))
def test_the_printed_line_gives_a_new_learner_the_same_setting_as_apply(setting, train):
    learn, other = learner(shake(convnet())), learner(shake(convnet()))
    exec(setting.code(train, 'opt_func=fused(Adam)'), globals(), dict(learn=learn))
    setting.apply(other, train)
    assert Setting.of(learn, train) == Setting.of(other, train) == setting
    other.to_contiguous(to_fp32=True)
    assert Setting.of(other, train) == Setting() and other.opt_func is Adam


@pytest.mark.parametrize('setting, line', [
    (Setting(), 'learn.to_contiguous(to_fp32=True)'), (Setting('channels_last'), 'learn.to_channelslast(to_fp16=False)'),
    (Setting('channels_last', 'bf16'), "learn.to_channelslast(amp_mode='bf16')"), (Setting(folded=True), 'learn.add_cb(FoldBatchNorm())'),
    (Setting(precision='fp16'), "learn.to_channelslast(amp_mode='fp16').to_contiguous()")], ids=str)
def test_the_printed_line_is_short(setting, line): assert setting.code(train=False) == line


def test_settings_are_ordered_by_what_they_add():
    def _is_simpler(a, b): return a.rank < b.rank
    assert _is_simpler(Setting(), Setting('channels_last')) and _is_simpler(Setting('channels_last'), Setting(fused=True))
    assert _is_simpler(Setting(fused=True), Setting(compiled='inductor'))
    assert _is_simpler(Setting('channels_last', compiled='inductor'), Setting(precision='bf16'))


@pytest.mark.parametrize('train', [True, False])
def test_apply_replaces_what_it_added_before_and_keeps_what_the_user_added(train):
    kind = CompileTraining if train else CompilePredictions
    learn = learner(shake(convnet()))
    Setting('channels_last', compiled='inductor', folded=not train, fused=train).apply(learn, train)
    assert len(learn._grab_cbs(kind)) == 1 and len(learn._grab_cbs(FoldBatchNorm)) == (not train)
    Setting('channels_last').apply(learn, train)
    assert not learn._grab_cbs(kind) and not learn._grab_cbs(FoldBatchNorm) and learn.opt_func is Adam
    mine = learner(shake(convnet()), cbs=[kind()], opt_func=fused(Adam))
    Setting('channels_last', fused=train).apply(mine, train)
    assert mine._grab_cbs(kind) and type(mine.opt_func) is fused
    Setting('channels_last', fused=train).apply(mine, train, compile=True)
    assert not mine._grab_cbs(kind)


def test_apply_for_predictions_leaves_what_was_added_for_training_and_back():
    learn = Setting(compiled='inductor').apply(learner(shake(convnet())))
    Setting(folded=True).apply(learn, train=False)
    assert learn._grab_cbs(CompileTraining) and learn._grab_cbs(FoldBatchNorm)
    Setting().apply(learn)
    assert not learn._grab_cbs(CompileTraining) and not learn._grab_cbs(FoldBatchNorm)


def test_copies_of_a_learner_take_away_what_was_added_to_it():
    learn = Setting('channels_last', 'bf16', fused=True).apply(learner(dls=loaders()))
    twin = deepcopy(learn)
    Setting().apply(twin)
    assert Setting.of(twin) == Setting() and twin.opt_func is Adam
    assert Setting.of(learn) == Setting('channels_last', 'bf16', fused=True) and learn._grab_cbs(MixedPrecision)


def test_settings_are_values():
    assert Setting('channels_last', 'bf16') == Setting('channels_last', 'bf16') and len({Setting(), Setting()}) == 1
