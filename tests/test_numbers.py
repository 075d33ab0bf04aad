"Candidates' numbers compared with contiguous fp32: wrong kernels are found, right ones pass."
import pytest
import torch
import torchvision
from fastai.vision.all import SGD, AccumMetric, DataLoader, DataLoaders, Learner, accuracy
from torch import nn

from channelslast.core.memory_format import format_strides
from channelslast.find import numbers
from .helpers import SumsInFp32, convnet, difference, find, learner, loaders, rows_of, values_of


@pytest.fixture(autouse=True)
def equal_times(fake_steps):
    "All steps take equally long: otherwise a CPU that emulates bf16 slowly would drop it before its numbers are compared."
    fake_steps({})


def checked(learn, **kwargs) -> dict:
    "The rows of a short `format_find`, by their settings."
    return rows_of(find(learn, num_it=1, optimizer=False, **kwargs))


class Spoil(torch.autograd.Function):
    "The identity with a changed gradient."
    @staticmethod
    def forward(ctx, x, f): ctx.f = f; return x.clone()
    @staticmethod
    def backward(ctx, g): return ctx.f(g), None


def one_row(g):
    "One output channel gets the gradient of its neighbor."
    g, i = g.clone(), g.flatten(1).norm(dim=1).argmax()
    g[i] = g[i - 1] if len(g) > 1 else -g[i]
    return g

def garbage(by):
    def _garbage(g):
        g = g.clone()
        g[:1] = g.norm()/g.numel()**0.5*by
        return g
    return _garbage

GRADIENTS = dict(zero=torch.zeros_like, doubled=lambda g: 2*g, half=lambda g: g/2, negative=lambda g: -g, row=one_row, flipped=lambda g: g.flip(0, -1),
                 garbage=garbage(1), much=garbage(1e6), nan=garbage(float('nan')))
RESULTS = dict(zero_result=lambda y: y*0, doubled_result=lambda y: 2*y, flipped_result=lambda y: y.flip(1), nan_result=lambda y: y*float('nan'),
               channel_result=lambda y: torch.cat([y[:, :1]*3 + y.std(), y[:, 1:]], 1))


def spoil(conv, how, when):
    "Make a convolution compute wrong results or weight gradients if `when(conv)`."
    real = conv._conv_forward
    def _conv_forward(x, weight, bias):
        if not when(conv): return real(x, weight, bias)
        if how == 'detached': return real(x, weight.detach(), bias)
        if how in RESULTS: return RESULTS[how](real(x, weight, bias))
        return real(x, Spoil.apply(weight, GRADIENTS[how]), bias)
    conv._conv_forward = _conv_forward


def in_half(m): return torch.is_autocast_enabled('cpu')
def in_last(m): return m.weight.stride() == format_strides(m.weight.shape)


def images(model, size=None, n=8):
    "A Learner that trains on random images; small ones for models without many strides."
    size = size or (32 if isinstance(model, (torchvision.models.ResNet, torchvision.models.MobileNetV2)) else 12)
    x, y = torch.randn(n, 3, size, size), torch.randint(0, 10, (n,))
    dl = DataLoader(list(zip(x, y)), bs=n)
    return Learner(DataLoaders(dl, dl), model, nn.CrossEntropyLoss(), opt_func=SGD)


class Residual(nn.Module):
    "Three convolutions, one of them in a branch that hardly affects the loss."
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    def forward(self, x):
        x = self.one(x)
        return self.head(self.three(x + 0.1*self.two(x.relu())))


def wide(): return nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


MODELS = dict(residual=Residual, wide=wide, resnet18=lambda: torchvision.models.resnet18(num_classes=10),
              mobilenet_v2=lambda: torchvision.models.mobilenet_v2(num_classes=10, dropout=0.))


def convs_of(model): return [m for m in model.modules() if isinstance(m, nn.Conv2d)]

