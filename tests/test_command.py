"The command line: the demo and the benchmark, their output, and their errors for wrong arguments."
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, Learner
from PIL import Image
from torch import nn

from channelslast import keep_memory
from channelslast.command import reference_timing
from channelslast.command.demo import precisions
from channelslast.core.glibc_malloc import memory_is_default
from .helpers import Breaks, Load, Mixed, convnet, learner, run_command, use_small_models


@pytest.fixture
def run(monkeypatch, capsys):
    "Run `channelslast` with these arguments. Returns exit status or message, standard output and standard error."
    return lambda *args: run_command(monkeypatch, capsys, *args)


@pytest.fixture
def small_models(monkeypatch): use_small_models(monkeypatch)


def table(out): return re.findall(r'^ *(contiguous|channels last) +([\w+]+) +([\d.]+) +([\d.]+)× +(\d+)$', out, re.M)


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
    assert re.search(r'^(Keep contiguous fp32: |Use .*: [\d.]+× as fast as contiguous fp32 |Undecided: (keep|use) )', out.stdout, re.M)
    accuracies = [float(o) for o in re.findall(r'^epoch [012], train_loss [\d.]+, valid_loss [\d.]+, accuracy ([\d.]+), time \S+$', out.stdout, re.M)]
    assert len(accuracies) == epochs*len(rows) and (epochs == 1 or min(accuracies[epochs - 1::epochs]) > 0.6)
    assert not re.search(r'[\x00-\x08\x0b-\x1f\x7f]', out.stdout + out.stderr)
    assert re.match(r'Keep contiguous fp32: |learn\.to_fastest\(', out.stdout.splitlines()[-1])


def check_own_images(run, images, arch):
    code, out, err = run('--data', str(images), '--arch', arch, '--size', '32', '--bs', '4', '--epochs', '1', '--device', 'cpu',
                         '--amp-mode', 'fp32', '--save', str(images/'chart.png'))
    assert code == 0 and [r[:2] for r in table(out)] == [('contiguous', 'fp32'), ('channels last', 'fp32')], err
    assert len(re.findall(r'^epoch 0, train_loss [\d.]+, valid_loss [\d.]+, accuracy [\d.]+, time \S+$', out, re.M)) == 2
    assert not re.search(r'[\x00-\x08\x0b-\x1f\x7f]', out + err)
    assert Image.open(images/'chart.png').convert('RGBA').getextrema()[3] == (255, 255)  # opaque, for pages with a dark background


def test_demo_of_own_images_trains_contiguous_fp32_and_channels_last_and_saves_the_chart(run, images, small_models):
    check_own_images(run, images, 'resnet18')


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['squeezenet1_1', 'test_resnet'], ids=['torchvision', 'timm'])
def test_demo_of_own_images_with_models_of_both_libraries(run, images, arch): check_own_images(run, images, arch)


class Timed(nn.Module):
    """A small classifier whose pass takes `times[key]` ms: `key` is such as `'channels last, bf16'`, in predictions
    `'predict, channels last, bf16'`. It is wrong in the setting `times['wrong']`."""
    def __init__(self, clock, times): super().__init__(); self.net, self.clock, self.times = convnet(n=2), clock, times
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


# the benchmark

BENCH = '--size', '32', '--bs', '2', '--num-it', '1', '--device', 'cpu'


def check_bench(run, name, video):
    code, out, err = run('bench', '--models', f'{name},{video}', *BENCH)
    assert code == 0, err
    lines = [o.split() for o in out.splitlines() if o.split()[:1] in ([name], [video])]
    assert len(lines) == 4 and out.splitlines()[0].count('PyTorch') == 1 and ('keep_memory' in out) == keep_memory(False)
    numbers = re.findall(rf'^ *{name} +32 +2 +([\d.]+) +\S.*?, \S+ +([\d.]+) +([\d.]+)× +([\d.]+)× +\d+ s +(?:quiet|noisy) +(?:–|[\d.]+×) +([\d.]+)', out, re.M)
    assert len(numbers) == 2 and all(float(o) > 0 for o in numbers[0])
    assert re.search(rf'{video}.* fails ', out)  # fastai's callback can't convert a Conv3d
    assert re.search(r'of 2 picks within 5% of the best; speedup over contiguous fp32 at least [\d.]+×; format_find took \d+ s', out)
    assert re.search(r'Overhead: [\d.]+ ms before a fit of .*; [\d.]+ ms to convert a batch', out)


