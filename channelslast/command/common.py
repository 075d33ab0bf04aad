"The command line, images, classifiers and devices: what the demo shares with the benchmark in `tests/bench`."
import sys
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torchvision
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, ImageDataLoaders, Normalize, RandomSplitter,
                               Resize, get_image_files, imagenet_stats)
from fastcore.script import anno_parser


class UsageError(Exception):
    "A wrong argument. The command prints it in one line and exits with status 2."


def _with_underscores(option, usage) -> str:
    "Replace the dashes in an option's name if `usage` has it with underscores only, as fastcore before 2.0 does."
    name, eq, value = option.partition('=')
    other = '--' + name[2:].replace('-', '_')
    return other + eq + value if name.startswith('--') and name not in usage and other in usage else option


def run(
    main, # Function with one argument per option
    prog: str, # Name of the command in its messages
):
    "Call `main` with the options of the command line. A `UsageError` is printed in one line."
    parser = anno_parser(main, prog=prog)
    usage = parser.format_usage()
    args = vars(parser.parse_args([_with_underscores(o, usage) for o in sys.argv[1:]]))
    try: main(**{k: v for k, v in args.items() if k not in ('pdb', 'xtra')})
    except UsageError as e:
        print(f'{prog}: {e}', file=sys.stderr)
        sys.exit(2)


def digits(size, bs, device):
    "scikit-learn's 1797 handwritten digits, 8×8 pixels, resized to RGB images of `size`×`size`."
    from sklearn.datasets import load_digits
    data = load_digits()
    images = (data.images * 255 / 16).astype(np.uint8)[..., None].repeat(3, -1)
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: range(len(images)), get_x=images.__getitem__,
                      get_y=data.target.__getitem__, splitter=RandomSplitter(seed=42), item_tfms=Resize(size),
                      batch_tfms=Normalize.from_stats(*imagenet_stats))
    return block.dataloaders(None, bs=bs, device=device, num_workers=0)


def folder(path, size, bs, device):
    "The user's own images from a folder with one subfolder per class. A fifth of them is used for validation."
    path = Path(path)
    try:
        if not path.is_dir():
            raise UsageError(f"--data {path}: no such folder; pass a folder with one subfolder of images per class")
        classes = [o for o in path.iterdir() if o.is_dir() and get_image_files(o)]
    except OSError as e: raise UsageError(f"--data {path}: can't be read ({e.strerror}); pass one that you may read")
    if len(classes) < 2:
        raise UsageError(f"--data {path}: has {len(classes)} subfolder(s) with images; pass a folder with two or more, "
                         "one per class")
    return ImageDataLoaders.from_folder(path, valid_pct=0.2, seed=42, item_tfms=Resize(size), bs=bs, device=device,
                                        num_workers=0, batch_tfms=Normalize.from_stats(*imagenet_stats))


def build(arch, n_classes, size):
    "A new, untrained classifier by its torchvision or timm name."
    models = torchvision.models
    names = models.list_models(module=models)
    try: import timm
    except ImportError: timm = None
    if arch in names: make = models.get_model
    elif timm and timm.is_model(arch): make = timm.create_model
    else:
        near = get_close_matches(arch, names + (timm.list_models() if timm else []), 3)
        libraries = 'torchvision or timm' if timm else "torchvision (for timm's models, pip install timm)"
        hint = f"did you mean {', '.join(near)}?" if near else 'try resnet18'
        raise UsageError(f'no model {arch} in {libraries}; {hint}')
    # transformers need the size, Inceptions must not return two outputs; other models reject these arguments
    for extra in dict(image_size=size), dict(input_size=(size, size)), dict(img_size=size), dict(aux_logits=False), {}:
        try: return make(arch, num_classes=n_classes, **extra)
        except TypeError: pass


def unreadable(e):
    "The `UsageError` for an image that can't be opened."
    return UsageError(f"--data: an image can't be read ({e}); remove it (fastai's verify_images finds all of them)")


def check(make_dls, arch, size, bs):
    "Build the data and the model and run one batch, so that wrong arguments are reported before training."
    dls = make_dls()
    if not len(dls.train):
        n = len(dls.train_ds)
        raise UsageError(f"--bs {bs}: larger than the {n} training images; try --bs {max(n//8, 1)}")
    if not len(dls.valid_ds): raise UsageError(f"--data: only {len(dls.train_ds)} image(s); pass five or more")
    model = build(arch, dls.c, size)
    try: x, _ = dls.train.one_batch()
    except OSError as e: raise unreadable(e)
    try:
        with torch.no_grad(): out = model.to(x.device).eval()(x[:2])
    except Exception as e:
        raise UsageError(f"--arch {arch}: does not accept images of {size}×{size} ({str(e).splitlines()[0]}); "
                         "try --size 224")
    if getattr(out, 'shape', None) != (len(x[:2]), dls.c):
        raise UsageError(f"--arch {arch}: not an image classifier; try --arch resnet18")


def pick_device(name):
    "The requested device, or the fastest one available. A `UsageError` if the requested one is not available."
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name or best)
        torch.zeros(1, device=device)
        return device
    except Exception: raise UsageError(f"--device {name}: not available on this machine; try --device {best}")