# not `channel_result` in the branch: it changes the loss and later results by less than rounding in bf16
CASES = [('residual', i, how) for i in range(3) for how in [*GRADIENTS, *RESULTS, 'detached'] if (i, how) != (1, 'channel_result')]
CASES.append(('wide', 0, 'garbage'))  # one of 256 channels
DEEP = [('resnet18', 1, 'zero'), ('resnet18', 1, 'row'), ('resnet18', 10, 'doubled'), ('resnet18', 10, 'channel_result'), ('resnet18', 19, 'flipped'),
        ('mobilenet_v2', 1, 'zero'), ('mobilenet_v2', 1, 'row'), ('mobilenet_v2', 25, 'doubled'), ('mobilenet_v2', 25, 'much'),
        ('mobilenet_v2', 51, 'detached'), ('mobilenet_v2', 51, 'flipped')]
WHEN = dict(in_half=(in_half, 'contiguous, bf16', dict(precisions='bf16', formats='contiguous')),
            in_last=(in_last, 'channels last, fp32', dict(precisions='fp32')))
# each fault in one format or precision, and some in the middle layer, whose branch hardly affects the loss, in both
FAST = [(*o, [*WHEN][(j + o[1]) % 2]) for j, o in enumerate(CASES) if o[1] == j % 3] + [
    ('wide', 0, 'garbage', 'in_half')] + [('residual', 1, how, when) for how in ('zero', 'row', 'half', 'detached', 'doubled_result') for when in WHEN]


@pytest.mark.parametrize('name, i, how, when', [pytest.param(*o, when, marks=() if (*o, when) in FAST else pytest.mark.slow)
                                                for o in CASES + DEEP for when in WHEN])
def test_a_candidate_with_a_wrong_kernel_is_refused(has, name, i, how, when):
    condition, setting, kwargs = WHEN[when]
    has('bf16')
    learn = images(MODELS[name]())
    spoil(convs_of(learn.model)[i], how, condition)
    rows = checked(learn, **kwargs)
    r = rows.pop(setting)
    assert not r.valid and r.ms is None and ('finite' in r.note or 'numbers differ' in r.note), r
    assert all(o.valid for o in rows.values())


@pytest.mark.parametrize('name', [pytest.param(o, marks=pytest.mark.slow if o in ('resnet18', 'mobilenet_v2') else ()) for o in MODELS])
def test_candidates_with_right_kernels_are_valid(has, name):
    "Even where rounding is amplified: the differences are explained by replay; a constant would have to be too large."
    has('bf16')
    for r in checked(images(MODELS[name]())).values(): assert r.valid, r


class TrainsWrongly(nn.BatchNorm2d):
    "A kernel of the training mode that is wrong in channels last."
    def __init__(self, how): super().__init__(8); self.how = how
    def forward(self, x):
        if not self.training or x.is_contiguous(): return super().forward(x)
        if self.how == 'values': return super().forward(x).roll(1, 1)
        if self.how == 'no mean': return nn.functional.batch_norm(x, torch.zeros(8), torch.ones(8), self.weight, self.bias)
        y = super().forward(Spoil.apply(x, GRADIENTS['doubled']) if self.how == 'gradient' else x)
        if self.how == 'gradient': return y
        (self.running_var if self.how == 'variance' else self.running_mean).data.add_(0.5)
        return y


@pytest.mark.parametrize('how, note', [('values', 'result of '), ('no mean', 'result of 1'), ('gradient', 'gradient of 0.weight'),
                                       ('variance', 'running statistics of 1'), ('mean', 'running statistics of 1')])
def test_kernels_and_statistics_of_the_training_mode_are_compared(has, how, note):
    has('bf16')
    rows = checked(learner(nn.Sequential(nn.Conv2d(3, 8, 3), TrainsWrongly(how), nn.ReLU(), nn.Conv2d(8, 8, 3), convnet(8))))
    assert all(r.valid == (not r.setting.is_channels_last) for r in rows.values())
    assert all(note in r.note for r in rows.values() if not r.valid)