def test_bench_measures_all_columns(run, monkeypatch):
    use_small_models(monkeypatch, vgg11=Mixed)
    check_bench(run, 'resnet18', 'vgg11')


@pytest.mark.slow
def test_bench_measures_models_outside_the_panel_and_video_models(run): check_bench(run, 'squeezenet1_1', 'r3d_18')


def check_bench_of_predictions(run, *names, fails):
    code, out, err = run('bench', '--predict', '--models', ','.join(names), '--size', '32', '--num-it', '1', '--device', 'cpu')
    assert code == 0, err
    rows = [o.split() for o in out.split('\n\n')[-1].splitlines() if o.split()[0] in names]
    assert [r[:3] for r in rows] == [[n, '32', bs] for n in names for bs in ('16', '1')]
    head = re.search(r'\n\n( +model .*)', out)[1]
    assert re.search('fp32, folded +pick ', head) and head.index('batch ') < head.index('contiguous, fp32') < head.index('pick ')  # side by side
    assert 'folded' not in out.splitlines()[1] and 'channels last, fp32, folded' in out and out.count('fails') == fails and 'Overhead' not in out
    assert re.search(rf'\d of {len(rows)} picks within 5% of the best; speedup over contiguous fp32 at least [\d.]+×; format_find took \d+ s', out)


def test_bench_of_predictions_has_a_column_per_candidate(run, monkeypatch):
    "In batches and one by one. Models with nothing to fold have no `folded` columns."
    use_small_models(monkeypatch, alexnet=Mixed)
    check_bench_of_predictions(run, 'alexnet', 'resnet18', fails=4)


@pytest.mark.slow
def test_bench_of_predictions_measures_squeezenet_unet_and_video_models(run):
    check_bench_of_predictions(run, 'squeezenet1_1', 'unet', 'r3d_18', fails=4)


def test_bench_of_compiled_predictions_shows_the_best_eager_and_compiled_candidates_or_why_none_was_compiled(run, monkeypatch):
    "The compiler is replaced by the traced operations themselves."
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: real(f, fullgraph=True, dynamic=False, backend='eager'))
    use_small_models(monkeypatch, vgg11=Breaks)
    code, out, err = run('bench', '--predict', '--compile', '--models', 'resnet18,vgg11', *BENCH)
    assert code == 0 and 'CompilePredictions' not in out, err  # its line for each compilation would stand in the table
    compiled, refused = out.split('\n\n')[-1].splitlines()[1:3]
    ratios = re.search(r'([\d.]+)× \([^()]+fp32(?:, folded)?\) +([\d.]+)× \([^()]+, compiled\) +([\d.]+)× +\d+ s ', compiled).groups()
    eager, best, ratio = map(float, ratios)
    assert ratio == pytest.approx(best/eager, abs=0.02) and 'compile time' in out
    assert re.search(r' 2 +[\d.]+ .*fp32(?:, folded)?\) +not compiled: .* – +– ', refused)


def test_bench_next_to_a_busy_process_ends_it_before_the_reference_timing(run, monkeypatch, small_models):
    seen, real_find, real_batch = {True: set(), False: set()}, Learner.format_find, Learner.one_batch
    searching = []
    def _find(self, **kwargs):
        searching.append(1)
        try: return real_find(self, **kwargs)
        finally: searching.clear()
    def _one_batch(self, *args):
        seen[bool(searching)].add(Load.running)
        return real_batch(self, *args)
    monkeypatch.setattr(subprocess, 'Popen', Load)
    monkeypatch.setattr(Learner, 'format_find', _find)
    monkeypatch.setattr(Learner, 'one_batch', _one_batch)
    assert run('bench', '--models', 'resnet18', *BENCH, '--busy')[0] == 0
    assert seen == {True: {1}, False: {0}}


