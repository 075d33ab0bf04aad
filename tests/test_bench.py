"The benchmark, `python -m tests.bench`: its columns, errors, memory, stopping and resuming a report, and the reference timing."
import json
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.vision.all import Callback, Learner
from torch import nn

from channelslast import keep_memory
from .bench import PANEL, reference
from .bench.__main__ import cli
from .bench.models import cuda_settings, plan
from .helpers import Breaks, Load, Mixed, convnet, learner, run_command, use_small_models

root, CPU = Path(__file__).parent.parent, torch.device('cpu')
FILE = Path('channelslast-report.jsonl')


@pytest.fixture
def small_models(monkeypatch): use_small_models(monkeypatch)


@pytest.fixture
def measured(monkeypatch, tmp_path, small_models):
    """Measure small models in few steps. Lists what was measured as `(kind, name, px, bs)`; `measured.do(name, px, bs)` runs
    before each."""
    class Calls(list): do = staticmethod(lambda name, px, bs: None)
    calls, real_find, real_summary = Calls(), Learner.format_find, Learner.format_summary
    def _call(learn, kind):
        x, _ = learn.dls.one_batch()
        calls.do(learn.model.arch, x.shape[-1], len(x))
        calls.append((kind, learn.model.arch, x.shape[-1], len(x)))
    def _find(self, train=True, compile=False, show_plot=False):
        _call(self, 'training' if train else 'compiled predictions' if compile else 'predictions')
        return real_find(self, 'fp32', 'contiguous', 1, False, False, train, optimizer=False)
    def _summary(self):
        _call(self, 'format_summary')
        return real_summary(self)
    monkeypatch.setattr(Learner, 'format_find', _find)
    monkeypatch.setattr(Learner, 'format_summary', _summary)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.fixture
def run(monkeypatch, capsys):
    "Run the benchmark on two models. Returns exit status or message, standard output and standard error."
    def _run(*args, models='resnet18,mobilenet_v2'):
        few = '--size', '32', '--bs', '4', '--num-it', '1', '--device', 'cpu'
        return run_command(monkeypatch, capsys, '--models', models, *few, *args, command=cli)
    return _run


ALL = [(kind, name, 32, 4) for name in ('resnet18', 'mobilenet_v2') for kind in ('training', 'predictions', 'format_summary')]
PREDICTIONS = [r for r in ALL if r[0] == 'predictions']


def tables(out) -> list:
    "The tables in Markdown: lists of lines, which are lists of cells. Asserts that all lines of a table have as many cells."
    parsed = [[re.split(r'(?<!\\)\|', line)[1:-1] for line in block.splitlines()] for block in re.findall(r'(?:^\|.*\|\n?)+', out, re.M)]
    for t in parsed: assert len({len(line) for line in t}) == 1 and {c.strip() for c in t[1]} == {'---'}
    return [[[c.strip() for c in line] for line in t] for t in parsed]


def check_report(run, name, folder):
    "Check a report of one model, and that the second run measures nothing."
    code, out, err = run('--report', models=name)
    assert code == 0, err
    training, predictions, summary, candidates = tables(out)
    for t in training, predictions, summary: assert t[2][:3] == [name, '32', '4']
    assert len(training) == 3 and 'error' not in training[0] + predictions[0] and summary[2][3].startswith('Channels last ')
    assert {'contiguous, fp32', 'channels last, fp32'} <= {c[3] for c in candidates[2:]} and 'MiB' in candidates[0]
    assert out.startswith('\n- channelslast ') and 'PyTorch' in out and 'torchvision' in out and '3 of 3 rows' in out
    records = [json.loads(o) for o in FILE.read_text().splitlines() if o]
    assert str(folder/FILE) in err and len(records) == 3
    assert run('--report', models=name)[:2] == (0, out)
    assert [json.loads(o) for o in FILE.read_text().splitlines() if o] == records