class OwnNorm(nn.Module):
    "A batch norm that is none of PyTorch's. In training mode it is wrong in channels last."
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(8)); self.register_buffer('var', torch.ones(8))
    def forward(self, x):
        y = nn.functional.batch_norm(x, self.mean, self.var, training=self.training)
        return y.roll(1, 1) if self.training and not x.is_contiguous() else y


def test_the_training_mode_of_other_norms_is_compared():
    r = checked(learner(nn.Sequential(nn.Conv2d(3, 8, 3), OwnNorm(), nn.ReLU(), nn.Conv2d(8, 8, 3), convnet(8))))['channels last, fp32']
    assert not r.valid and 'result of 3' in r.note


class Pooled(nn.Module):
    "As in DeepLab: the average of all positions passes a convolution and a batch norm, and is added to the positions."
    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1)
        self.conv, self.norm, self.head = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), convnet(8)
    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.norm(self.conv(self.pool(x))))


@pytest.mark.parametrize('how', ['zero', 'row', None])
def test_a_wrong_gradient_before_a_norm_of_few_values_is_found(has, how):
    "Rounding of its statistics must not be overestimated."
    has('bf16')
    learn = learner(Pooled(), loaders((3, 32, 32)))
    if how: spoil(learn.model.conv, how, in_half)
    r = checked(learn, formats='contiguous')['contiguous, bf16']
    assert r.valid == (not how) and (not how or 'gradient of conv.weight' in r.note)


class ZeroGamma(nn.Module):
    "A branch whose last scale starts at zero, so that all its gradients are zero."
    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.gamma, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.zeros(1)), convnet(8)
    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.gamma*self.branch(x))


def test_a_gradient_that_should_be_zero_is_found():
    learn = learner(ZeroGamma())
    conv = learn.model.branch
    real = conv._conv_forward
    def _conv_forward(x, weight, bias): return real(x, Spoil.apply(weight, lambda g: g + 1e-3) if in_last(conv) else weight, bias)
    conv._conv_forward = _conv_forward
    assert checked(learn)['channels last, fp32'].note == 'numbers differ from contiguous fp32 (gradient of branch.weight)'


def biased(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), convnet(8))
def biased_head():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


@pytest.mark.parametrize('model', [biased, biased_head])
@pytest.mark.parametrize('half', ['bf16', 'fp16'])
def test_biases_before_a_batch_norm_are_no_fault(has, model, half):
    "Their gradients are rounding errors alone."
    has(half)
    for r in checked(learner(model())).values(): assert r.valid, r


def test_scales_before_a_batch_norm_are_no_fault(has):
    "Of depthwise 1×1 convolutions: the batch norm divides by the standard deviation, so their gradients are small sums of large numbers."
    has('bf16')
    def _scale(): return nn.Sequential(nn.Conv2d(64, 64, 1, groups=64, bias=False), nn.BatchNorm2d(64))
    for seed in 3, 4, 6:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), _scale(), nn.GELU(), _scale(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))
        with SumsInFp32(): rows = checked(learner(model, loaders((3, 16, 16))))
        for r in rows.values(): assert r.valid, r


