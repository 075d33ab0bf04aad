"""`CompilePredictions('openvino')` and `('onnxruntime')`: the same predictions in all sizes, dtypes and structures, in silence. What
they share with the compiler is in test_compile_predictions.py, test_never_stale.py and test_hands_off.py."""
import ctypes
import gc
import importlib
import math
import os
import subprocess
import sys
import warnings
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, Learner, MixedPrecision, Recorder, TensorImage, load_learner
from torch import nn

from channelslast import CompilePredictions
from channelslast.core.compare import relative_error
from .helpers import Breaks, convnet, each_backend, image_folder, in_threads, learner, loaders, names_library, preds_of, truth_of

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
NAMES = dict(openvino='OpenVINO', onnxruntime='ONNX Runtime')


@pytest.fixture
def runtime(backend): return backend


def pytest_generate_tests(metafunc):
    if 'runtime' in metafunc.fixturenames: metafunc.parametrize('backend', NAMES, indirect=True)


def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def predicting(runtime, model=None, **kwargs):
    "A Learner that predicts batches, given one by one to `predict`."
    learn = learner(model or net(), loaders(n=8), cbs=CompilePredictions(runtime), **kwargs)
    learn.loss_func = lambda pred, *y: torch.zeros(())
    learn.remove_cb(Recorder)
    learn.model.eval()
    learn.training = False
    return learn


def predict(learn, *xs):
    "The Learner's output for these inputs, and True if PyTorch ran the model itself. The output must be the model's."
    with torch.no_grad():
        truth = learn.model(*xs)
        with torch.profiler.profile() as profiled:
            learn.one_batch(0, (*xs, torch.zeros(len(xs[0]))))
    assert relative_error(learn.pred, truth) < 1e-4
    return learn.pred, any('conv' in o.key or 'linear' in o.key for o in profiled.key_averages())


def is_converted(learn, *xs) -> bool: return not predict(learn, *xs)[1]


# sizes

def test_one_conversion_serves_all_sizes_after_one_comparison_each(runtime, capsys):
    learn = predicting(runtime)
    x = torch.randn(4, 3, 12, 12)
    assert not is_converted(learn, x) and is_converted(learn, x)
    for other in x[:3], x[..., :9], torch.randn(5, 3, 7, 20):
        assert not is_converted(learn, other) and is_converted(learn, other)
    assert f'Sequential converted by {NAMES[runtime]} in ' in (out := capsys.readouterr().out) and out.count('\n') == 1 and 'other sizes' in out


def test_a_batch_of_one_is_converted_apart(runtime, capsys):
    "PyTorch traces sizes of 1 apart."
    learn, x = predicting(runtime), torch.randn(4, 3, 12, 12)
    for _ in range(2): converted = [is_converted(learn, o) for o in (x, x[:1])]
    assert converted == [True, True] and capsys.readouterr().out.count('converted') == 2


class BranchOnSize(nn.Module):
    "The branch changes the output by less than a comparison could see."
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return self.net(x)*(3 if x.shape[-1] > 20 else 1)


def test_a_model_with_a_branch_on_the_size_is_right_on_both_sides(runtime):
    learn = predicting(runtime, BranchOnSize())
    small, large = torch.randn(4, 3, 12, 12), torch.randn(4, 3, 24, 24)
    for _ in range(2): converted = [is_converted(learn, o) for o in (small, large, small[:3], large[:3])]
    assert converted == [True]*4


class ManyBranches(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x):
        y = self.net(x)
        for n in range(10, 40, 4): y = y*2 if x.shape[-1] > n else y
        return y


def test_a_model_with_more_branches_than_conversions_is_right_in_all_of_them(runtime, capsys):
    learn = predicting(runtime, ManyBranches())
    sizes = [torch.randn(4, 3, 8, n) for n in range(8, 38, 4)]
    for _ in range(2): converted = [is_converted(learn, x) for x in sizes]
    assert converted[:3] == [True]*3 and not all(converted) and capsys.readouterr().out.count('converted') < 6


class OneSize(nn.Module):
    "Any number of images, of one size."
    def __init__(self): super().__init__(); self.l = nn.Linear(3*8*8, 4)
    def forward(self, x): return self.l(x.flatten(1))


def test_a_model_for_one_image_size_raises_its_own_error_for_another(runtime):
    learn, x = predicting(runtime, OneSize()), torch.randn(4, 3, 8, 8)
    for _ in range(2): converted = [is_converted(learn, o) for o in (x, x[:3])]
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'), torch.no_grad(): predict(learn, x[..., :7])
    assert converted == [True, True] and is_converted(learn, x)


