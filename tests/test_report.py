"`channelslast bench --report`: errors, memory, stopping and resuming, and its Markdown."
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from channelslast.__main__ import cli
from channelslast.command import bench, models as panel, report, rows
from channelslast.core import devices

root = Path(__file__).parent.parent
CPU = torch.device('cpu')


def row(name, px, bs, device=CPU, num_it=1, busy=False):
    "A row as `judge` returns it, without measuring."
    one = {'candidate': 'contiguous, fp32', 'ms': 2., '±': 0.01, 'reference ms': 1.98, 'MiB': None, 'note': ''}
    return {'model': name, 'px': px, 'batch': bs, 'pick': 'contiguous, fp32', 'pick/best': '1.00', 'speedup': '1.00×',
            'search time': '1 s', 'candidates': [one]}


def verdict(name, px, bs, *args): return {'model': name, 'px': px, 'batch': bs, 'verdict': 'Channels last holds.'}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    "Make rows without measuring. `measured` lists them as `(kind, name, px, bs)`; `measured.do(name, px, bs)` runs before each."
    class Calls(list): do = staticmethod(lambda name, px, bs: None)
    calls = Calls()
    def _fake(kind, result):
        def _row(name, px, bs, *args):
            calls.do(name, px, bs)
            calls.append((kind, name, px, bs))
            return result(name, px, bs)
        return _row
    for module in bench, report:
        monkeypatch.setattr(module, 'judge', _fake('training', row))
        monkeypatch.setattr(module, 'judge_predictions', _fake('predictions', row))
        monkeypatch.setattr(module, 'judge_compiled', _fake('compiled predictions', row))
    monkeypatch.setattr(report, 'judge_format', _fake('format_summary', verdict))
    monkeypatch.setattr(report, 'forward_pass_ms', lambda *args: 1.)
    monkeypatch.setattr(rows, 'free_memory', lambda device: None)  # a fifth of a second
    monkeypatch.setattr(bench, 'overhead', lambda device: 'overhead')
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.fixture
def run(monkeypatch, capsys):
    "Run `channelslast bench` on two models. Returns exit status or message, standard output and standard error."
    def _run(*args, models='resnet18,mobilenet_v2'):
        monkeypatch.setattr(sys, 'argv', ['channelslast', 'bench', '--models', models, '--size', '32', '--bs', '4', '--num-it', '1',
                                          '--device', 'cpu', *args])
        code = 0
        try: cli()
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return _run


ALL = [(kind, name, 32, 4) for name in ('resnet18', 'mobilenet_v2') for kind in ('training', 'predictions', 'format_summary')]


def tables(out) -> list:
    "The tables in Markdown: lists of lines, which are lists of cells. Asserts that all lines of a table have as many cells."
    parsed = [[re.split(r'(?<!\\)\|', line)[1:-1] for line in block.splitlines()] for block in re.findall(r'(?:^\|.*\|\n?)+', out, re.M)]
    for t in parsed: assert len({len(line) for line in t}) == 1 and {c.strip() for c in t[1]} == {'---'}
    return [[[c.strip() for c in line] for line in t] for t in parsed]


def test_a_small_report_in_earnest(run, monkeypatch, tmp_path):
    "As a user runs it. The second run measures nothing."
    monkeypatch.chdir(tmp_path)
    code, out, err = run('--report', models='squeezenet1_1')
    assert code == 0, err
    training, predictions, summary, candidates = tables(out)
    for t in training, predictions, summary: assert t[2][:3] == ['squeezenet1_1', '32', '4']
    assert len(training) == 3 and 'error' not in training[0] + predictions[0] and summary[2][3].startswith('Channels last ')
    assert {'contiguous, fp32', 'channels last, fp32'} <= {c[3] for c in candidates[2:]} and 'MiB' in candidates[0]
    assert out.startswith('\n- channelslast ') and 'PyTorch' in out and 'torchvision' in out and '3 of 3 rows' in out
    assert str(tmp_path/'channelslast-report.jsonl') in err and len(report.load_records(report.FILE)) == 3
    monkeypatch.setattr(report, 'measure_row', None)
    assert run('--report', models='squeezenet1_1')[:2] == (0, out)