def test_model_time_is_that_of_the_model_and_of_converting_the_batch(clock):
    "One number per batch, without what comes before and after."
    class Model(nn.Linear):
        def forward(self, x): clock.pass_ms(5); return super().forward(x.mean((2, 3)))
    class Other(Callback):
        def before_batch(self): clock.pass_ms(1)
        def after_pred(self): clock.pass_ms(100)
    ms = []
    learner(Model(3, 4), cbs=[Other(), reference_timing.ModelTime(ms, torch.device('cpu'))]).get_preds()
    assert ms == pytest.approx([6]*4)


@pytest.mark.parametrize('n, sets, steps', [(1, 1, 1), (3, 3, 3), (12, 6, 12), (20, 6, 24)])
def test_on_fresh_copies_times_at_least_n_steps_in_several_sets_that_keep_their_memory(monkeypatch, n, sets, steps):
    "Each set is warmed up."
    monkeypatch.delenv('MALLOC_TRIM_THRESHOLD_')
    supported, made, ran = keep_memory(False), [], []
    def _make():
        made.append(memory_is_default())
        return {'a': lambda: ran.append(1) or 1.}
    assert len(reference_timing.on_fresh_copies(_make, n, 6)['a']) == steps and len(made) == sets and len(ran) == steps + sets
    assert not any(made) and memory_is_default() == supported


def test_set_running_statistics_to_those_of_a_batch():
    "For that batch, a batch norm then returns the same in eval mode as in training mode."
    model, x = convnet(), torch.randn(8, 3, 8, 8)*3 + 1
    reference_timing.set_running_statistics(model, x)
    with torch.no_grad(): a, b = (model[:2].train(mode)(x) for mode in (True, False))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)  # unbiased variance


def test_background_load_ends_with_the_block_and_with_the_process_that_started_it():
    with reference_timing.background_load() as busy: assert busy.poll() is None
    assert busy.poll() is not None
    alone = subprocess.Popen(busy.args, stdin=subprocess.PIPE)
    alone.stdin.close()  # as when this process is gone
    assert alone.wait(60) == 0


def test_plain_loop_keeps_the_same_layers_in_fp32():
    seen = {}
    class Conv(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            seen.setdefault(self.in_channels, out.dtype)
            return out
    class Casts(nn.Module):
        def forward(self, x): return x
    model = nn.Sequential(Conv(3, 4, 3), Casts(), nn.Sequential(Conv(4, 5, 1)), Conv(5, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    rows = [SimpleNamespace(names=('2.0',), precision='bf16', kept='fp32'), SimpleNamespace(names=('0', '3'), precision='bf16', kept='bf16')]
    learn = learner(model)
    step = reference_timing.plain_loop(learn, learn.dls.one_batch(), SimpleNamespace(memory_format='channels_last', precision='bf16+fp32'), rows)
    assert step() > 0 and seen == {3: torch.bfloat16, 4: torch.float32, 5: torch.bfloat16}


@pytest.mark.parametrize('ms, noisy', [([10., 10.2, 10.4], False), ([10., 14., 30.], True)])
def test_is_noisy_sees_steps_that_other_work_slowed_down(ms, noisy): assert reference_timing.is_noisy(dict(a=ms, b=[2*o for o in ms])) == noisy


# wrong arguments

@pytest.mark.parametrize('args, says', [
    (['--arch', 'resnt18'], 'no model resnt18 in torchvision or timm; did you mean resnet18'),
    (['--arch', 'zzzzz'], 'try resnet18'),
    (['--arch', 'vgg11', '--size', '0'], '--size 0: must be above 0'),
    (['--bs', '-1'], '--bs -1: must be above 0'), (['--lr', '0'], '--lr 0.0: must be above 0'),
    (['--epochs', '0'], '--epochs 0: must be above 0'),
    (['--bs', '5000'], '--bs 5000: larger than the 1438 training images; try --bs 179'),
    (['--device', 'cuda:99'], '--device cuda:99: not available on this machine; try --device '),
    (['bench', '--compile'], '--compile: pass it only with --predict'),
    (['bench', '--models', 'resnt18'], 'did you mean resnet18'), (['bench', '--num-it', '0'], '--num-it 0: must be above 0'),
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
