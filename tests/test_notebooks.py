"The stored outputs of the notebooks, their pages of the site, and the README's code. (pytest runs the notebooks themselves through nbmake.)"
import re
from importlib.util import find_spec
import runpy
from io import BytesIO

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Learner, PILImage, Resize, noop, resnet50

import channelslast
from .notebooks import folder, picture, plots, problems, text, tidy
from .test_package import settings

PAGES = sorted(folder.glob('*.ipynb'))


def page(name): return nbformat.read(folder/f'{name}.ipynb', as_version=4)
def cells(nb, kind): return [c for c in nb.cells if c.cell_type == kind]


def test_pytest_runs_the_notebooks(pytestconfig): assert pytestconfig.pluginmanager.hasplugin('nbmake') and pytestconfig.option.nbmake


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_a_notebook_starts_with_a_title_asserts_something_and_has_tidy_outputs(path):
    nb = nbformat.read(path, as_version=4)
    assert problems(nb) == []
    assert cells(nb, 'markdown')[0].source.startswith('# ') and nb.cells[0].cell_type == 'markdown'
    assert any('assert' in c.source or 'test_' in c.source for c in cells(nb, 'code')) or path.stem == '06_reference'


def _nb(**output):
    cell = nbformat.v4.new_code_cell('1', execution_count=1, outputs=[nbformat.v4.new_output(**output)])
    return nbformat.v4.new_notebook(cells=[cell])


@pytest.mark.parametrize('output, problem', [
    (dict(output_type='error', ename='ValueError', evalue='', traceback=['x']), 'a traceback'),
    (dict(output_type='stream', text='Traceback (most recent call last):'), 'a traceback'),
    (dict(output_type='stream', text='in /home/me/lib/thing.py:3'), 'a path, /home/me/lib/thing.py'),
    (dict(output_type='display_data', data={'text/html': '<a href="C:\\Users">'}), 'a path, C:\\Users'),
    (dict(output_type='display_data', data={'text/html': '<progress value=1>'}), 'a progress bar'),
    (dict(output_type='stream', text=' 50%|█████     |'), 'a progress bar')])
def test_problems_finds_what_a_stored_output_must_not_hold(output, problem): assert problems(_nb(**output)) == [f'cell 1: {problem}']


@pytest.mark.parametrize('text', ['1/2', 'ms/step', 'https://docs.pytorch.org/docs/stable/amp.html', 'forward / backward', '8×3×224×224'])
def test_problems_accepts_harmless_text(text): assert problems(_nb(output_type='stream', text=text)) == []


def test_problems_finds_cells_that_were_not_run_in_order():
    nb = _nb(output_type='stream', text='')
    nb.cells[0].execution_count = 2
    assert problems(nb) == ['not run from top to bottom']


def test_tidy_removes_progress_bars_metadata_and_warnings_of_other_packages():
    nb = _nb(output_type='display_data', data={'text/html': '<progress value=1>'})
    nb.cells[0].metadata['execution'] = dict(started='now')
    tidy(nb)
    assert nb.cells[0].outputs == [] and nb.cells[0].metadata == {}
    nb = _nb(output_type='stream', name='stderr', text='/x/site-packages/torch/a.py: FutureWarning')
    nb.cells[0].outputs += _nb(output_type='stream', name='stderr', text='UserWarning: ours').cells[0].outputs
    tidy(nb)
    assert [o.text for o in nb.cells[0].outputs] == ['UserWarning: ours']


def test_tidy_keeps_tags():
    nb = _nb(output_type='stream', text='')
    nb.cells[0].metadata.update(tags=['remove-input'], execution=dict(started='now'))
    tidy(nb)
    assert nb.cells[0].metadata == dict(tags=['remove-input'])


SITE = runpy.run_path(folder.parent/'.github'/'mkdocs_hook.py')  # it imports mkdocs only to build the site


def _site_page(path, tags=(), **output):
    nb = _nb(**output)
    nb.cells[0].metadata.tags = [*tags]
    nbformat.write(nb, path/'a.ipynb')
    return SITE['page'](path/'a.ipynb')


@pytest.mark.parametrize('tags, shown', [([], ['```python', 'out']), (['remove-input'], ['out']), (['remove-cell'], [])])
def test_tags_remove_the_input_or_the_cell_from_the_site(tags, shown, tmp_path):
    text, _ = _site_page(tmp_path, tags, output_type='stream', text='out')
    assert [o for o in ('```python', 'out') if o in text] == shown


