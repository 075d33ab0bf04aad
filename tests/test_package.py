"The layout of the package, and the consistency of its documents."
import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
package = root/'channelslast'
# Each folder may import itself and these. The table in `.github/CONTRIBUTING.md` must agree.
MAY_IMPORT = dict(core=(), predict=('core',), learner=('core', 'predict'), summary=('core', 'learner'), find=('core', 'predict', 'learner'),
                  command=('', 'core', 'learner', 'find'))


def imported(path) -> list:
    "The imports of a file from this package: `(file, name)`."
    imports = []
    for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(o, ast.ImportFrom): continue
        if o.level: base = path.parents[o.level - 1]
        elif o.module.split('.')[0] in ('channelslast', 'tests'): base = root
        else: continue
        target = base.joinpath(*(o.module or '').split('.')) if o.module else base
        for a in o.names:
            for file in target/f'{a.name}.py', target.with_suffix('.py'):
                if file.exists(): imports.append((file, a.name)); break
    return imports


def folder(path) -> str:
    "The folder of the package that a file is in; `''` for the package itself."
    return '' if path.parent == package else path.parent.name


def test_contributing_names_each_folder_of_the_package():
    rows = (root/'.github'/'CONTRIBUTING.md').read_text(encoding='utf-8').splitlines()
    named = [m[1] for o in rows if (m := re.match(r'\| `(\w+)/`', o))]
    assert named == [*MAY_IMPORT] and {*named} == {o.parent.name for o in package.glob('*/__init__.py')}


@pytest.mark.parametrize('path', [pytest.param(o, id=str(o.relative_to(package))) for o in sorted(package.glob('*/*.py'))])
def test_a_file_imports_only_the_folders_that_its_folder_may_import(path):
    own = folder(path)
    wrong = [str(f) for f, _ in imported(path) if folder(f) not in (own, *MAY_IMPORT[own])]
    assert wrong == []


def test_files_of_a_folder_do_not_import_each_other_in_a_cycle():
    uses = {p: {f for f, _ in imported(p) if f.parent == p.parent and f != p} for p in package.rglob('*.py')}
    while free := [p for p, files in uses.items() if not files & uses.keys()]:
        for p in free: del uses[p]
    assert [p.name for p in uses] == []


def test_no_file_test_or_notebook_imports_a_private_name():
    private = [(p.name, n) for p in (*package.rglob('*.py'), *root.glob('tests/**/*.py')) for _, n in imported(p) if n.startswith('_')]
    assert private == []
    for nb in root.glob('nbs/*.ipynb'): assert not re.search(r'from channelslast\S* import[^"]*\b_', nb.read_text(encoding='utf-8')), nb


def test_ci_runs_the_command_of_the_readme():
    readme = (root/'README.md').read_text(encoding='utf-8')
    line = next(o for o in readme.splitlines() if o.endswith('-m pytest'))
    assert line in (root/'.ci'/'run').read_text(encoding='utf-8')


def settings():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


def test_the_package_requires_only_torch_fastai_and_fastcore():
    assert [o.split('>=')[0] for o in settings()['requirements'].split()] == ['torch', 'fastai', 'fastcore']


def test_the_checkout_has_only_the_files_of_the_design_and_of_packaging():
    allowed = {'channelslast', 'tests', 'nbs', 'settings.ini', 'setup.py', 'README.md', 'LICENSE', 'MANIFEST.in', 'CHANGELOG.md'}
    built = 'build', 'dist', 'site', '__pycache__', 'channelslast-report.jsonl', 'report.md'
    assert {o.name for o in root.iterdir() if not o.name.startswith('.') and o.suffix != '.egg-info' and o.name not in built} <= allowed


def test_without_accelerate_and_timm_everything_is_imported_and_the_command_prints_its_help_without_warnings():
    "`fastai.distributed` raises a NameError where accelerate is missing, as after `pip install .`."
    code = ("import runpy, sys; sys.modules.update(dict.fromkeys(('accelerate', 'timm'))); sys.argv = ['channelslast', '--help']\n"
            "import channelslast.command.demo, tests.bench.__main__\n"
            "runpy.run_module('channelslast', run_name='__main__')")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert out.returncode == 0 and out.stdout.startswith('usage:') and 'Warning' not in out.stderr, out.stderr