# inputs and outputs

def test_outputs_of_two_batches_are_independent_and_inputs_stay(runtime):
    learn, x = predicting(runtime), torch.randn(4, 3, 8, 8)
    predict(learn, x)
    before, (first, _) = x.clone(), predict(learn, x)
    kept = first.clone()
    second, _ = predict(learn, x*2)
    assert torch.equal(first, kept) and not torch.equal(first, second) and torch.equal(x, before)
    first.zero_()  # writable
    assert is_converted(learn, x)


class Nested(nn.Module):
    "Two inputs of other dtypes, one of them not used; outputs of several dtypes in containers."
    def __init__(self): super().__init__(); self.net, self.e = net(), nn.Embedding(9, 4)
    def forward(self, image, tokens, extra=None):
        y = self.net(image.float()/255) + self.e(tokens).mean(1)
        return dict(logits=y, more=(y.argmax(1), [y > 0, None]), n=3)


def test_several_inputs_of_any_dtype_and_nested_outputs_are_equal(runtime):
    learn = predicting(runtime, Nested())
    batch = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8), torch.randint(0, 9, (4, 5)), torch.randn(4, 2)
    predict(learn, *batch)
    out, own = predict(learn, *batch)
    with torch.no_grad(): truth = learn.model(*batch)
    assert not own and [*out] == [*truth] and out['n'] == 3 and out['more'][1][1] is None
    for a, b in zip((out['logits'], out['more'][0], out['more'][1][0]), (truth['logits'], truth['more'][0], truth['more'][1][0])):
        torch.testing.assert_close(a, b)


INPUTS = {'channels last': lambda x: x.to(memory_format=torch.channels_last), 'not contiguous': lambda x: x.transpose(2, 3),
          'with a gradient': lambda x: x.clone().requires_grad_(), 'float64': lambda x: x.double()}


@pytest.mark.parametrize('kind', INPUTS)
def test_inputs_of_any_kind_are_equal(runtime, kind):
    model = net().double() if kind == 'float64' else net()
    learn, x = predicting(runtime, model), INPUTS[kind](torch.randn(4, 3, 8, 6))
    if kind == 'float64':
        with pytest.warns(UserWarning, match='float64'): predict(learn, x)
    for _ in range(2): out, own = predict(learn, x)
    assert own == (kind == 'float64') and out.dtype == x.dtype


def test_fastai_tensors_and_inference_tensors_are_converted_and_outputs_keep_their_type(runtime):
    class Convert(Callback):
        order = 100  # after fastai's callback that makes plain tensors
        def before_batch(self):
            with torch.inference_mode(): self.learn.xb = TensorImage(self.x.clone()),
    learn, x = predicting(runtime), torch.randn(4, 3, 8, 8)
    learn.add_cb(Convert())
    outs = [predict(learn, x) for _ in range(2)]
    assert [own for _, own in outs] == [True, False] and {type(out) for out, _ in outs} == {TensorImage}


def test_a_recurrent_network_is_converted(runtime):
    class Recurrent(nn.Module):
        def __init__(self): super().__init__(); self.e, self.r, self.l = nn.Embedding(9, 4), nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)
        def forward(self, x): return self.l(self.r(self.e(x))[0][:, -1])
    learn, x = predicting(runtime, Recurrent()), torch.randint(0, 9, (4, 5))
    for _ in range(2): predict(learn, x)
    assert learn.compile_predictions.compiled and is_converted(learn, x)


# what is not converted

class Random(nn.Module):
    "Noise that no comparison could tell from rounding."
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return self.net(x) + 1e-8*torch.rand(4)


@pytest.mark.parametrize('model, reason', [(Breaks, ''), (Random, 'random numbers')])
def test_a_model_that_cannot_be_converted_runs_uncompiled_with_one_short_warning(runtime, model, reason):
    learn = learner(model(), loaders(n=32), cbs=CompilePredictions(runtime))
    with pytest.warns(UserWarning, match=f'CompilePredictions: {model.__name__} stays uncompiled: .*{reason}') as w:
        for _ in range(2): assert relative_error(preds_of(learn), truth_of(learn)) < 1e-4
    told = [str(o.message) for o in w if 'CompilePredictions' in str(o.message)]
    assert len(told) == 1 and len(told[0]) < 250 and '\n' not in told[0] and not learn.compile_predictions.compiled


class ReturnsSize(nn.Module):
    "A dictionary with the number of items."
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return dict(y=self.net(x), n=len(x))


