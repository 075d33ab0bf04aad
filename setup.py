"Pass the settings in settings.ini to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
url, pages = cfg['git_url'], dict(Documentation='tree/main/nbs', Source='', Changelog='blob/main/CHANGELOG.md', Issues='issues')

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], license=cfg['license'], license_files=['LICENSE'],
    url=url or None, project_urls={k: f'{url}/{v}'.rstrip('/') for k, v in pages.items()} if url else {},
    classifiers=cfg['classifiers'].strip().splitlines(),
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['channelslast*']), package_data=dict(channelslast=['py.typed']), python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(), extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'cpu')},
    entry_points=dict(console_scripts=cfg['console_scripts'].split()))
