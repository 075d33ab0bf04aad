"What the package says of itself."
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).parent.parent


def test_ci_runs_the_readmes_command():
    readme = (root/'README.md').read_text(encoding='utf-8')
    line = next(o for o in readme.splitlines() if o.endswith('-m pytest'))
    assert line in (root/'.ci'/'run').read_text(encoding='utf-8')


def test_requirements_are_the_three():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    assert [o.split('>=')[0] for o in cfg['DEFAULT']['requirements'].split()] == ['torch', 'fastai', 'fastcore']


def test_top_level():
    "Just what the design names and packaging needs."
    allowed = {'channelslast', 'tests', 'nbs', 'settings.ini', 'setup.py', 'README.md', 'LICENSE', 'MANIFEST.in', 'CHANGELOG.md'}
    built = 'build', 'dist', '__pycache__'
    assert {o.name for o in root.iterdir() if not o.name.startswith('.') and o.suffix != '.egg-info' and o.name not in built} <= allowed