def test_an_error_is_a_row_and_the_rest_goes_on(measured, run):
    def _fail(name, px, bs):
        if name == 'resnet18': raise ValueError('a | b\n<class c>')
    measured.do = _fail
    code, out, err = run('--report')
    assert code == 0 and measured == [r for r in ALL if r[1] != 'resnet18']
    for t in tables(out)[:3]: assert t[2][:3] == ['resnet18', '32', '4'] and t[2][-1] == r'ValueError: a \| b &lt;class c&gt;' and t[3][-1] == '–'
    assert '3 of 6 rows' in out and '1 of 1 picks' in out and '1 of 2 rows failed' in out and '3 rows failed' in err


def test_an_error_is_a_row_of_the_bench(measured, run):
    def _fail(name, px, bs):
        if name == 'resnet18': raise ValueError('no such thing')
    measured.do = _fail
    code, out, err = run()
    assert code == 0 and out.count('ValueError: no such thing') == 2 and '1 of 2 rows failed' in out and 'overhead' in out
    measured.do = lambda name, px, bs: _fail('resnet18', px, bs)
    code, out, err = run()
    assert code == 'channelslast: all rows failed' and '2 of 2 rows failed' in out and 'overhead' not in out


def test_all_rows_failed(measured, run):
    def _fail(name, px, bs): raise ValueError
    measured.do = _fail
    code, out, err = run('--report')
    assert code == 'channelslast: all rows failed' and out.count('ValueError:') == 6


def test_a_model_that_cannot_be_built(run, monkeypatch, tmp_path):
    "Its error is a row too: 33 px is not a multiple of the patch size."
    monkeypatch.chdir(tmp_path)
    code, out, err = run('--size', '33', models='vit_b_32')
    assert code == 'channelslast: all rows failed' and 'Input shape indivisible by patch size' in out


OOM = torch.OutOfMemoryError('CUDA out of memory.'), RuntimeError('MPS backend out of memory'), RuntimeError("DefaultCPUAllocator: can't allocate")


@pytest.mark.parametrize('e', OOM, ids=['cuda', 'mps', 'cpu'])
def test_a_batch_that_does_not_fit_is_halved(e):
    asked = []
    def _judge(name, px, bs, *args):
        asked.append(bs)
        if bs > 16: raise e
        return row(name, px, bs)
    r = rows.measure_row(_judge, 'a', 32, 64, CPU, 1, False)
    assert asked == [64, 32, 16] and r['batch'] == '16 (64: out of memory)' and 'error' not in r


def test_a_model_that_never_fits():
    def _judge(*args): raise OOM[0]
    assert rows.measure_row(_judge, 'a', 32, 4, CPU, 1, False) == {
        'model': 'a', 'px': 32, 'batch': '1 (4: out of memory)', 'error': 'OutOfMemoryError: CUDA out of memory.'}


@pytest.mark.parametrize('e', [ValueError('out of memory'), RuntimeError('shapes differ'), KeyError('a')])
def test_other_errors_are_not_memory(e): assert not devices.is_out_of_memory(e)


def test_the_last_tensors_are_freed_before_the_next_attempt(monkeypatch):
    "Including those that an error's traceback held. An error of `empty_cache` becomes the row's error."
    alive, seen = [], []
    class Held(nn.Module):
        def __init__(self): super().__init__(); self.me = self; alive.append(1)
        def __del__(self): alive.pop()
    def _judge(name, px, bs, *args):
        seen.append(len(alive))
        held = Held()
        if bs > 1: raise torch.OutOfMemoryError('CUDA out of memory.')  # a new exception, which holds its traceback
        return row(name, px, bs)
    rows.measure_row(_judge, 'a', 32, 4, CPU, 1, False)
    assert seen == [0, 0, 0]
    def _lost(): raise RuntimeError('CUDA error')
    monkeypatch.setattr(torch.cpu, 'empty_cache', _lost, raising=False)
    assert rows.measure_row(_judge, 'a', 32, 1, CPU, 1, False)['error'] == 'RuntimeError: CUDA error'


