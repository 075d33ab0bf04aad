"The command line: its output, and its errors for wrong arguments."
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback
from PIL import Image

from channelslast import __main__ as command, keep_memory
from channelslast.command import demo, reference_timing
from channelslast.find.layer_timing import LayerTiming
from channelslast.find.results import FormatTimings, Timing
from channelslast.compile import compiled_forward
from .conftest import convnet, learner


def run(monkeypatch, capsys, *args):
    "Exit status, standard output, standard error."
    monkeypatch.setattr(sys, 'argv', ['channelslast', *args])
    code = 0
    try: command.cli()
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


def table(out): return re.findall(r'^ *(contiguous|channels last) +([\w+]+) +([\d.]+) +([\d.]+)× +(\d+)$', out, re.M)


@pytest.fixture
def images(tmp_path):
    for i in range(20):
        label = i % 2
        folder = tmp_path/'images'/'ab'[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 200*label, dtype=np.uint8)).save(folder/f'{i}.png')
    return tmp_path/'images'


def test_main_job_as_typed(machine):
    "All trainings learn, contiguous fp32 and channels last among them. The output is not a terminal."
    typed = ['-m', 'channelslast']
    if machine != 'native': typed = ['-c', "import runpy; from channelslast.core import devices; devices.autocast_is_fast = lambda d, o: "
                                     f"o.value in {machine.split(',')}; runpy.run_module('channelslast', run_name='__main__')"]
    epochs = 3 if machine == 'native' else 1  # emulated half precision is slow
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


@pytest.mark.parametrize('arch', ['squeezenet1_1', 'test_resnet'], ids=['torchvision', 'timm'])
def test_own_images(monkeypatch, capsys, images, arch):
    "Contiguous fp32 and the fastest channels last are trained, whichever is faster. The chart is saved."
    code, out, err = run(monkeypatch, capsys, '--data', str(images), '--arch', arch, '--size', '32', '--bs', '4', '--epochs', '1',
                         '--device', 'cpu', '--amp-mode', 'fp32', '--save', str(images/'chart.png'))
    assert code == 0 and [r[:2] for r in table(out)] == [('contiguous', 'fp32'), ('channels last', 'fp32')], err
    assert Image.open(images/'chart.png').convert('RGBA').getextrema()[3] == (255, 255)  # opaque, for pages with a dark background


ROWS = [Timing('contiguous', 'fp32', 10., 1.), Timing('channels_last', 'fp32', 9., 1.11), Timing('channels_last', 'bf16', 6., 1.67),
        Timing('contiguous', 'bf16', 5., 2.), Timing('channels_last', 'fp16', 4., 2.5, valid=False)]


@pytest.mark.parametrize('rows, best, trained', [(5, 3, [0, 2, 3]), (3, 2, [0, 2]), (2, 0, [0, 1]), (2, 1, [0, 1])])
def test_what_is_trained(rows, best, trained):
    "Contiguous fp32, the fastest valid candidate in channels last, and the best candidate."
    assert demo.to_train(FormatTimings(ROWS[:rows], ROWS[best], 0., 0.)) == [ROWS[i] for i in trained]


THIS_LINE = 'In your code, this line measures your Learner and switches it to the fastest:\n'


@pytest.mark.parametrize('best, gain, says', [
    (0, 1.01, 'Keep contiguous fp32: nothing else was more than 2% faster here.'),
    (0, 1.5, 'Keep contiguous fp32 for training: nothing else was more than 2% faster here.\nPredictions in channels last, fp32, folded: 1.50× as fast '
             'as contiguous fp32.\n' + THIS_LINE + 'learn.to_fastest(train=False)'),
    (2, 1.01, 'Training in channels last, bf16: 1.67× as fast as contiguous fp32.\n' + THIS_LINE + 'learn.to_fastest()'),
    (1, 1.5, 'Training in channels last, fp32: 1.11× as fast as contiguous fp32.\nPredictions in channels last, fp32, folded: 1.50× as fast as contiguous '
             'fp32.\n' + THIS_LINE + 'learn.to_fastest()  # before predicting: learn.to_fastest(train=False)')])
def test_the_last_line_is_the_code_to_copy(best, gain, says):
    rows = [dict(timing=r, ms=r.ms) for i, r in enumerate(ROWS) if i in (0, best)]
    fold = Timing('channels_last', 'fp32', 1., gain, folded=True)
    assert demo.advice(rows, FormatTimings([fold], fold, 0., 0.)) == says


