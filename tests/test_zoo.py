"""Compare each torchvision architecture, and one per timm family, in channels last with itself in contiguous format.

`pytest -m zoo` runs all, `pytest -m slow` every tenth (see conftest.py) and compiles a twentieth, a plain `pytest` a few small
ones. No weights are loaded. Dropout and stochastic depth are off, since PyTorch draws their masks in memory order."""
import gc
import math
import re
import warnings
from unittest import mock

import pytest
import timm
import torch
import torchvision
from fastai.vision.all import Callback, CancelBatchException, DataLoader, DataLoaders, Learner, SGD
from torch import nn
from torch.utils._pytree import tree_leaves

import channelslast
from channelslast import CompilePredictions, FoldBatchNorm
from channelslast.core.compare import relative_error
from .helpers import SumsInFp32, find, shake, strides

SEGMENTATION, VIDEO = (torchvision.models.list_models(module=m) for m in (torchvision.models.segmentation, torchvision.models.video))
# the smallest model of each family (module) of timm 1.0.31, except timm's own test models
TIMM = '''beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121
dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0
efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050
hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto coatnet_pico_rw_224 poolformerv2_s12 gmlp_ti16_224
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny
nextvit_small nf_regnet_b0 pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
tresnet_m twins_svt_small vgg11 visformer_tiny flexivit_small vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224'''.split()
ZOO = ([f'torchvision/{n}' for n in torchvision.models.list_models(module=torchvision.models)]
       + [f'segmentation/{n}' for n in SEGMENTATION] + [f'video/{n}' for n in VIDEO] + [f'timm/{n}' for n in TIMM])

FAST = 'torchvision/resnet18', 'torchvision/mobilenet_v3_small', 'timm/convnext_zepto_rms'
def architectures(fast): return [*(pytest.param(n, id=f'fast-{n}') for n in fast), *(pytest.param(n, marks=pytest.mark.zoo) for n in ZOO)]
# a twentieth of the zoo that compiles quickly, one of each kind: a whole slice of it, with DenseNets and Swins, took a quarter of an hour
QUICK = [f'torchvision/{n}' for n in ('mobilenet_v3_small', 'resnet18', 'squeezenet1_1')] + [
    'segmentation/fcn_resnet50', 'video/r3d_18',
    *(f'timm/{n}' for n in ('convnext_zepto_rms', 'deit_tiny_patch16_224', 'fasternet_t0', 'resnet10t', 'starnet_s050'))]
assert {*QUICK, *FAST} <= {*ZOO}

LARGE = 60e6       # parameters; larger models run only in float32, to save memory
EXACT = 1e-6       # float64: relative error of the loss and of each gradient (relative to the largest, for those near zero); some cast to float32
ROUGH = 5e-2       # float32: relative error of the loss and of all gradients together
FOLDED = 1e-10, 1e-4  # float64 and float32: relative error of predictions
# random running statistics amplify a rounding error of the input to 3e-2 in float32 and 2e-10 in float64: only float64 is compared
AMPLIFIES = {'timm/halonet_h1': 1e-9}
# at 64 px, padding fills windows with zeros, which `F.normalize` divides by 0 in fp16: the gradients are NaN, but not at 256 px
NOT_FINITE = {('torchvision/swin_v2_t', 'fp16')}
TRAINING = '| model | million parameters | input | float64 | worst gradient | float32 | lost | result |'
NUMBERS = '| model | precision | contiguous | channels last fp32 | channels last | refused |'  # relative errors of all gradients
COMPILED = '| model | input | compiled | float32 | predictions |'
PREDICTION_TOLERANCE = '| model | batch norms folded | float64 | float32 | predictions |'
# smooth functions replace these in float32: at the kink of an activation, rounding decides its value
KINKED = 'relu', 'relu_', 'relu6', 'hardswish', 'hardsigmoid', 'hardtanh', 'leaky_relu'
REASONS = {}       # models that can't work in channels last, and why