@pytest.mark.filterwarnings('ignore:.*stays uncompiled')
def test_a_model_that_returns_sizes_runs_uncompiled_and_says_so(runtime):
    learn, x = predicting(runtime, ReturnsSize()), torch.randn(2, 3, 8, 8)
    for _ in range(2): assert predict(learn, x)[0]['n'] == 2
    assert learn.compile_predictions.reason == 'it returns sizes of its input'


class Of(nn.Module):
    "`f(module, x)`, with a linear layer and an embedding at hand."
    def __init__(self, f): super().__init__(); self.f, self.linear, self.embedding = f, nn.Linear(5, 5), nn.Embedding(10, 5)
    def forward(self, x): return self.f(self, x)


def _checks_its_input(m, x):
    assert (x > -100).all()
    return m.linear(x)


def _index_in_a_buffer(m, x):
    buffer = torch.zeros(4, 5)
    buffer[:, :3].copy_(x[:, :3])
    return m.embedding(buffer.long())


FIRST_ONLY = { # a model whose conversion might be right for its first input only, this input, another one
    'a number of the input': (lambda m, x: m.linear(x)/x.abs().max().item(), torch.randn(4, 5), 7*torch.randn(4, 5)),
    'a tensor of a number of the input': (lambda m, x: x*x.new_full((5,), x.max().item()), torch.randn(4, 5), 7*torch.randn(4, 5)),
    'a number of an array': (lambda m, x: m.linear(x)/float(x.numpy().max()), torch.randn(4, 5), 7*torch.randn(4, 5)),
    'quotients of tensors': (lambda m, x: x//2, torch.rand(4, 5), -3.3*torch.rand(4, 5)),
    'quotients in place': (lambda m, x: m.linear(x).fill_(1).mul_(x).floor_divide_(2), torch.rand(4, 5), -3.3*torch.rand(4, 5)),
    'quotients of arrays': (lambda m, x: torch.from_numpy(x.numpy()//np.float32(2)), torch.rand(4, 5), -3.3*torch.rand(4, 5)),
    'powers of whole parts': (lambda m, x: m.linear((x.long()**2).float()), torch.rand(4, 5), 2e5*torch.rand(4, 5)),
    'small whole parts': (lambda m, x: m.linear((x.to(torch.int16)*2).float()), torch.rand(4, 5), 3e4*torch.rand(4, 5)),
    'a whole part as index': (lambda m, x: m.embedding(x[:, 0].long()), 9*torch.rand(4, 5), 99*torch.rand(4, 5)),
    'an index of a table': (lambda m, x: m.linear(torch.arange(5)[x].float().expand(4, 5)), torch.zeros(4, 1, dtype=torch.long), torch.full((4, 1), 7)),
    'an index in a buffer': (_index_in_a_buffer, 9*torch.rand(4, 5), 99*torch.rand(4, 5)),
    'small probabilities': (lambda m, x: nn.functional.logsigmoid(x), torch.randn(4, 5), -200*torch.rand(4, 5)),
    'quotients of whole numbers': (lambda m, x: m.linear((x//3).float()), torch.arange(20).view(4, 5), -torch.arange(20).view(4, 5)),
    'sums that wrap around': (lambda m, x: m.linear((x + 100).float()), torch.full((4, 5), 9, dtype=torch.uint8), torch.full((4, 5), 200, dtype=torch.uint8)),
    'large whole numbers': (lambda m, x: m.linear((x > 5).float()), torch.full((4, 5), 9), torch.full((4, 5), 2**32)),
    'an index too large': (lambda m, x: m.embedding(x), torch.arange(4), torch.arange(4) + 9),
    'a negative index': (lambda m, x: m.embedding(x.view(2, 2)), torch.arange(4), torch.arange(4) - 1),
    'an index of a tensor': (lambda m, x: m.linear.weight[x], torch.arange(4), torch.arange(4) + 3),
    'the last of a few': (lambda m, x: x[torch.arange(4), (x > 0).sum(1) - 1], torch.rand(4, 5), -torch.rand(4, 5)),
    'a moved index': (lambda m, x: x[:, None][torch.arange(4), :, ((x > 0).sum(1) - 1).flip(0)], torch.rand(4, 5), -torch.rand(4, 5)),
    'a reshaped index': (lambda m, x: x[torch.arange(4)[:, None], ((x > 0).sum(1) - 1).unsqueeze(1)], torch.rand(4, 5), -torch.rand(4, 5)),
    'strides': (lambda m, x: x*x.stride(1), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    'a check': (_checks_its_input, torch.randn(4, 5), torch.randn(4, 5) - 200)}


@pytest.mark.filterwarnings('ignore:.*stays uncompiled')
@pytest.mark.parametrize('name', FIRST_ONLY)
def test_other_numbers_than_those_of_the_first_input_give_the_models_output_or_error(runtime, name):
    f, first, other = FIRST_ONLY[name]
    learn = predicting(runtime, Of(f))
    for _ in range(2): predict(learn, first)
    try: learn.model(other)
    except Exception as e:
        with pytest.raises(type(e)), torch.no_grad(): learn.one_batch(0, (other, torch.zeros(len(other))))
    else: predict(learn, other)
    predict(learn, first)


def _pools(m, x):
    y = m.linear(x)[:, None]
    largest, where = nn.functional.max_pool1d(y, 2, return_indices=True)
    return largest + y.gather(2, where)


def _doubles_a_list_in_place(m, x):
    ys = [m.linear(x)]
    torch._foreach_mul_(ys, 2.)
    return ys[0]


WHOLE = { # models that compute with whole numbers which are the same in each runtime
    'tokens': (lambda m, x: m.linear(m.embedding(x[:, 0])), torch.arange(10).view(5, 2)),
    'moved tokens': (lambda m, x: m.linear(m.embedding(torch.cat([x, x.flip(0)]).flatten())), torch.arange(8).view(4, 2)),
    'bytes': (lambda m, x: m.linear(x.float()), torch.arange(20, dtype=torch.uint8).view(4, 5)),
    'indices': (lambda m, x: m.embedding(m.linear(x).argmax(1)), torch.randn(4, 5)),
    'the largest': (lambda m, x: x.gather(1, m.linear(x).topk(2)[1])*x.max(1)[0][:, None], torch.randn(4, 5)),
    'two indices': (lambda m, x: x[torch.arange(4), m.linear(x).argmax(1)], torch.randn(4, 5)),
    'indices of the largest': (lambda m, x: x[torch.arange(4)[:, None], m.linear(x).topk(2)[1]], torch.randn(4, 5)),
    'a mask': (lambda m, x: m.linear(x)*(x > 0).sum(1, keepdim=True), torch.randn(4, 5)),
    'positions of tokens': (lambda m, x: m.embedding((x != 1).int().cumsum(1)*(x != 1).int() + 1), torch.arange(20).view(4, 5)),
    'a code': (lambda m, x: nn.functional.one_hot(m.linear(x).argmax(1), 5).float(), torch.randn(4, 5)),
    'short tokens': (lambda m, x: m.embedding(x.long()), torch.arange(4, dtype=torch.int32)),
    'positions': (lambda m, x: m.linear(x) + m.embedding(torch.arange(x.shape[0]) % 3), torch.randn(4, 5)),
    'pooling': (_pools, torch.randn(4, 5)), 'none': (_doubles_a_list_in_place, torch.randn(4, 5))}


@pytest.mark.parametrize('name', WHOLE)
def test_whole_numbers_that_are_indices_are_converted(runtime, name):
    f, x = WHOLE[name]
    learn = predicting(runtime, Of(f))
    assert not is_converted(learn, x) and is_converted(learn, x)


def test_infinite_outputs_are_converted_if_the_first_ones_are_infinite(runtime):
    learn, x = predicting(runtime, Of(lambda m, x: m.linear(x).masked_fill(x < 0, -math.inf))), torch.randn(4, 5)
    assert not is_converted(learn, x) and is_converted(learn, x)


def test_sizes_that_a_model_rounds_up_are_right_for_many_sizes(runtime):
    learn = predicting(runtime, Of(lambda m, x: m.linear(x)*-(-len(x)//4)))
    for n in 4, 4, 8, 12, 16, 20, 24, 28, 32, 36, 7: predict(learn, torch.randn(n, 5))
    assert learn.compile_predictions.compiled


@each_backend()
def test_a_transformer_with_padding_predicts_as_without_the_callback(backend):
    "PyTorch's fast path, which any mode turns off, sets padded positions to zero."
    class Padded(nn.Module):
        def __init__(self): super().__init__(); self.t = nn.TransformerEncoder(nn.TransformerEncoderLayer(10, 2, 16, batch_first=True), 2)
        def forward(self, x): return self.t(x, src_key_padding_mask=x[..., 0] == 0).mean(1)
    learn, x = predicting(backend, Padded()), torch.randn(4, 7, 10)
    x[0, 4:], x[1, 5:] = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for _ in range(3): predict(learn, x)


def test_one_conversion_serves_several_threads_at_once(runtime):
    learn, xs, right = predicting(runtime), torch.randn(4, 4, 3, 8, 8), []
    for _ in range(2): predict(learn, xs[0])
    run = next(iter(learn.compile_predictions.work.runs.values()))
    with torch.no_grad(): truths = [learn.model(x) for x in xs]
    def _run(x, truth):
        for _ in range(50): right.append(relative_error(run(x), truth) <= 1e-4)
    assert in_threads(*[partial(_run, *o) for o in zip(xs, truths)]) == [] and len(right) == 200 and all(right)


@pytest.mark.parametrize('backend, missing', [('openvino', 'openvino'), ('onnxruntime', 'onnx'), ('onnxruntime', 'onnxruntime')])
def test_a_missing_package_raises_ImportError_with_the_line_that_installs_it(backend, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    install = dict(openvino='pip install openvino', onnxruntime='pip install onnx onnxruntime')[backend]
    with pytest.raises(ImportError, match=f'`{install}`'): CompilePredictions(backend)


@pytest.mark.parametrize('backend', ['OpenVINO', 'eager', None, 3, []])
def test_an_unknown_backend_raises_ValueError_that_names_those_there_are(backend):
    with pytest.raises(ValueError, match="use 'inductor', 'openvino', 'onnxruntime'"): CompilePredictions(backend)


def test_on_another_device_adding_the_callback_raises_ValueError_and_changes_nothing(runtime, gpu):
    learn, cb = gpu('cuda:1').learner(net()), CompilePredictions(runtime)
    before = [*learn.cbs], sorted(vars(learn))
    with pytest.raises(ValueError, match=f'{NAMES[runtime]} computes on the CPU only.*cuda'): learn.add_cb(cb)
    assert before == ([*learn.cbs], sorted(vars(learn))) and cb.learn is None


def test_a_model_that_moves_to_another_device_runs_uncompiled_with_a_warning(runtime, gpu):
    learn = predicting(runtime)
    learn.model.to(gpu('cuda:1').device)
    with pytest.warns(UserWarning, match=f'stays uncompiled: {NAMES[runtime]} computes on the CPU only'):
        assert not is_converted(learn, torch.randn(4, 3, 8, 8))


# precision and threads

def spy(monkeypatch, runtime, look):
    "Call `look(config)` for each conversion."
    module = importlib.import_module(runtime)
    owner, name, position = (module.Core, 'compile_model', 3) if runtime == 'openvino' else (module, 'InferenceSession', 1)
    real = getattr(owner, name)
    def _convert(*args, **kwargs):
        look(args[position])
        return real(*args, **kwargs)
    monkeypatch.setattr(owner, name, _convert)


@pytest.mark.parametrize('amp_mode', ['bf16', 'fp16', None])
def test_in_mixed_precision_outputs_have_its_dtype_and_OpenVINO_is_told_the_precision(runtime, amp_mode, has, monkeypatch):
    has('bf16', 'fp16')
    hints = []
    if runtime == 'openvino': spy(monkeypatch, runtime, lambda config: hints.append(config['INFERENCE_PRECISION_HINT']))
    learn, dtypes = learner(net(), loaders(n=16), cbs=CompilePredictions(runtime)), []
    class Dtypes(Callback):
        order = MixedPrecision.order - 1
        def after_pred(self): dtypes.append(self.pred.dtype)
    learn.add_cb(Dtypes())
    if amp_mode: learn.to_channelslast(amp_mode=amp_mode)
    for _ in range(2): assert relative_error(preds_of(learn), truth_of(learn)) < 5e-2
    assert learn.compile_predictions.compiled and hints == [{'bf16': 'bf16', 'fp16': 'f16', None: 'f32'}[amp_mode]]*(runtime == 'openvino')
    assert {*dtypes} == {{'bf16': torch.bfloat16, 'fp16': torch.float16, None: torch.float32}[amp_mode]}


def test_another_number_of_threads_converts_again_with_as_many(runtime, monkeypatch):
    used, n, learn, x = [], torch.get_num_threads(), predicting(runtime), torch.randn(4, 3, 8, 8)
    spy(monkeypatch, runtime, lambda config: used.append(config['INFERENCE_NUM_THREADS'] if runtime == 'openvino' else config.intra_op_num_threads))
    try:
        for m in n, n + 1, n:
            torch.set_num_threads(m)
            for _ in range(2): converted = is_converted(learn, x)
            assert converted
    finally: torch.set_num_threads(n)
    assert used == [n, n + 1] and not learn.compile_predictions.reason


class SignalStack(ctypes.Structure): _fields_ = [('start', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads the addresses in use from /proc')
def test_signal_handlers_have_a_stack_in_memory_in_use_after_converted_models_end_in_any_order(runtime):
    "Two `openvino.Core` that overlapped left one that was freed. SIGCHLD then overwrote semaphores of a loader's workers."
    first, second, x = predicting(runtime), predicting(runtime), torch.randn(4, 3, 8, 8)
    for learn in first, second: assert not is_converted(learn, x) and is_converted(learn, x)
    del first, learn; gc.collect()
    del second; gc.collect()
    stack = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    in_use = [tuple(int(o, 16) for o in line.split()[0].split('-')) for line in open('/proc/self/maps')]
    assert not stack.start or any(a <= stack.start < b for a, b in in_use)


# silence, files, interruptions, exports

def test_converting_prints_one_line_warns_of_nothing_and_leaves_no_file(runtime, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in 'HOME', 'TMPDIR': monkeypatch.setenv(k, str(tmp_path))
    learn = learner(net(), loaders(n=16), cbs=CompilePredictions(runtime))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(2): preds_of(learn)
    out, err = capfd.readouterr()
    assert out.count('\n') == 1 and err == '' and learn.compile_predictions.compiled
    assert [*tmp_path.rglob('*')] == []


class Bessel(nn.Module):
    "An operation that no runtime has."
    def forward(self, x): return torch.special.bessel_j0(x).mean((2, 3))


def test_a_model_that_cannot_be_converted_gives_one_warning_and_prints_nothing(runtime, capfd):
    preds_of(learner(net(), cbs=CompilePredictions(runtime)))  # a first export may leave the log on
    capfd.readouterr()
    learn = learner(nn.Sequential(nn.Conv2d(3, 4, 3), Bessel()), loaders(n=16), cbs=CompilePredictions(runtime))
    with pytest.warns(UserWarning, match='stays uncompiled: .*bessel_j0') as caught:
        for _ in range(2): preds_of(learn)
    assert len(caught) == 1 and capfd.readouterr() == ('', '')


@pytest.mark.slow
def test_importing_a_runtime_sends_no_events_and_keeps_no_file(runtime, tmp_path):
    "In a new process: the first import creates a device identifier, and sends the first event."
    code = f"""import os, sys
from tests.helpers import CompilePredictions, convnet, learner, preds_of
learn, before = learner(convnet(), cbs=CompilePredictions({runtime!r})), dict(os.environ)
preds_of(learn)
sys.exit(not learn.compile_predictions.compiled or 'openvino_telemetry' in sys.modules or before != dict(os.environ))"""
    env = dict(os.environ, HOME=str(tmp_path), TMPDIR=str(tmp_path), MPLCONFIGDIR=matplotlib.get_configdir(), XDG_CACHE_HOME=str(tmp_path))
    assert subprocess.run([sys.executable, '-c', code], env=env).returncode == 0
    assert [o for o in tmp_path.rglob('*') if o.is_file()] == []


def test_an_interruption_of_the_conversion_leaves_the_Learner_and_the_next_prediction_converts(runtime, monkeypatch):
    learn, real = learner(net(), loaders(n=16), cbs=CompilePredictions(runtime)), torch.jit.trace
    def _interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(torch.jit, 'trace', _interrupt)
    model = learn.model
    with pytest.raises(KeyboardInterrupt): preds_of(learn)
    monkeypatch.setattr(torch.jit, 'trace', real)
    assert learn.model is model and not learn.compile_predictions.compiled and not learn.compile_predictions.reason
    for _ in range(2): assert relative_error(preds_of(learn), truth_of(learn)) < 1e-4
    assert learn.compile_predictions.compiled


def test_an_export_predicts_without_the_library(runtime, tmp_path):
    dls = image_folder(tmp_path, 8)
    learn = Learner(dls, convnet(n=2), nn.CrossEntropyLoss(), path=tmp_path, cbs=CompilePredictions(runtime))
    image = dls.valid_ds.items[0]
    for _ in range(2): expected = learn.predict(image)[2]
    learn.export('e.pkl')
    assert not names_library((tmp_path/'e.pkl').read_bytes())
    torch.testing.assert_close(load_learner(tmp_path/'e.pkl').predict(image)[2], expected, rtol=1e-4, atol=1e-5)