def test_stopped_and_resumed(measured, run):
    "Ctrl-C prints the finished rows. The second run measures the rest."
    def _stop(name, px, bs):
        if len(measured) == 4: raise KeyboardInterrupt
    measured.do = _stop
    code, out, err = run('--report')
    assert 'Stopped. To resume, run the same command' in code and '4 of 6 rows' in out and measured == ALL[:4]
    assert [len(t) for t in tables(out)] == [4, 3, 3, 5]
    measured.do = lambda *args: None
    code, out, err = run('--report')
    assert code == 0 and measured == ALL and '6 of 6 rows' in out and err.count('measured before: ') == 4
    assert 'measured before: mobilenet_v2, training, 32 px, batch 4' in err


@pytest.mark.parametrize('other', [('--num-it', '2'), ('--busy',), ('--bs', '2'), ('--size', '64')])
def test_rows_of_another_run_are_measured(measured, run, other):
    run('--report', models='resnet18')
    run('--report', *other, models='resnet18')
    assert len(measured) == 6


def test_rows_of_another_machine_are_measured(measured, run, monkeypatch):
    run('--report', models='resnet18')
    monkeypatch.setattr(bench, 'versions', lambda device: 'another machine')
    run('--report', models='resnet18')
    assert len(measured) == 6


def test_a_line_that_was_cut_off(measured, run):
    "Its row is measured again, and the next line is not damaged."
    run('--report')
    text = report.FILE.read_text()
    report.FILE.write_text(text[:-20])
    assert run('--report')[0] == 0 and measured == ALL + ALL[-1:]
    assert run('--report')[0] == 0 and measured == ALL + ALL[-1:]
    report.FILE.write_bytes(b'\xff\n3\n{}\n{"key": 1}' + text.encode())
    assert run('--report')[0] == 0 and len(measured) == 7


def test_what_failed_is_tried_again_after_the_others(measured, run):
    "A failing row may have ended the process, so it comes last."
    outcomes = iter([ValueError, None, KeyboardInterrupt])
    def _first_fails(*args):
        if outcome := next(outcomes): raise outcome
    measured.do = _first_fails
    run('--report')
    measured.do = lambda *args: None
    assert run('--report')[0] == 0 and measured == [*ALL[1:], ALL[0]]


def test_a_lost_device_ends_the_run(measured, run, monkeypatch):
    "After an error in a CUDA kernel, all other rows would fail. They are left to the next run."
    def _fail(name, px, bs):
        if len(measured) == 1: raise RuntimeError('CUDA error: an illegal memory access was encountered')
    measured.do = _fail
    monkeypatch.setattr(report, 'is_usable', lambda device: False)
    code, out, err = run('--report')
    assert 'unusable in this process. To resume, run the same command' in code and 'illegal memory access' in out
    assert len(report.load_records(report.FILE)) == 2
    measured.do = lambda *args: None
    assert run('--report')[0] == 0 and measured == [ALL[0], *ALL[2:], ALL[1]]


def test_is_the_device_lost(): assert report.is_usable(CPU) and not report.is_usable(torch.device('cuda:99'))


def test_the_file_must_be_writable(measured, run):
    report.FILE.mkdir()
    code, out, err = run('--report')
    assert code == 2 and "channelslast-report.jsonl can't be written" in err and err.count('\n') == 1 and not measured


def test_how_long_it_takes():
    "Estimated from each model's forward pass and the finished rows of the same kind, except failed ones; before the first one, from a CPU's."
    def _record(seconds, ms, **row): return dict(seconds=seconds, forward_pass_ms=ms, row=row)
    todo = [('training', 'b', 8, 4), ('predictions', 'b', 8, 4), ('training', 'c', 8, 4)]
    forward = {('b', 8, 4): 20., ('c', 8, 4): None}
    done = {('training', 'a', 8, 4): _record(30., 10.), ('training', 'd', 8, 4): _record(1., 10., error='it')}
    rate = report.SECONDS['predictions']
    assert [report.seconds_left(todo, done, forward, halves) for halves in (0, 2)] == [60 + 20*rate, 60 + 4*20*rate]  # none yet
    done['predictions', 'a', 8, 4] = _record(5., 10.)
    assert report.seconds_left(todo, done, forward, 2) == 60 + 10
    assert [report.duration(s) for s in (9.6, 600.)] == ['10 s', '10 minutes']


