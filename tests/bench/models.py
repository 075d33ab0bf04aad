"The models that the benchmark measures, as Learners on random images, and a description of the machine."
import platform
from importlib.metadata import version

import fastai
import torch
import torchvision
from fastai.vision.all import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, resnet18, unet_learner, xresnet18
from fastcore.basics import uniqueify
from torchvision.models import get_model

from channelslast.command.common import build
from channelslast.core.devices import fp32_setting

# image size and batch size for training on a CPU
PANEL = dict(resnet18=(128, 16), resnet50=(96, 16), densenet121=(64, 16), mobilenet_v2=(96, 16), mobilenet_v3_small=(128, 16),
             efficientnet_b0=(96, 16), shufflenet_v2_x1_0=(128, 16), convnext_tiny=(64, 16), vgg11_bn=(64, 16), regnet_y_400mf=(96, 16),
             vit_b_16=(96, 8), unet=(64, 8), r3d_18=(56, 4), xresnet18=(128, 16))


def plan(kinds, names, size, bs, device) -> list: # `(kind, name, px, bs)` of each row
    """What to measure, model by model. Without `size` and `bs`, training on a CPU or an Apple GPU has the panel's own sizes.
    Predictions and other GPUs get 224 px (clips 112)."""
    small = device.type in ('cpu', 'mps')  # an Apple GPU shares the main memory
    def _sizes(name, kind):
        if kind == 'app': return [(224, 1)]
        predict = 'predictions' in kind
        if small and not predict: return [PANEL.get(name, (64, 16))]
        return [(112 if name == 'r3d_18' else 224, images) for images in [16 if small else 128] + [1]*predict]
    return uniqueify((k, n, size or px, bs or images) for n in names for k in kinds for px, images in _sizes(n, k))


def make_learner(name, size, bs, device) -> Learner:
    "A Learner on random images. What images show does not change the time of a step."
    shape, target = (3, 8, size, size) if name == 'r3d_18' else (3, size, size), torch.tensor(1)
    if name == 'unet': target = torch.ones(size, size, dtype=torch.int64)
    dl = DataLoader([(torch.randn(shape), target) for _ in range(2*bs)], bs=bs, device=device, drop_last=True)
    dls = DataLoaders(dl, dl, device=device)
    if name == 'unet': learn = unet_learner(dls, resnet18, n_out=2, pretrained=False, normalize=False,
                                            loss_func=CrossEntropyLossFlat(axis=1))
    else:
        if name == 'xresnet18': model = xresnet18(n_out=10)
        elif name == 'r3d_18': model = get_model(name, weights=None, num_classes=10)
        else: model = build(name, 10, size)
        learn = Learner(dls, model, CrossEntropyLossFlat())
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    return learn


def cuda_settings() -> str:
    "Versions of CUDA and cuDNN, and the settings that decide which kernels run."
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (f'CUDA {torch.version.cuda or torch.version.hip}, cuDNN {cudnn.version()}, cudnn.benchmark '
            f"{cudnn.benchmark}, fp32_precision {fp32_setting(getattr(cudnn, 'conv', cudnn))} (convolutions) "
            f'{fp32_setting(matmul)} (matmul)')


def versions(device) -> str:
    "The machine, versions and settings, in one line."
    if device.type == 'cuda':
        memory = torch.cuda.get_device_properties(device).total_memory
        machine = f'{torch.cuda.get_device_name(device)}, {memory/2**30:.0f} GiB, {cuda_settings()}'
    else:
        try: machine = next(o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name'))
        except (OSError, StopIteration): machine = platform.processor() or platform.machine()
        machine += f', {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    return (f"channelslast {version('channelslast')}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}, "
            f'fastai {fastai.__version__}, Python {platform.python_version()}; {machine}')