def test_a_whole_batch_is_compared_if_its_first_items_have_no_labels():
    "These alone give no finite loss."
    x, y = torch.randn(16, 3, 12, 12), torch.randint(0, 4, (16, 12, 12))
    y[:4] = 255
    dl = DataLoader(list(zip(x, y)), bs=8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    for r in checked(Learner(DataLoaders(dl, dl), net, nn.CrossEntropyLoss(ignore_index=255))).values(): assert r.valid, r


class Random(nn.Module):
    "Drops and adds random numbers in training mode, in the order of memory, by functions."
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Sequential(nn.Conv2d(8, 8, 3), convnet(8))
    def forward(self, x):
        x = nn.functional.dropout(self.body(x), 0.5, self.training)
        return self.head(x*(1 + torch.rand_like(x)) if self.training else x)


def test_random_numbers_of_the_training_mode_are_no_fault(has):
    has('bf16')
    for r in checked(learner(Random())).values(): assert r.valid, r


DRAWS = {
    'dropout': lambda x: nn.functional.dropout(x, 0.5), 'fused dropout': lambda x: torch.native_dropout(x, 0.5, True)[0],
    'alpha dropout': lambda x: nn.functional.alpha_dropout(x, 0.5, training=True), 'noise': lambda x: x + torch.randn_like(x),
    'uniform': lambda x: x*torch.empty_like(x).uniform_(), 'choice': lambda x: x*torch.randint_like(x, 2)}


class Draws(nn.Module):
    "Draws random numbers for its activations, in each mode."
    def __init__(self, draw):
        super().__init__()
        self.body, self.draw, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), draw, convnet(8)
    def forward(self, x): return self.head(self.draw(self.body(x)))


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', [*DRAWS])
def test_random_numbers_of_each_mode_are_no_fault(has, name, train):
    has('bf16')
    for r in checked(learner(Draws(DRAWS[name])), train=train).values(): assert r.valid or r.folded, r


@pytest.mark.parametrize('train', [True, False])
def test_a_wrong_result_after_random_numbers_is_a_fault(has, train):
    has('bf16')
    model = Draws(DRAWS['dropout'])
    spoil(convs_of(model)[1], 'doubled_result', in_last)
    for k, r in checked(learner(model), train=train).items(): assert r.valid == ('contiguous' in k) or r.folded, r


class WrongPool(nn.Module):
    "Adds 10% to a pooled result in channels last, before an operation that might draw random numbers from it."
    def __init__(self, f): super().__init__(); self.body, self.f, self.head = nn.Conv2d(3, 8, 3), f, nn.Linear(8, 4)
    def forward(self, x):
        pooled = self.body(x).mean((2, 3))
        return self.head(self.f(pooled*(1.1 if in_last(self.body) else 1)))


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('f', [nn.RReLU().eval(), lambda x: torch.native_dropout(x, 0.1, True)[0], lambda x: torch.normal(x, 1e-3)])
def test_inputs_of_operations_that_draw_random_numbers_are_compared(f, train):
    rows = checked(learner(WrongPool(f)), train=train)
    assert rows['contiguous, fp32'].valid and not rows['channels last, fp32'].valid


def test_small_errors_in_each_layer_are_a_fault_of_predictions():
    "Each one is as small as rounding may be, and they add up."
    layers = [nn.Sequential(nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False), nn.ReLU()) for i in range(6)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False))
    for m in convs_of(model):
        m._conv_forward = lambda x, w, b, m=m, real=m._conv_forward: real(x, w, b)*(1.009 if in_last(m) else 1)
    rows = checked(learner(model), train=False)
    assert rows['contiguous, fp32'].valid and not rows['channels last, fp32'].valid


class SparseSum(nn.Module):
    def __init__(self): super().__init__(); self.net, self.weight = convnet(), nn.Parameter(torch.eye(4))
    def forward(self, x):
        mix = torch.eye(4).to_sparse() + torch.ones(4, 4).to_sparse()
        return torch.sparse.mm(mix, (self.net(x).float() @ self.weight).T).T


@pytest.mark.parametrize('train', [True, False])
def test_sums_of_sparse_tensors_are_no_fault(train):
    for r in checked(learner(SparseSum()), train=train).values(): assert r.valid, r


class Tiny(nn.Module):
    "A branch whose weights, or whose results, are so small that they have few digits in fp16."
    def __init__(self, scale, weight):
        super().__init__()
        self.body, self.branch, self.head, self.scale = nn.Conv2d(3, 8, 3), nn.Linear(8, 8, bias=False), convnet(8), scale
        with torch.no_grad(): self.branch.weight.mul_(weight)
    def forward(self, x):
        x = self.body(x)
        return self.head(x + self.branch(self.scale*x.mean((2, 3)))[:, :, None, None])