def test_a_forward_pass_says_how_heavy_a_model_is(monkeypatch):
    assert report.forward_pass_ms('squeezenet1_1', 32, 2, CPU) > 0 and report.forward_pass_ms('squeezenet1_1', 1, 2, CPU) is None


def test_predictions_only(measured, run):
    assert run('--report', '--predict')[0] == 0 and measured == [r for r in ALL if r[0] == 'predictions']


def test_compiled_predictions(measured, run):
    "Their rows are kept apart from those without `--compile`, and are not measured again."
    run('--report', '--predict')
    for _ in range(2):
        code, out, err = run('--report', '--predict', '--compile')
        assert code == 0 and '2 of 2 rows' in out and 'also with the model compiled' in out
        assert measured == [(kind, *r[1:]) for kind in ('predictions', 'compiled predictions') for r in ALL if r[0] == 'predictions']
    run('--predict', '--compile', '--bs', '0')
    assert [r[0::3] for r in measured[4:]] == [('compiled predictions', bs) for bs in (16, 1)]*2


@pytest.mark.parametrize('device, bs', [('cpu', {16, 1}), ('mps', {16, 1}), ('cuda', {128, 1})])
def test_apple_gpus_get_a_cpus_sizes(device, bs):
    "Only GPUs with memory of their own get 224 px in batches of 128."
    todo = rows.plan(['training', 'predictions'], ['resnet18'], 0, 0, torch.device(device))
    assert {r[3] for r in todo if r[0] == 'predictions'} == bs
    assert todo[0] == ('training', 'resnet18', *((224, 128) if device == 'cuda' else panel.PANEL['resnet18']))


def test_settings_of_cuda(monkeypatch):
    "They are read without an error, whichever way TF32 was set."
    assert re.fullmatch(r'CUDA .*, cuDNN .*, cudnn.benchmark (True|False), fp32_precision \w+ \(convolutions\) \w+ \(matmul\)', panel.cuda_settings())
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    assert 'cudnn.benchmark True' in panel.cuda_settings()
    if not hasattr(torch.backends.cudnn, 'conv'): return  # PyTorch before 2.9
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    were = [o.fp32_precision for o in backends]
    try:
        for o in backends: o.fp32_precision = 'ieee'
        with pytest.raises(RuntimeError): torch.backends.cudnn.allow_tf32
        assert 'fp32_precision ieee (convolutions) ieee (matmul)' in panel.cuda_settings()
    finally:
        for o, was in zip(backends, were): o.fp32_precision = was


@pytest.mark.cuda
def test_on_cuda(run, monkeypatch, tmp_path):
    "The report has the peak memory of each candidate, and the settings."
    monkeypatch.chdir(tmp_path)
    code, out, err = run('--report', '--device', 'cuda', models='squeezenet1_1')
    assert code == 0 and 'cudnn.benchmark' in out and 'error' not in out, err
    at = tables(out)[-1][0].index('MiB')
    assert all(float(c[at]) > 0 for c in tables(out)[-1][2:])


def test_the_issue_template():
    "It names the command and has a field for the report."
    text = (root/'.github'/'ISSUE_TEMPLATE'/'benchmark.yml').read_text(encoding='utf-8')
    assert 'channelslast bench --report > report.md' in text
    try: import yaml
    except ImportError: return
    form = yaml.safe_load(text)
    assert {'name', 'description', 'body'} <= {*form}
    fields = {o['id']: o for o in form['body'] if o['type'] != 'markdown'}
    assert fields['report']['validations']['required'] and fields['report']['type'] == 'textarea'