def make(name, size) -> tuple:
    "The model and the shape of its input."
    source, name = name.split('/')
    if source == 'segmentation': return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5), (3, size, size)
    if source == 'video': return torchvision.models.get_model(name, weights=None, num_classes=10), (3, max(8, size//14), size, size)
    get = timm.create_model if source == 'timm' else torchvision.models.get_model
    for extra in dict(img_size=size), dict(image_size=size), dict(input_size=(size, size)), dict(aux_logits=False, init_weights=False), {}:
        try: return get(name, num_classes=10, **extra), (3, size, size)
        except (TypeError, AssertionError): pass


def fitting(name) -> tuple:
    "The model and its input, at the smallest size that it accepts."
    for size in 64, 112, 224, 240, 256:
        torch.manual_seed(0)
        try:
            model, shape = make(name, size)
            x, values = torch.randn(2, *shape), []
            norms = [m.register_forward_pre_hook(lambda m, args: values.append(args[0].numel()/args[0].shape[1])) for m in model.modules()
                     if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            with torch.no_grad(): model(x)
            for h in norms: h.remove()
            if min(values, default=8) < 4: x = torch.randn(8, *shape)  # a batch norm over two values gives their order: no stable gradient
            break
        except Exception as e: error = e
    else: raise error
    for m in model.modules():
        if isinstance(m, (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth)): m.p = 0.
        if hasattr(m, 'drop_prob'): m.drop_prob = 0.
    with torch.no_grad():  # scales that start at zero would hide other layers
        for p in model.parameters():
            if p.dim() < 2: p.add_(torch.randn_like(p), alpha=0.05)
    return model, x


def energy(out, y):
    "A loss for any output, in float32, since fastai's Recorder takes nothing else."
    loss = sum(o.square().mean() for o in tree_leaves(out) if isinstance(o, torch.Tensor) and o.is_floating_point())
    energy.exact = loss.item()
    return loss.float()


def smooth():
    "Context manager: activations without kinks."
    return mock.patch.multiple(nn.functional, **{k: lambda x, *args, **kwargs: nn.functional.softplus(x) for k in KINKED})


def brief(off): return '–' if off is None else f'{off:.0e}'


class Stop(Callback):
    "Keep the loss and the gradients of the only batch."
    order = -1000
    def before_step(self):
        self.found = energy.exact, [p.grad for p in self.model.parameters()]
        for p in self.model.parameters(): p.grad = None
        raise CancelBatchException


def learner(model, x):
    y = torch.zeros(len(x))
    dl = DataLoader(list(zip(x, y)), bs=len(x))
    learn = Learner(DataLoaders(dl, dl), model, energy, opt_func=SGD, lr=1e-3)
    return learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else learn


def loss_and_grads(model, x, last):
    with channelslast.less_random(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(model, x).add_cb(stop := Stop())
        if last: learn.to_channelslast(to_fp16=False)
        with learn.no_logging(): learn.fit(1)
        if last: learn.to_contiguous()
    return stop.found


def error(found, truth) -> float:
    "The larger of the relative errors of the loss and of all gradients together."
    (loss, grads), (loss0, grads0) = found, truth
    assert [g is None for g in grads] == [g is None for g in grads0]
    pairs = [(a, b) for a, b in zip(grads, grads0) if b is not None]
    off, norm = (math.sqrt(sum(f(a, b).square().sum().item() for a, b in pairs)) for f in (lambda a, b: a.to(b.dtype) - b, lambda a, b: b))
    return max(abs(loss - loss0)/abs(loss0), off/norm)


def each_error(found, truth) -> float:
    "The largest relative error of any gradient."
    pairs = [(a, b) for a, b in zip(found[1], truth[1]) if b is not None]
    largest = max(b.norm().item() for _, b in pairs)
    return max(((a - b).norm()/max(b.norm().item(), 1e-3*largest)).item() for a, b in pairs)


def skip_unknown(name):
    if name.startswith('timm/') and not timm.is_model(name.split('/')[1]): pytest.skip(f'timm {timm.__version__} does not have it')


@pytest.mark.parametrize('name', architectures(FAST))
def test_training_in_channels_last_has_the_loss_and_gradients_of_contiguous(name, zoo_report):
    skip_unknown(name)
    try:
        model, x = fitting(name)
        params = sum(p.numel() for p in model.parameters())
        exact = each = None
        if params < LARGE:
            model.double()
            try:
                with torch.no_grad(): model(x.double())
            except RuntimeError: pass  # some create float32 tensors in their forward
            else:
                truth, found = (loss_and_grads(model, x.double(), last) for last in (False, True))
                exact, each = error(found, truth), each_error(found, truth)
                assert exact < EXACT and each < EXACT
                found = None
        model.float()
        truth = None
        with smooth(): rough = error(*(loss_and_grads(model, x, last) for last in (True, False)))
        assert rough < ROUGH

        learn = learner(model, x)
        before = strides(learn)[0]
        with warnings.catch_warnings(), learn.no_logging():
            warnings.simplefilter('ignore')
            learn.to_channelslast().fit(1)
            assert all(p.stride(1) == 1 for p in model.parameters() if p.dim() in (4, 5) and p.shape[1] > 1)
            summary = learn.format_summary()
        assert str(summary)
        learn.to_contiguous(to_fp32=True)
        assert strides(learn)[0] == before
    except Exception as e:
        zoo_report(TRAINING, name, *['']*6, REASONS.get(name) or f'{type(e).__name__}: {str(e)[:90]}'.replace('\n', ' '))
        if name in REASONS and re.search(REASONS[name], str(e)): pytest.xfail(REASONS[name])
        raise
    else:
        zoo_report(TRAINING, name, f'{params/1e6:.1f}', '×'.join(map(str, x.shape)), *map(brief, (exact, each, rough)), len(summary.lost), 'equal')
        assert name not in REASONS, 'works now: delete its reason'
    finally: gc.collect()


class Keep(Callback):
    "Keep the model's output, tensors or dictionaries of tensors."
    def after_pred(self): self.found = self.learn.pred


def predictions(learn):
    learn.validate(cbs=(keep := Keep()))
    return keep.found


def folding(model, x) -> tuple:
    "Numbers of folded batch norms and of those after a convolution, and the relative error of predictions."
    learn = learner(model, x)
    truth = predictions(learn)
    learn.add_cb(FoldBatchNorm())
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='FoldBatchNorm')
        off = max(relative_error(predictions(learn), truth) for _ in range(2))  # the first one traces, the second one is folded
    return learn.fold_batch_norm.folded, learn.fold_batch_norm.found, off


@pytest.mark.parametrize('name', architectures(FAST))
def test_predictions_with_folded_batch_norms_are_the_same(name, zoo_report):
    "The batch norms have random running statistics and weights here."
    skip_unknown(name)
    model, x = fitting(name)
    shake(model.eval())
    rough = exact = None
    if name not in AMPLIFIES: folded, found, rough = folding(model, x)
    if sum(p.numel() for p in model.parameters()) < LARGE:
        model.double()
        try:
            with torch.no_grad(): model(x.double())
        except RuntimeError: pass  # some create float32 tensors in their forward
        else: folded, found, exact = folding(model, x.double())
    equal = (rough or 0) < FOLDED[1] and (exact or 0) < AMPLIFIES.get(name, FOLDED[0])
    zoo_report(PREDICTION_TOLERANCE, name, f'{folded} of {found}', brief(exact), brief(rough), 'equal' if equal else 'differs')
    assert equal and (folded or not found)
    gc.collect()


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize('name', QUICK)
def test_compiled_predictions_are_the_same(name, zoo_report):
    "In channels last with folded batch norms. A model that is not compiled warns. No weight changes."
    skip_unknown(name)
    model, x = fitting(name)
    learn = learner(shake(model.eval()), x)
    truth, before = predictions(learn), {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn.to_channelslast(to_fp16=False).add_cbs([FoldBatchNorm(), CompilePredictions()])
        off = max(relative_error(predictions(learn), truth) for _ in range(2))  # the second one runs compiled
    cb = learn.compile_predictions
    zoo_report(COMPILED, name, '×'.join(map(str, x.shape)), f'{cb.seconds:.0f} s' if cb.compiled else cb.reason, brief(off),
               'equal' if off < FOLDED[1] else 'differs')
    assert cb.compiled or any(f'stays uncompiled: {cb.reason}' in str(w.message) for w in caught)
    assert off < FOLDED[1] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    gc.collect()


@pytest.mark.parametrize('name', architectures(FAST[1:]))
@pytest.mark.parametrize('half', ['bf16', 'fp16'])
def test_format_find_accepts_the_numbers_of_each_format_and_precision(name, half, zoo_report, has, fake_steps):
    "All are right here, however much rounding is amplified. Fake times: where half precision is emulated, its steps would be too slow."
    skip_unknown(name)
    has(half); fake_steps({})
    model, x = fitting(name)
    if sum(p.numel() for p in model.parameters()) > LARGE/2: pytest.skip('too large for half precision on a CPU that emulates it')
    with warnings.catch_warnings(), SumsInFp32():
        warnings.simplefilter('ignore')
        rows = find(learner(model, x), num_it=1, optimizer=False).rows[1:]
    refused = [f'{r.memory_format} {r.precision}: {r.note}' for r in rows if not r.valid]
    if (name, half) in NOT_FINITE: refused = [o for o in refused if 'the gradient scaler skipped' not in o]
    zoo_report(NUMBERS, name, half, *(brief(r.grad_diff) for r in rows), '; '.join(refused) or 'equal')
    assert refused == []
    gc.collect()


def test_the_zoo_has_one_model_of_each_family_of_timm():
    have = {timm.models.model_entrypoint(n).__module__.split('.')[-1] for n in TIMM if timm.is_model(n)}
    assert timm.__version__ > '1.0.31' or have == set(timm.list_modules()), set(timm.list_modules()) - have