@pytest.mark.parametrize('scale, weight', [(1., 1e-6), (1e-4, 1e-3)])
def test_small_numbers_have_few_digits_in_fp16(has, scale, weight):
    has('fp16')
    for train in True, False:
        for r in checked(learner(Tiny(scale, weight)), train=train).values(): assert r.valid, r


class OtherOperations(nn.Module):
    "A linear layer that adds its bias apart in contiguous, and computes a wrong result in channels last."
    def __init__(self): super().__init__(); self.body, self.linear, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), convnet(8)
    def forward(self, x):
        x = self.body(x).movedim(1, -1)
        wrong = x.is_contiguous() and in_last(self.body)
        return self.head(nn.functional.linear(x, self.linear.weight*(1.5 if wrong else 1), self.linear.bias).movedim(-1, 1))


def test_results_of_a_linear_layer_are_compared_if_one_of_the_formats_adds_the_bias_apart():
    rows = checked(learner(OtherOperations()))
    assert rows['contiguous, fp32'].valid and '(result of linear)' in rows['channels last, fp32'].note


class AnyItems(nn.Module):
    "Takes whole batches only."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x):
        assert len(x) == 8
        return self.net(x)


class Clamps(nn.BatchNorm2d):
    "Changes its running statistics in a way of its own."
    def forward(self, x):
        y = super().forward(x)
        self.running_var.data.clamp_(min=10.)
        return y


def nearly_equal(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 256, 1), nn.Sigmoid(),
                                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 4))
def constant():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), convnet(8))
    nn.init.zeros_(model[1].weight)
    return model
def clamped(): return nn.Sequential(nn.Conv2d(3, 8, 3), Clamps(8), convnet(8))


@pytest.mark.parametrize('half', ['bf16', 'fp16'])
@pytest.mark.parametrize('model', [AnyItems, nearly_equal, constant, clamped])
def test_right_statistics_are_accepted(has, model, half):
    "Of a batch that can't be divided, of hardly any variance, of none, of a module that changes them."
    has(half)
    for r in checked(learner(model())).values(): assert r.valid, r


class Cancels(nn.Module):
    """Rounding is amplified: `difference` subtracts nearly equal channels, and the layer norm cancels `shift`, whose
    gradient is nothing but rounding errors."""
    def __init__(self):
        super().__init__()
        self.conv, self.difference = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=4, bias=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)
        self.shift = nn.Parameter(torch.zeros(1))
        with torch.no_grad(): self.difference.weight.copy_(torch.tensor([1., -1.]).repeat(8, 1)[..., None, None])
    def forward(self, x):
        x = self.conv(x)
        return self.head(self.norm((x + 0.1*self.difference((1e-3*x).exp())).mean((2, 3)) + self.shift))


@pytest.mark.parametrize('how', [None, 'flipped_result', 'zero'])
def test_amplified_rounding_is_no_fault_but_a_wrong_kernel_next_to_it_is(has, how):
    has('bf16')
    learn = images(Cancels(), 8)
    if how: spoil(learn.model.conv, how, in_half)
    for name, r in checked(learn, **dict(formats='contiguous') if how else {}).items(): assert r.valid == ('fp32' in name or not how), r


def test_the_note_names_the_layer_with_the_wrong_kernel(has):
    has('bf16')
    learn = images(Residual())
    spoil(learn.model.two, 'zero', in_half)
    assert checked(learn, formats='contiguous')['contiguous, bf16'].note == 'numbers differ from contiguous fp32 (gradient of two.weight)'
    spoil(learn.model.three, 'doubled_result', in_half)
    assert checked(learn, formats='contiguous')['contiguous, bf16'].note == 'numbers differ from contiguous fp32 (result of head.2)'


class Uses(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)