def test_bench(monkeypatch, capsys):
    "All columns are measured. A model outside the panel is found by name."
    code, out, err = run(monkeypatch, capsys, 'bench', '--models', 'squeezenet1_1,r3d_18', '--size', '32', '--bs', '2', '--num-it', '1',
                         '--device', 'cpu')
    assert code == 0, err
    lines = [o.split() for o in out.splitlines() if o.split()[:1] in (['squeezenet1_1'], ['r3d_18'])]
    assert len(lines) == 4 and out.splitlines()[0].count('PyTorch') == 1 and ('keep_memory' in out) == keep_memory(False)
    numbers = re.findall(r'^ *squeezenet1_1 +32 +2 +([\d.]+) +\S.*?, \S+ +([\d.]+) +([\d.]+)× +([\d.]+)× +\d+ s +(?:quiet|noisy) +(?:–|[\d.]+×) +([\d.]+)', out, re.M)
    assert len(numbers) == 2 and all(float(o) > 0 for o in numbers[0]) and re.search(r'r3d_18.* fails ', out)  # fastai's callback can't convert a Conv3d


def test_bench_of_predictions(monkeypatch, capsys, has):
    "Every candidate next to unchanged fastai, in batches and one by one. Models with nothing to fold have no `folded` columns."
    has()
    code, out, err = run(monkeypatch, capsys, 'bench', '--predict', '--models', 'squeezenet1_1,unet,r3d_18', '--size', '32', '--num-it', '1', '--device', 'cpu')
    assert code == 0, err
    rows = [o.split() for o in out.split('\n\n')[-1].splitlines() if re.match(r' *(squeezenet|unet|r3d)', o)]
    assert [r[:3] for r in rows] == [[n, '32', bs] for n in ('squeezenet1_1', 'unet', 'r3d_18') for bs in ('16', '1')]
    head = re.search(r'\n\n( +model .*)', out)[1]
    assert re.search('fp32, folded +pick ', head) and head.index('batch ') < head.index('contiguous, fp32') < head.index('pick ')  # side by side
    assert 'folded' not in out.splitlines()[1] and 'channels last, fp32, folded' in out and out.count('fails') == 4 and 'Overhead' not in out
    assert re.search(r'\d of 6 picks within 5% of the best; speedup over contiguous fp32 at least [\d.]+×; format_find took \d+ s', out)


def test_bench_of_compiled_predictions(monkeypatch, capsys, has):
    "The best eager and compiled candidates, or why none was compiled. The compiler is replaced by the model's own forward."
    def _compile(model, args, kwargs, freeze):
        if type(model).__name__ == 'SqueezeNet': raise compiled_forward.NotCompiled('for a test')
        def _forward(*args, **kwargs): return type(model).forward(model, *args, **kwargs)
        return _forward, _forward(*args, **kwargs)
    monkeypatch.setattr(compiled_forward, '_compile', _compile)
    has()
    code, out, err = run(monkeypatch, capsys, 'bench', '--predict', '--compile', '--models', 'mobilenet_v3_large,squeezenet1_1', '--size', '32',
                         '--bs', '2', '--num-it', '1', '--device', 'cpu')
    assert code == 0 and 'CompilePredictions' not in out, err  # its line for each compilation would stand in the table
    compiled, refused = out.split('\n\n')[-1].splitlines()[1:3]
    ratios = re.search(r'([\d.]+)× \([^()]+fp32(?:, folded)?\) +([\d.]+)× \([^()]+, compiled\) +([\d.]+)× +\d+ s ', compiled).groups()
    eager, best, ratio = map(float, ratios)
    assert ratio == pytest.approx(best/eager, abs=0.02) and 'compile time' in out
    assert re.search(r' 2 +[\d.]+ .*fp32\) +not compiled: for a test +– +– ', refused)


def test_time_in_the_model(monkeypatch):
    "One number per batch: converting the batch and the model's forward, without what comes before and after."
    clock = SimpleNamespace(now=0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(reference_timing, 'time', clock)
    class Model(torch.nn.Linear):
        def forward(self, x): clock.now += 5; return super().forward(x.mean((2, 3)))
    class Other(Callback):
        def before_batch(self): clock.now += 1
        def after_pred(self): clock.now += 100
    ms = []
    learner(Model(3, 4), cbs=[Other(), reference_timing.ModelTime(ms, torch.device('cpu'))]).get_preds()
    assert ms == [6000]*4


@pytest.mark.parametrize('n, sets, steps', [(1, 1, 1), (3, 3, 3), (12, 6, 12), (20, 6, 24)])
def test_several_sets_of_copies(monkeypatch, n, sets, steps):
    "Each set is warmed up in new memory, which it keeps. There are at least as many steps as requested."
    made, ran, kept = [], [], []
    monkeypatch.setattr(reference_timing, 'keep_memory', lambda keep=True: kept.append(keep))
    def _make(): return made.append(1) or {'a': lambda: ran.append(1) or 1.}
    assert len(reference_timing.on_fresh_copies(_make, n)['a']) == steps and len(made) == sets and len(ran) == steps + sets
    assert kept == [False, True]*sets + [False]


def test_statistics_of_a_batch():
    "As after training: for that batch, a batch norm returns the same in eval mode as in training mode."
    model, x = convnet(), torch.randn(8, 3, 8, 8)*3 + 1
    reference_timing.set_running_statistics(model, x)
    with torch.no_grad(): a, b = (model[:2].train(mode)(x) for mode in (True, False))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)  # unbiased variance