def test_report_of_a_small_model(run, small_models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_report(run, 'resnet18', tmp_path)


@pytest.mark.slow
def test_report_of_squeezenet_as_a_user_runs_it(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_report(run, 'squeezenet1_1', tmp_path)


def fail_on(name, error):
    def _fail(arch, px, bs):
        if arch == name: raise error
    return _fail


def test_report_shows_an_error_as_a_row_and_measures_the_rest(measured, run):
    measured.do = fail_on('resnet18', ValueError('a | b\n<class c>'))
    code, out, err = run('--report')
    assert code == 0 and measured == [r for r in ALL if r[1] != 'resnet18']
    for t in tables(out)[:3]: assert t[2][:3] == ['resnet18', '32', '4'] and t[2][-1] == r'ValueError: a \| b &lt;class c&gt;' and t[3][-1] == '–'
    assert '3 of 6 rows' in out and '1 of 1 picks' in out and '1 of 2 rows failed' in out and '3 rows failed' in err


def test_bench_shows_an_error_as_a_row_and_measures_the_rest(measured, run):
    measured.do = fail_on('resnet18', ValueError('no such thing'))
    code, out, err = run()
    assert code == 0 and out.count('ValueError: no such thing') == 2 and '1 of 2 rows failed' in out and 'Overhead' in out


def test_bench_ends_with_an_error_if_all_rows_failed(measured, run):
    measured.do = fail_on('resnet18', ValueError('no such thing'))
    code, out, err = run(models='resnet18')
    assert code == 'All rows failed' and '1 of 1 rows failed' in out and 'Overhead' not in out


def test_report_ends_with_an_error_if_all_rows_failed(measured, run):
    measured.do = fail_on('resnet18', ValueError)
    code, out, err = run('--report', models='resnet18')
    assert code == 'All rows failed' and out.count('ValueError:') == 3


def test_report_of_a_model_that_cannot_be_built_shows_its_error(measured, run, monkeypatch):
    def _get_model(*args, **kwargs): raise ValueError('Input shape indivisible by patch size!')
    monkeypatch.setattr(torchvision.models, 'get_model', _get_model)
    code, out, err = run('--size', '33', models='vit_b_32')
    assert code == 'All rows failed' and 'Input shape indivisible by patch size' in out


OOM = torch.OutOfMemoryError('CUDA out of memory.'), RuntimeError('MPS backend out of memory'), RuntimeError("DefaultCPUAllocator: can't allocate")


@pytest.mark.parametrize('e', OOM, ids=['cuda', 'mps', 'cpu'])
def test_report_halves_a_batch_until_it_fits_in_memory(measured, run, e):
    asked = []
    def _do(name, px, bs):
        asked.append(bs)
        if bs > 2: raise e
    measured.do = _do
    code, out, err = run('--report', '--predict', '--bs', '8', models='resnet18')
    assert asked == [8, 4, 2] and tables(out)[0][2][2] == '2 (8: out of memory)' and code == 0


def test_report_of_a_model_that_never_fits_in_memory(measured, run):
    measured.do = fail_on('resnet18', OOM[0])
    code, out, err = run('--report', '--predict', models='resnet18')
    assert tables(out)[0][2] == ['resnet18', '32', '1 (4: out of memory)', 'OutOfMemoryError: CUDA out of memory.']


def test_report_does_not_halve_the_batch_after_another_error(measured, run):
    measured.do = fail_on('resnet18', ValueError('out of memory'))
    code, out, err = run('--report', '--predict', models='resnet18')
    assert tables(out)[0][2][2:] == ['4', 'ValueError: out of memory']


def test_bench_halves_a_batch_that_does_not_fit_in_memory_with_fastais_own_callbacks_only(measured, run, monkeypatch):
    "It once said that fastai's own callbacks fail."
    def _before_fit(self):
        if self.dls.bs > 2: raise OOM[0]
    monkeypatch.setattr(FastaiChannelsLast, 'before_fit', _before_fit)
    code, out, err = run('--report', '--predict', models='resnet18')
    assert tables(out)[0][2][2] == '2 (4: out of memory)' and 'fails' not in out and code == 0


def test_report_frees_the_last_tensors_before_the_next_attempt(measured, run):
    "Including those that an error's traceback held."
    alive, seen = [], []
    class Held(nn.Module):
        def __init__(self): super().__init__(); self.me = self; alive.append(1)
        def __del__(self): alive.pop()
    def _do(name, px, bs):
        seen.append(len(alive))
        held = Held()  # noqa: F841
        if bs > 1: raise torch.OutOfMemoryError('CUDA out of memory.')  # a new exception, which holds its traceback
    measured.do = _do
    run('--report', '--predict', models='resnet18')
    assert seen == [0, 0, 0]


def test_report_shows_an_error_of_the_device_while_it_frees_memory(measured, run, monkeypatch):
    def _lost(): raise RuntimeError('CUDA error')
    monkeypatch.setattr(torch.cpu, 'empty_cache', _lost, raising=False)
    assert tables(run('--report', '--predict', models='resnet18')[1])[0][2][-1] == 'RuntimeError: CUDA error'


def test_report_that_was_stopped_prints_its_rows_and_is_resumed(measured, run):
    "Ctrl-C prints the finished rows. The second run measures the rest."
    def _stop(name, px, bs):
        if len(measured) == 4: raise KeyboardInterrupt
    measured.do = _stop
    code, out, err = run('--report')
    assert 'Stopped by KeyboardInterrupt. To resume, run the same command' in code and '4 of 6 rows' in out and measured == ALL[:4]
    assert [len(t) for t in tables(out)[:3]] == [4, 3, 3]
    measured.do = lambda *args: None
    code, out, err = run('--report')
    assert code == 0 and measured == ALL and '6 of 6 rows' in out and err.count('measured before: ') == 4
    assert 'measured before: mobilenet_v2, training, 32 px, batch 4' in err


@pytest.mark.parametrize('other', [('--num-it', '2'), ('--busy',), ('--bs', '2'), ('--size', '64')], ids=' '.join)
def test_report_measures_the_rows_of_another_command_again(measured, run, monkeypatch, other):
    monkeypatch.setattr(subprocess, 'Popen', Load)
    for args in (), other: run('--report', '--predict', *args, models='resnet18')
    assert len(measured) == 2


def test_report_measures_the_rows_of_another_machine_again(measured, run, monkeypatch):
    run('--report', '--predict', models='resnet18')
    monkeypatch.setattr(platform, 'python_version', lambda: 'another one')
    run('--report', '--predict', models='resnet18')
    assert len(measured) == 2


def test_report_measures_the_row_of_a_line_that_was_cut_off_again(measured, run):
    "The next line is not damaged."
    run('--report', '--predict')
    text = FILE.read_text()
    FILE.write_text(text[:-20])
    for _ in range(2): assert run('--report', '--predict')[0] == 0 and measured == PREDICTIONS + PREDICTIONS[-1:]
    FILE.write_bytes(b'\xff\n3\n{}\n{"key": 1}' + text.encode())
    assert run('--report', '--predict')[0] == 0 and len(measured) == 3


def test_report_tries_failed_rows_again_after_the_others(measured, run):
    "A failing row may have ended the process, so it comes last."
    outcomes = iter([ValueError, None, KeyboardInterrupt])
    def _first_fails(*args):
        if outcome := next(outcomes): raise outcome
    measured.do = _first_fails
    run('--report', models='resnet18')
    measured.do = lambda *args: None
    assert run('--report', models='resnet18')[0] == 0 and measured == [ALL[1], ALL[2], ALL[0]]


def test_report_ends_when_the_device_is_lost(measured, run, monkeypatch):
    "After an error in a CUDA kernel, all other rows would fail. They are left to the next run."
    def _lost(*args, **kwargs): raise RuntimeError('CUDA error: an illegal memory access was encountered')
    with monkeypatch.context() as lost:
        def _fail(name, px, bs):
            if len(measured) == 1:
                lost.setattr(torch, 'ones', _lost)
                _lost()
        measured.do = _fail
        code, out, err = run('--report', models='resnet18')
    assert 'Stopped by RuntimeError. To resume, run the same command' in code and 'illegal memory access' in out
    assert len(FILE.read_text().split()) > 0 and measured == ALL[:1]
    measured.do = lambda *args: None
    assert run('--report', models='resnet18')[0] == 0 and measured == [ALL[0], ALL[2], ALL[1]]


def test_report_whose_file_cannot_be_written_is_an_error(measured, run):
    FILE.mkdir()
    code, out, err = run('--report')
    assert code == 2 and "channelslast-report.jsonl can't be written" in err and err.count('\n') == 1 and not measured


def test_report_of_predictions_only(measured, run):
    assert run('--report', '--predict')[0] == 0 and measured == PREDICTIONS


def test_report_of_compiled_predictions(measured, run):
    "Their rows are kept apart from those without `--compile`, and are not measured again."
    run('--report', '--predict')
    for _ in range(2):
        code, out, err = run('--report', '--predict', '--compile')
        assert code == 0 and '2 of 2 rows' in out and 'also with the model compiled' in out
        assert measured == PREDICTIONS + [('compiled predictions', *r[1:]) for r in PREDICTIONS]


@pytest.mark.parametrize('device, bs', [('cpu', {16, 1}), ('mps', {16, 1}), ('cuda', {128, 1})])
@pytest.mark.parametrize('kind', ['predictions', 'compiled predictions'])
def test_plan_gives_apple_gpus_the_sizes_of_a_cpu(device, bs, kind):
    "Only GPUs with memory of their own get 224 px in batches of 128."
    todo = plan(['training', kind], ['resnet18'], 0, 0, torch.device(device))
    assert {r[3] for r in todo if r[0] == kind} == bs
    assert todo[0] == ('training', 'resnet18', *((224, 128) if device == 'cuda' else PANEL['resnet18']))


def test_cuda_settings_are_read_whichever_way_tf32_was_set(monkeypatch):
    assert re.fullmatch(r'CUDA .*, cuDNN .*, cudnn.benchmark (True|False), fp32_precision \w+ \(convolutions\) \w+ \(matmul\)', cuda_settings())
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    assert 'cudnn.benchmark True' in cuda_settings()
    if not hasattr(torch.backends.cudnn, 'conv'): return  # PyTorch before 2.9
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    were = [o.fp32_precision for o in backends]
    try:
        for o in backends: o.fp32_precision = 'ieee'
        with pytest.raises(RuntimeError): torch.backends.cudnn.allow_tf32  # noqa: B018
        assert 'fp32_precision ieee (convolutions) ieee (matmul)' in cuda_settings()
    finally:
        for o, was in zip(backends, were): o.fp32_precision = was


@pytest.mark.cuda
def test_cuda_report_has_the_peak_memory_of_each_candidate_and_the_settings(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run('--report', '--device', 'cuda', models='squeezenet1_1')
    assert code == 0 and 'cudnn.benchmark' in out and 'error' not in out, err
    at = tables(out)[-1][0].index('MiB')
    assert all(float(c[at]) > 0 for c in tables(out)[-1][2:])


def test_issue_template_names_the_command_and_has_a_field_for_the_report():
    text = (root/'.github'/'ISSUE_TEMPLATE'/'benchmark.yml').read_text(encoding='utf-8')
    assert 'python -m tests.bench --report > report.md' in text
    try: import yaml
    except ImportError: return
    form = yaml.safe_load(text)
    assert {'name', 'description', 'body'} <= {*form}
    fields = {o['id']: o for o in form['body'] if o['type'] != 'markdown'}
    assert fields['report']['validations']['required'] and fields['report']['type'] == 'textarea'


# the columns, and the reference timing

def check_bench(run, name, video):
    code, out, err = run('--bs', '2', models=f'{name},{video}')
    assert code == 0, err
    lines = [o.split() for o in out.splitlines() if o.split()[:1] in ([name], [video])]
    assert len(lines) == 4 and out.splitlines()[0].count('PyTorch') == 1 and ('keep_memory' in out) == keep_memory(False)
    numbers = re.findall(rf'^ *{name} +32 +2 +([\d.]+) +\S.*?, \S+ +([\d.]+) +([\d.]+)× +([\d.]+)× +\d+ s +(?:quiet|noisy) +(?:–|[\d.]+×)$', out, re.M)
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
    code, out, err = run('--predict', '--bs', '0', models=','.join(names))
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


@pytest.mark.usefixtures('no_runtimes')
def test_bench_of_compiled_predictions_shows_the_best_eager_and_compiled_candidates_or_why_none_was_compiled(run, monkeypatch):
    "The compiler is replaced by the traced operations themselves."
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: real(f, fullgraph=True, dynamic=False, backend='eager'))
    use_small_models(monkeypatch, vgg11=Breaks)
    code, out, err = run('--predict', '--compile', models='resnet18,vgg11')
    assert code == 0 and 'CompilePredictions' not in out, err  # its line for each compilation would stand in the table
    compiled, refused = out.split('\n\n')[-1].splitlines()[1:3]
    ratios = re.search(r'([\d.]+)× \([^()]+fp32(?:, folded)?\) +([\d.]+)× \([^()]+, compiled\) +([\d.]+)× +\d+ s ', compiled).groups()
    eager, best, ratio = map(float, ratios)
    assert ratio == pytest.approx(best/eager, abs=0.02) and 'compile time' in out
    assert re.search(r' 4 +[\d.]+ .*fp32(?:, folded)?\) +not compiled: .* – +– ', refused)


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
    assert run('--busy', models='resnet18')[0] == 0
    assert seen == {True: {1}, False: {0}}


def test_model_time_is_that_of_the_model_and_of_converting_the_batch(clock):
    "One number per batch, without what comes before and after."
    class Model(nn.Linear):
        def forward(self, x): clock.pass_ms(5); return super().forward(x.mean((2, 3)))
    class Other(Callback):
        def before_batch(self): clock.pass_ms(1)
        def after_pred(self): clock.pass_ms(100)
    ms = []
    learner(Model(3, 4), cbs=[Other(), reference.ModelTime(ms, torch.device('cpu'))]).get_preds()
    assert ms == pytest.approx([6]*4)


@pytest.mark.parametrize('n, sets, steps', [(1, 1, 1), (3, 3, 3), (12, 6, 12), (20, 6, 24)])
def test_on_fresh_copies_times_at_least_n_steps_in_several_sets_that_keep_their_memory(monkeypatch, n, sets, steps):
    "Each set is warmed up."
    kept, ran, made = [], [], []
    monkeypatch.setattr(reference, 'keep_memory', lambda keep=True: kept.append(keep))
    def _make():
        made.append(kept[-1])
        return {'a': lambda: ran.append(1) or 1.}
    assert len(reference.on_fresh_copies(_make, n, 6)['a']) == steps and made == [True]*sets and len(ran) == steps + sets
    assert kept == [False, True]*sets + [False]


def test_set_running_statistics_to_those_of_a_batch():
    "For that batch, a batch norm then returns the same in eval mode as in training mode."
    model, x = convnet(), torch.randn(8, 3, 8, 8)*3 + 1
    reference.set_running_statistics(model, x)
    with torch.no_grad(): a, b = (model[:2].train(mode)(x) for mode in (True, False))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)  # unbiased variance


def test_background_load_ends_with_the_block_and_with_the_process_that_started_it():
    with reference.background_load() as busy: assert busy.poll() is None
    assert busy.poll() is not None
    alone = subprocess.Popen(busy.args, stdin=subprocess.PIPE)
    alone.stdin.close()  # as when this process is gone
    assert alone.wait(60) == 0


@pytest.mark.parametrize('ms, noisy', [([10., 10.2, 10.4], False), ([10., 14., 30.], True)])
def test_is_noisy_sees_steps_that_other_work_slowed_down(ms, noisy): assert reference.is_noisy(dict(a=ms, b=[2*o for o in ms])) == noisy


# wrong arguments

@pytest.mark.parametrize('args, says', [(['--compile'], '--compile: pass it only with --predict'), (['--models', 'resnt18'], 'did you mean resnet18'),
                                        (['--num-it', '0'], '--num-it 0: must be above 0'), (['--device', 'gpu'], 'not available on this machine')])
def test_a_wrong_argument_of_the_benchmark_ends_in_one_line_that_says_what_to_pass(run, args, says):
    code, out, err = run(*args)
    assert code == 2 and says in err and err.count('\n') == 1 and err.startswith('python -m tests.bench: ')


def test_help_of_the_benchmark_names_the_command_to_type(run):
    code, out, err = run('--help')
    assert code == 0 and out.startswith('usage: python -m tests.bench ') and '--report' in out