def body(f, *more): return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Uses(f), *more)
def pooled(f): return body(f, nn.Linear(16, 10))
def gated(x): return (x*torch.bernoulli((8*x).sigmoid().detach())).mean((2, 3))
def certain(): return body(lambda x: torch.where(x.mean((2, 3)) > 0.4, 0.9999, 1e-4) + 1e-9*x.mean((2, 3)))
DOMAINS = dict(amax=lambda: pooled(lambda x: x.amax((2, 3))), amin=lambda: pooled(lambda x: x.neg().amin((2, 3))),
               whole=lambda: body(lambda x: x.mean((2, 3))/x.max(), nn.Linear(16, 10)),
               median=lambda: pooled(lambda x: x.mean((2, 3)) - x.median()), bernoulli=lambda: pooled(gated), probability=certain)


@pytest.mark.parametrize('name', DOMAINS)
def test_rounding_errors_stay_within_what_an_operation_takes_and_find_its_maximum(has, monkeypatch, name):
    "A maximum that is not among the numbers has the gradient 0/0, and a probability above 1 raises."
    has('bf16')
    monkeypatch.setitem(numbers.TOLERANCE, 'bf16', numbers.TOLERANCE['bf16']._replace(vector=1e-6))  # all need an explanation
    learn = images(DOMAINS[name]())
    if name == 'probability': learn.loss_func = lambda p, y: nn.functional.binary_cross_entropy(p.float(), (p > 0.5).float())
    for r in checked(learn).values(): assert r.valid, r


def test_a_model_that_refuses_rounding_errors_is_refused_with_its_reason(has, monkeypatch):
    "Its own check, not a fault of bf16, ends the pass."
    has('bf16')
    monkeypatch.setitem(numbers.TOLERANCE, 'bf16', numbers.TOLERANCE['bf16']._replace(vector=1e-6))
    learn = images(convnet(n=10))
    def _loss(p, y):  # compiling anything in this process turns the default `validate_args` off
        return -torch.distributions.Categorical(probs=p.float().softmax(1), validate_args=True).log_prob(y).mean()
    learn.loss_func = _loss
    note = checked(learn, formats='contiguous')['contiguous, bf16'].note
    assert 'numbers differ from contiguous fp32 (gradient of' in note and '; with rounding errors, the model fails: ValueError' in note


# gradients of any kind

class Waves(nn.Module):
    "A convolution, then a product in the frequency domain with complex weights."
    def __init__(self, wrong=False):
        super().__init__()
        self.conv, self.head, self.wrong = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), wrong
        self.weight = nn.Parameter(torch.randn(8, 6, 4, dtype=torch.complex64))
    def forward(self, x):
        x = self.conv(x)
        w = Spoil.apply(self.weight, lambda g: g.real + 0j) if self.wrong and in_last(self.conv) else self.weight
        return self.head(torch.fft.irfft2(torch.fft.rfft2(x)*w).relu().mean((2, 3)))


@pytest.mark.parametrize('wrong', [False, True])
def test_complex_gradients_are_compared_with_their_imaginary_part(wrong):
    r = checked(images(Waves(wrong), 8))['channels last, fp32']
    assert r.valid != wrong and (r.grad_diff > 0.01) == wrong
    if wrong: assert 'gradient of weight' in r.note


class Unused(nn.Module):
    "One layer without a gradient in any format, and one whose gradient is zero."
    def __init__(self):
        super().__init__()
        self.net, self.unused, self.dead = convnet(), nn.Linear(3, 3), nn.Linear(3, 3)
    def forward(self, x): return self.net(x) + 0*self.dead(x.mean((2, 3))).sum()


def test_layers_without_gradients_are_compared(has):
    has('bf16')
    assert all(r.valid for r in checked(learner(Unused())).values())


class KeepsGraph(nn.Module):
    "Keeps a result of its parameters with its graph in eval mode, as LeViT does."
    def __init__(self):
        super().__init__()
        self.net, self.bias, self.cache = convnet(), nn.Parameter(torch.zeros(4)), {}
    def forward(self, x):
        if self.training: return self.net(x) + self.bias.exp()
        if 'bias' not in self.cache: self.cache['bias'] = self.bias.exp()
        return self.net(x) + self.cache['bias']