def test_company_ends_with_the_block_and_with_whoever_started_it():
    with reference_timing.background_load() as busy: assert busy.poll() is None
    assert busy.poll() is not None
    alone = subprocess.Popen(busy.args, stdin=subprocess.PIPE)
    alone.stdin.close()  # as when this process is gone
    assert alone.wait(60) == 0


def test_bench_beside_a_busy_process(monkeypatch, capsys):
    "The other process runs during `format_find`, not during the reference timing."
    seen, busy = [], []
    class BackgroundLoad:
        def __enter__(self): busy.append(1)
        def __exit__(self, *e): busy.clear()
    monkeypatch.setattr(reference_timing, 'background_load', BackgroundLoad)
    real = reference_timing.interleaved
    monkeypatch.setattr(reference_timing, 'interleaved', lambda *args: (seen.append(len(busy)), real(*args))[1])
    monkeypatch.setattr(reference_timing.Learner, 'format_find', lambda self, real=reference_timing.Learner.format_find, **kw: (seen.append(len(busy)), real(self, **kw))[1])
    code, out, err = run(monkeypatch, capsys, 'bench', '--models', 'squeezenet1_1', '--size', '32', '--bs', '2', '--num-it', '1', '--device', 'cpu', '--busy')
    assert code == 0 and seen[:2] == [1, 0], err
    assert re.search(r'of 1 picks within 5% of the best; speedup over contiguous fp32 at least [\d.]+×; format_find took \d+ s', out)


def test_the_bare_loop_keeps_the_same_layers_in_fp32():
    learn, seen = learner(), {}
    for n, m in learn.model.named_modules():
        if not isinstance(m, torch.nn.Conv2d): continue
        m._conv_forward = lambda x, *args, n=n, real=m._conv_forward: (seen.setdefault(n, torch.is_autocast_enabled('cpu')), real(x, *args))[1]
    rows = [LayerTiming(('3',), 'Conv2d', (), 'bf16', 2., 1., 'fp32'), LayerTiming(('0', '5'), 'Conv2d', (), 'bf16', 1., 2., 'bf16')]
    step = reference_timing.plain_loop(learn, learn.dls.one_batch(), Timing('channels_last', 'bf16+fp32'), rows)
    assert step() > 0 and seen == {'0': True, '3': False, '5': True}


@pytest.mark.parametrize('ms, was', [([10., 10.2, 10.4], False), ([10., 14., 30.], True)])
def test_disturbance_is_seen(ms, was): assert reference_timing.is_noisy(dict(a=ms, b=[2*o for o in ms])) == was


@pytest.mark.parametrize('fast, asked, measured', [((), None, ['fp32']), (('bf16',), None, ['fp32', 'bf16']), (('bf16',), 'bf16', ['bf16']),
                                                   (('fp16', 'bf16'), 'fp32', ['fp32'])])
def test_precisions_that_are_measured(has, fast, asked, measured):
    has(*fast)
    assert demo.precisions(torch.device('cpu'), asked) == measured


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
    (['--arch', 'alexnet', '--size', '8'], '--arch alexnet: does not accept images of 8×8'),
    (['--data', '/no/such/folder'], '--data /no/such/folder: no such folder')])
def test_mistakes_end_in_one_line(monkeypatch, capsys, args, says):
    code, out, err = run(monkeypatch, capsys, *args)
    assert code == 2 and says in err and err.count('\n') == 1 and err.startswith('channelslast: ')


def test_mistakes_in_folders(monkeypatch, capsys, tmp_path, images):
    def error(path):
        code, out, err = run(monkeypatch, capsys, '--data', str(path), '--arch', 'squeezenet1_1', '--size', '32', '--bs', '4',
                             '--epochs', '1', '--device', 'cpu')
        assert code == 2 and err.count('\n') == 1
        return err
    (tmp_path/'empty').mkdir()
    assert 'has 0 subfolder(s) with images' in error(tmp_path/'empty')
    (images/'b').rename(tmp_path/'gone')
    assert 'has 1 subfolder(s) with images; pass a folder with two or more' in error(images)
    (tmp_path/'gone').rename(images/'b')
    (images/'a'/'0.png').write_text('no image')
    assert "an image can't be read" in error(images)


def test_asked_precision_must_be_fast(monkeypatch, capsys, has):
    has()
    code, _, err = run(monkeypatch, capsys, '--amp-mode', 'fp16', '--device', 'cpu')
    assert code == 2 and '--amp-mode fp16: not fast on this cpu; use fp32' in err


def test_no_timm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'timm', None)
    code, _, err = run(monkeypatch, capsys, '--arch', 'efficientvit_b0')
    assert code == 2 and 'pip install timm' in err