def test_the_site_escapes_text_drops_styles_and_saves_pictures(tmp_path):
    assert '&lt;b' in _site_page(tmp_path, output_type='stream', text='<b')[0]
    text, _ = _site_page(tmp_path, output_type='display_data', data={'text/html': '<style scoped>x</style><table border="1" class="dataframe"></table>'})
    assert '<style' not in text and '<table></table>' in text
    text, pictures = _site_page(tmp_path, output_type='display_data', data={'image/png': 'YQ==', 'text/plain': '<Figure>'})
    assert '![](a/1.png)' in text and pictures == [b'a'] and 'Figure' not in text


def test_links_between_notebooks_lead_to_pages_of_the_site():
    assert SITE['on_page_markdown']('[a](05_b.ipynb#c)', None, None, None) == '[a](05_b.md#c)'


def test_the_site_has_each_notebook_and_page_in_its_menu():
    menu = re.findall(r': ([\w]+)\.md$', (folder.parent/'.github'/'mkdocs.yml').read_text(encoding='utf-8'), re.M)
    assert sorted(menu) == sorted(p.stem for p in (*PAGES, *folder.glob('*.md')))


def test_the_readmes_picture_is_that_of_the_notebook(): assert picture.read_bytes() == plots(page('index'))[0]

def test_charts_are_opaque_so_that_they_are_readable_on_a_dark_background():
    for path in PAGES:
        for plot in plots(nbformat.read(path, as_version=4)): assert Image.open(BytesIO(plot)).convert('RGBA').getextrema()[3] == (255, 255), path


def test_links_of_notebooks_and_readme_lead_to_files():
    for path in *PAGES, *folder.glob('*.md'):
        for link in re.findall(r'\]\(([\w./]+\.(?:ipynb|md))\)', path.read_text(encoding='utf-8')): assert (folder/link).exists(), (path, link)
    readme = folder.parent/'README.md'
    for link in re.findall(r'\]\(([\w./]+)\)', readme.read_text(encoding='utf-8')): assert (readme.parent/link).exists(), link


def test_the_reference_shows_each_public_name_and_method():
    shown = '\n'.join(c.source for c in cells(page('06_reference'), 'code'))
    methods = {k for k, v in vars(Learner).items() if getattr(v, '__module__', '').startswith('channelslast') and k[0] != '_'} - {'one_batch'}
    assert methods == {'to_channelslast', 'to_contiguous', 'to_fp16', 'to_bf16', 'load', 'format_summary', 'format_find', 'to_fastest'}
    for name in [*channelslast.__all__, *(f'Learner.{m}' for m in methods)]: assert f'show({name}' in shown, name


def test_the_reference_was_printed_by_this_version():
    printed = {v for c in cells(page('06_reference'), 'code') for o in c.outputs for v in re.findall(r'channelslast (\d+\.\S+)', text(o))}
    assert printed == {settings()['version']}, 'run `pip install -e .` and `python -m tests.notebooks 06_reference`'


@pytest.fixture
def no_download(monkeypatch):
    "Replace pretrained weights by random ones."
    from torchvision.models._api import WeightsEnum
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda self, *args, **kwargs: resnet50(weights=None).state_dict())


def is_odd(i): return i % 2  # at the top level, since an export pickles it


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_the_readmes_code_runs(no_download, tmp_path, monkeypatch):
    "The lines of the diff run, and then the calls in the sentences, one after the other, as for a reader."
    monkeypatch.chdir(tmp_path)
    readme = (folder.parent/'README.md').read_text(encoding='utf-8')
    block = re.search(r'```diff\n(.*?)```', readme, re.S)[1]
    calls = re.findall(r'`((?:assert )?(?:Learner\(|learn\.|dl=learn\.|from ).*?)`', readme.split('```diff')[1].split('```', 1)[1])
    assert len(calls) >= 7, calls
    images = np.random.default_rng(0).integers(0, 255, (32, 40, 40, 3), np.uint8)
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=noop, get_x=images.__getitem__, get_y=is_odd,
                    item_tfms=Resize(32)).dataloaders(range(32), bs=8, device=torch.device('cpu'), num_workers=0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4*30*30, 4))
    names = dict(dls=dls, files=[PILImage.create(o) for o in images[:4]], model=model)
    exec(compile('\n'.join(o[1:] for o in block.splitlines()), 'README.md', 'exec'), names)
    assert names['learn'].format_timings.train
    for call in calls if find_spec('openvino') else [o for o in calls if 'openvino' not in o]: exec(compile(call, 'README.md', 'exec'), names)
    assert not names['learn'].format_timings.train
    names['learn'].to_contiguous(to_fp32=True)
    assert not hasattr(names['learn'], 'channels_last') and not hasattr(names['learn'], 'mixed_precision')