def test_a_model_that_keeps_results_with_their_graph_is_compared(has):
    has('bf16')
    learn = learner(KeepsGraph())
    assert all(r.valid for r in checked(learn).values()) and not learn.model.cache


# not finite

class InfiniteGradient(nn.Module):
    "A finite loss with infinite gradients in bf16."
    def forward(self, x): return Spoil.apply(x, lambda g: g*float('inf')) if x.dtype == torch.bfloat16 else x


class BadStatistics(nn.Module):
    "A buffer becomes NaN in bf16."
    def __init__(self):
        super().__init__()
        self.register_buffer('seen', torch.zeros(3))
        self.register_buffer('mask', torch.full((3,), -float('inf')))
    def forward(self, x):
        if x.dtype == torch.bfloat16 and self.training: self.seen += float('nan')
        return x


def head(*layers, c=8): return nn.Sequential(nn.Conv2d(3, c, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4))


@pytest.mark.parametrize('bad, fitted, note', [(InfiniteGradient, False, 'gradient of 0.weight is not finite'),
                                               (InfiniteGradient, True, 'gradient of 0.weight is not finite'), (BadStatistics, False, '1.seen is not finite')])
def test_infinity_in_one_candidate_does_not_reach_the_next_ones(has, bad, fitted, note):
    "A step at learning rate 0 turns the weights into NaN: 0·inf."
    has('bf16')
    learn = learner(head(bad(), nn.Conv2d(8, 8, 3), nn.ReLU()))
    if fitted: learn.fit(1)
    rows = checked(learn)
    for name, r in rows.items():  # contiguous bf16 runs before channels last in fp32
        if 'bf16' in name: assert note in r.note and not r.valid
        else: assert r.valid and r.ms and not r.note
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_infinity_in_the_last_candidates_first_step_does_not_reach_the_later_steps_of_others(has):
    "All candidates in fp32 keep their batch norms' running statistics, which each training step moves on."
    has('bf16')
    class Watch(nn.BatchNorm2d):
        def forward(self, x):
            seen.append((self.training, x.dtype, self.running_mean.clone()))
            return super().forward(x)
    seen = []
    find(learner(head(Watch(8), InfiniteGradient())), num_it=4)
    means = [m for training, dtype, m in seen if training and dtype == torch.float32]
    assert len(means) > 6 and all(not torch.equal(a, b) for a, b in zip(means[-4:], means[-3:]))


def test_what_a_failing_optimizer_left_does_not_reach_the_other_candidates():
    "Its step raises after it has changed the weights."
    class Bad(SGD(nn.Linear(1, 1).parameters(), lr=0.).__class__):
        def step(self, closure=None):
            convs = [p for pg in self.param_lists for p in pg if p.dim() == 4 and p.stride(1) == 1 and min(p.shape) > 1]
            for p in convs: p.data.fill_(float('nan'))
            if convs: raise RuntimeError('no channels last here')
    learn = learner(opt_func=lambda params, **kw: Bad(params, [], lr=0.))
    t = find(learn, num_it=1)
    assert t.rows[0].valid and 'no channels last' in t.rows[1].note and all(p.isfinite().all() for p in learn.model.parameters())


class Skips(nn.Module):
    "Gradients that overflow in fp16 at the scaler's initial scale, so that it skips the first steps."
    def forward(self, x): return Spoil.apply(x, lambda g: g*(float('inf') if g.abs().max() > 1e3 else 1)) if torch.is_autocast_enabled('cpu') else x


def test_steps_that_the_scaler_skips_are_no_fault(has):
    has('fp16')
    t = find(learner(head(Skips())), num_it=2, precisions='fp16')
    assert all(r.valid for r in t.rows), t


