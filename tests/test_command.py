"The command line: the demo, its output, and its errors for wrong arguments."
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from channelslast.command.demo import precisions
from .helpers import run_command, use_small_models


@pytest.fixture
def run(monkeypatch, capsys):
    "Run `channelslast` with these arguments. Returns exit status or message, standard output and standard error."
    return lambda *args: run_command(monkeypatch, capsys, *args)


@pytest.fixture
def small_models(monkeypatch): use_small_models(monkeypatch)


def table(out): return re.findall(r'^ *(contiguous|channels last) +([\w+]+(?:, fused)?) +([\d.]+) +([\d.]+)× +(\d+)$', out, re.M)


@pytest.fixture
def images(tmp_path):
    for i in range(20):
        label = i % 2
        folder = tmp_path/'images'/'ab'[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 200*label, dtype=np.uint8)).save(folder/f'{i}.png')
    return tmp_path/'images'


# the demo

@pytest.mark.slow
def test_demo_of_the_digits_as_typed(accelerates):
    "All trainings learn, contiguous fp32 and channels last among them. The output is not a terminal."
    typed = ['-m', 'channelslast']
    if accelerates != 'native': typed = ['-c', "import runpy; from channelslast.core import devices; devices.autocast_is_fast = lambda d, o: "
                                         f"o.value in {accelerates.split(',')}; runpy.run_module('channelslast', run_name='__main__')"]
    epochs = 3 if accelerates in ('native', 'none') else 1  # emulated half precision is slow
    out = subprocess.run([sys.executable, '-W', 'ignore', *typed, '--size', '32', '--epochs', str(epochs)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = table(out.stdout)
    assert rows[0][:2] == ('contiguous', 'fp32') and rows[0][3] == '1.00' and rows[1][0] == 'channels last' and len({r[:2] for r in rows}) == len(rows) < 4
    assert all(int(r[4]) > 0 for r in rows)
    assert re.search(r'^(Keep contiguous fp32: |Use .*: [\d.]+× as fast as contiguous fp32\.|Undecided: (keep|use) )', out.stdout, re.M)
    accuracies = [float(o) for o in re.findall(r'^epoch [012], train_loss [\d.]+, valid_loss [\d.]+, accuracy ([\d.]+), time \S+$', out.stdout, re.M)]
    assert len(accuracies) == epochs*len(rows) and (epochs == 1 or min(accuracies[epochs - 1::epochs]) > 0.6)
    assert not re.search(r'[\x00-\x08\x0b-\x1f\x7f]', out.stdout + out.stderr)
    assert re.match(r'Keep contiguous fp32: |learn\.to_fastest\(', out.stdout.splitlines()[-1])


def check_own_images(run, images, arch):
    code, out, err = run('--data', str(images), '--arch', arch, '--size', '32', '--bs', '4', '--epochs', '1', '--device', 'cpu',
                         '--amp-mode', 'fp32', '--save', str(images/'chart.png'))
    rows = table(out)  # channels last may be fastest with the fused optimizer, or contiguous
    assert code == 0 and rows[0][:2] == ('contiguous', 'fp32') and rows[1][0] == 'channels last' and len(rows) in (2, 3), err
    assert len(re.findall(r'^epoch 0, train_loss [\d.]+, valid_loss [\d.]+, accuracy [\d.]+, time \S+$', out, re.M)) == len(rows)
    assert not re.search(r'[\x00-\x08\x0b-\x1f\x7f]', out + err)
    assert Image.open(images/'chart.png').convert('RGBA').getextrema()[3] == (255, 255)  # opaque, for pages with a dark background


def test_demo_of_own_images_trains_contiguous_fp32_and_channels_last_and_saves_the_chart(run, images, small_models):
    check_own_images(run, images, 'resnet18')


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['squeezenet1_1', 'test_resnet'], ids=['torchvision', 'timm'])
def test_demo_of_own_images_with_models_of_both_libraries(run, images, arch): check_own_images(run, images, arch)


def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


class Timed(nn.Module):
    """A small classifier whose pass takes `times[key]` ms: `key` is such as `'channels last, bf16'`, in predictions
    `'predict, channels last, bf16'`. It is wrong in the setting `times['wrong']`."""
    def __init__(self, clock, times): super().__init__(); self.net, self.clock, self.times = net(), clock, times
    def forward(self, x):
        key = 'contiguous, ' if self.net[0].weight.is_contiguous() else 'channels last, '
        key += 'bf16' if torch.is_autocast_enabled('cpu') else 'fp32'
        self.clock.pass_ms(self.times.get(key if torch.is_grad_enabled() else f'predict, {key}', 100.))
        return self.net(x)*(3 if self.times.get('wrong') == key else 1)


THIS_LINE = 'In your code, this line measures your Learner and switches it to the fastest:\n'
CONTIGUOUS, LAST, LAST_BF16, BF16 = 'contiguous, fp32', 'channels last, fp32', 'channels last, bf16', 'contiguous, bf16'


@pytest.mark.parametrize('times, trained, says', [
    ({LAST: 150., LAST_BF16: 150., BF16: 150.}, [CONTIGUOUS, LAST], 'Keep contiguous fp32: nothing else was more than 2% faster here.'),
    ({LAST: 150., LAST_BF16: 140., BF16: 150., 'predict, ' + LAST: 50.}, [CONTIGUOUS, LAST_BF16],
     'Keep contiguous fp32 for training: nothing else was more than 2% faster here.\n'
     'Predictions in channels last, fp32: 2.00× as fast as contiguous fp32.\n' + THIS_LINE + 'learn.to_fastest(train=False)'),
    ({LAST: 90., LAST_BF16: 60., BF16: 50.}, [CONTIGUOUS, LAST_BF16, BF16],
     'Training in contiguous, bf16: 2.00× as fast as contiguous fp32.\n' + THIS_LINE + 'learn.to_fastest()'),
    ({LAST: 80., LAST_BF16: 10., BF16: 150., 'wrong': LAST_BF16}, [CONTIGUOUS, LAST],
     'Training in channels last, fp32: 1.25× as fast as contiguous fp32.\n' + THIS_LINE + 'learn.to_fastest()'),
    ({LAST: 40., LAST_BF16: 60., BF16: 80., 'predict, ' + LAST: 50.}, [CONTIGUOUS, LAST],
     'Training in channels last, fp32: 2.50× as fast as contiguous fp32.\n'
     'Predictions in channels last, fp32: 2.00× as fast as contiguous fp32.\n' + THIS_LINE +
     'learn.to_fastest()  # before predicting: learn.to_fastest(train=False)')], ids=['nothing', 'predictions', 'training', 'wrong', 'both'])
def test_demo_trains_contiguous_fp32_channels_last_and_the_fastest_and_ends_with_the_code_to_copy(run, images, monkeypatch, clock, has, times, trained, says):
    has('bf16')
    use_small_models(monkeypatch, resnet18=lambda: Timed(clock, times))
    code, out, err = run('--data', str(images), '--arch', 'resnet18', '--size', '32', '--bs', '4', '--epochs', '1', '--device', 'cpu')
    assert code == 0 and re.findall(r'^Training ((?:contiguous|channels last), \w+)$', out, re.M) == trained, err
    assert out.endswith(says + '\n')
    ms = [times.get(o, 100.) for o in trained]
    assert [r[2:4] for r in table(out)] == [(f'{o:.1f}', f'{100/o:.2f}') for o in ms]
    assert [int(r[4]) for r in table(out)] == [40] + [80 if 'Predictions' in says else 40]*(len(ms) - 1)  # 4 images in 100 or 50 ms


@pytest.mark.parametrize('fast, asked, measured', [((), None, ['fp32']), (('bf16',), None, ['fp32', 'bf16']), (('bf16',), 'bf16', ['bf16']),
                                                   (('fp16', 'bf16'), 'fp32', ['fp32'])])
def test_demo_measures_the_requested_precision_or_all_that_are_fast(has, fast, asked, measured):
    has(*fast)
    assert precisions(torch.device('cpu'), asked) == measured


# wrong arguments

@pytest.mark.parametrize('args, says', [
    (['--arch', 'resnt18'], 'no model resnt18 in torchvision or timm; did you mean resnet18'),
    (['--arch', 'zzzzz'], 'try resnet18'),
    (['--arch', 'vgg11', '--size', '0'], '--size 0: must be above 0'),
    (['--bs', '-1'], '--bs -1: must be above 0'), (['--lr', '0'], '--lr 0.0: must be above 0'),
    (['--epochs', '0'], '--epochs 0: must be above 0'),
    (['--bs', '5000'], '--bs 5000: larger than the 1438 training images; try --bs 179'),
    (['--device', 'cuda:99'], '--device cuda:99: not available on this machine; try --device '),
    (['--save', '/no/such/chart.png'], '--save /no/such/chart.png: no such folder'),
    (['--save', 'chart.xyz'], '--save chart.xyz: not a supported image type; try --save chart.png'), (['--save', 'chart'], 'try --save chart.png'),
    (['--device', 'gpu'], '--device gpu: not available on this machine'),
    (['--amp-mode', 'fp8'], '--amp-mode fp8: not a precision; use fp16, bf16 or fp32'),
    (['--amp-mode', 'fp16', '--device', 'cpu'], '--amp-mode fp16: not fast on this cpu; use fp32'),
    (['--arch', 'alexnet', '--size', '8'], '--arch alexnet: does not accept images of 8×8'),
    (['--data', '/no/such/folder'], '--data /no/such/folder: no such folder')], ids=lambda o: ' '.join(o) if isinstance(o, list) else '')
def test_a_wrong_argument_ends_in_one_line_that_says_what_to_pass(run, args, says):
    code, out, err = run(*args)
    assert code == 2 and says in err and err.count('\n') == 1 and err.startswith('channelslast: ')


def test_a_folder_without_images_of_two_classes_ends_in_one_line(run, tmp_path, images, small_models):
    def error(path):
        code, out, err = run('--data', str(path), '--arch', 'resnet18', '--size', '32', '--bs', '4', '--epochs', '1', '--device', 'cpu')
        assert code == 2 and err.count('\n') == 1
        return err
    (tmp_path/'empty').mkdir()
    assert 'has 0 subfolder(s) with images' in error(tmp_path/'empty')
    (images/'b').rename(tmp_path/'gone')
    assert 'has 1 subfolder(s) with images; pass a folder with two or more' in error(images)
    (tmp_path/'gone').rename(images/'b')
    (images/'a'/'0.png').write_text('no image')
    assert "an image can't be read" in error(images)


def test_a_model_of_timm_without_timm_says_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    code, _, err = run('--arch', 'efficientvit_b0')
    assert code == 2 and 'pip install timm' in err
