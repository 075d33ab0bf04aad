"""Run the notebooks and store their outputs: `python -m tests.notebooks [name …]`. It also writes the README's picture."""
import base64
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

folder = Path(__file__).parent.parent/'nbs'
picture = folder/'memory_format.png'  # the first plot of index, shown in the README

# stored outputs must not contain paths of the machine that ran them, or progress bars
PATH = re.compile(r'(?<![\w.:/])(/(?!/)(?:[\w.+-]+/)+[\w.+-]+|[A-Za-z]:\\\w+)')
PROGRESS = re.compile(r'<progress|progress::|█|\d+%\|')


def text(output) -> str:
    "All text in an output."
    data = {k: v for k, v in output.get('data', {}).items() if k.startswith('text/')}
    return '\n'.join(map(str, (output.get('text', ''), *data.values(), *output.get('traceback', ()))))


def problems(nb) -> list:
    "The problems in the stored outputs of a notebook."
    messages, cells = [], [c for c in nb.cells if c.cell_type == 'code']
    if [c.execution_count for c in cells] != list(range(1, len(cells) + 1)): messages.append('not run from top to bottom')
    for c in cells:
        for o in c.outputs:
            where = f'cell {c.execution_count}'
            if o.output_type == 'error' or 'Traceback' in text(o): messages.append(f'{where}: a traceback')
            if m := PATH.search(re.sub(r'https?://\S+', '', text(o))): messages.append(f'{where}: a path, {m[0]}')
            if PROGRESS.search(text(o)): messages.append(f'{where}: a progress bar')
    return messages


def plots(nb) -> list:
    "The PNGs among the stored outputs."
    return [base64.b64decode(o.data['image/png']) for c in nb.cells if c.cell_type == 'code' for o in c.outputs if 'image/png' in o.get('data', {})]


def tidy(nb):
    "Remove progress bars, and metadata and warnings that differ from run to run for no reason. Tags stay: the site reads them."
    nb.metadata = nbformat.from_dict(dict(kernelspec=dict(display_name='Python 3', language='python', name='python3'), language_info=dict(name='python')))
    for c in nb.cells:
        c.metadata = nbformat.from_dict({k: v for k, v in c.metadata.items() if k == 'tags'})
        if c.cell_type != 'code': continue
        c.outputs = [o for o in c.outputs if not PROGRESS.search(text(o)) and o.get('data', {}).get('text/html') != ''
                     and not (o.get('name') == 'stderr' and 'site-packages' in text(o))]  # warnings of other packages


def main(names):
    for path in sorted(folder.glob('*.ipynb')):
        if names and path.stem not in names: continue
        nb = nbformat.read(path, as_version=4)
        NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(folder)}}).execute()
        tidy(nb)
        nbformat.write(nb, path)
        if path.stem == 'index': picture.write_bytes(plots(nb)[0])
        print(path.name, *problems(nb), sep='\n  ')


if __name__ == '__main__': main(sys.argv[1:])