def test_a_buffer_that_holds_infinity_from_the_start_is_no_fault():
    "As an attention mask does."
    class Masked(nn.Module):
        def __init__(self): super().__init__(); self.net = convnet(); self.register_buffer('mask', torch.full((4,), -float('inf')))
        def forward(self, x): return self.net(x)
    assert all(r.valid for r in checked(learner(Masked())).values())


# metrics

def viewed(p, y): return (p.view(len(p), -1).argmax(1) >= 0).float().mean()
def broken(p, y): raise KeyError('always')


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
    def forward(self, x): return self.conv(x)


def maps(): return DataLoaders(*[DataLoader([(torch.randn(3, 8, 8), torch.randint(0, 4, (8, 8))) for _ in range(16)], bs=8)]*2)


@pytest.mark.parametrize('train', [True, False])
def test_a_candidate_in_which_a_metric_fails_is_refused(train):
    "A metric that fails in contiguous fp32, too, does not count."
    learn = Learner(maps(), Segments(), nn.CrossEntropyLoss(), metrics=[broken, viewed])
    for r in find(learn, num_it=1, train=train).rows:
        last = r.memory_format == 'channels_last'
        assert r.valid != last and ('metric viewed fails: RuntimeError: view size' in r.note) == last, r
    learn.to_fastest(num_it=1, train=train, layers=False)
    assert not hasattr(learn, 'channels_last')


@pytest.mark.parametrize('train', [True, False])
def test_metrics_keep_their_state(train):
    learn = learner(metrics=[AccumMetric(accuracy, flatten=False)])
    learn.fit(1)
    before = [values_of(vars(m)) for m in learn.metrics]
    find(learn, num_it=1, train=train)
    assert before[0] and difference(before, [values_of(vars(m)) for m in learn.metrics]) == ''


# predictions

def amplifying(depth=50):
    "A deep model with one batch's running statistics, which amplifies rounding errors."
    model = getattr(torchvision.models, f'resnet{depth}')(num_classes=10)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
    with torch.no_grad(): model.train()(torch.randn(8, 3, 64, 64))
    return model


@pytest.mark.slow
@pytest.mark.parametrize('half', ['bf16', 'fp16'])
def test_predictions_of_a_deep_model_in_half_precision_are_accepted(has, half):
    "They differ by more than a constant could allow. Folded, too."
    has(half)
    rows = rows_of(find(images(amplifying(), 64), train=False, num_it=1))
    assert all(r.valid for r in rows.values()) and rows[f'channels last, {half}'].pred_diff > (5e-2 if half == 'bf16' else 5e-3), rows
    assert f'channels last, {half}, folded' in rows


# not one of the 512 channels of ResNet-18's last convolution in bf16: it changes the outputs by less than rounding
@pytest.mark.parametrize('name, how, when', [pytest.param(name, how, when, marks=pytest.mark.slow if name == 'resnet18' else ())
                                             for name in ('residual', 'resnet18') for how in RESULTS for when in WHEN
                                             if (name, how, when) != ('resnet18', 'channel_result', 'in_half')])
def test_predictions_with_a_wrong_kernel_are_refused(has, name, how, when):
    condition, setting, kwargs = WHEN[when]
    has('bf16')
    learn = images(MODELS[name]())
    spoil(convs_of(learn.model)[-1], how, condition)
    rows = rows_of(find(learn, train=False, num_it=1, **kwargs))
    assert not rows[setting].valid and 'numbers differ from contiguous fp32' in rows[setting].note and rows['contiguous, fp32'].valid
    assert not any(r.valid for k, r in rows.items() if k.startswith(setting))


def test_mobilenets_gradients_with_fresh_weights_are_accepted_in_fp16(has):
    "With their initial running statistics, activations shrink from layer to layer until gradients underflow."
    has('fp16')
    learn = images(torchvision.models.mobilenet_v3_small(num_classes=10), 64)
    before = learn.model.state_dict()
    for r in find(learn, num_it=1, formats='channels_last').rows: assert r.valid, r
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
