"""Turns the notebooks, as they are stored, into Markdown pages for MkDocs. Nothing is run.

Pictures become files, and pages load no script or style of their own. Cells tagged `remove-input` show their output only, and
cells tagged `remove-cell` are left out."""
import base64
import html
import re
from pathlib import Path

import nbformat

SHOWN = 'image/png', 'text/html', 'text/markdown', 'text/plain'  # the first one that an output has is shown


def shown_html(text) -> str:
    "An HTML output without the styles of pandas and fastprogress: those of the site apply."
    text = re.sub(r'<style.*?</style>', '', text, flags=re.S)
    text = re.sub(r'<table[^>]*>', '<table>', text)
    return f'<div class="output">{text}</div>'


def shown_output(output, name, pictures) -> str:
    "An output as Markdown. A picture is added to `pictures`."
    if output.output_type == 'stream': data = {'text/plain': output.text}
    else: data = output.get('data', {})
    kind = next((k for k in SHOWN if k in data), None)
    if kind == 'image/png':
        pictures.append(base64.b64decode(data[kind]))
        return f'![]({name}/{len(pictures)}.png)'
    if kind == 'text/html': return shown_html(data[kind])
    if kind == 'text/plain': return f'<pre class="output">{html.escape(data[kind].rstrip())}</pre>'
    return data.get(kind, '')


def page(path) -> tuple: # Markdown, PNGs
    "A notebook as a Markdown page, and its pictures."
    parts, pictures = [], []
    for c in nbformat.read(path, as_version=4).cells:
        tags = c.metadata.get('tags', [])
        if 'remove-cell' in tags: continue
        if c.cell_type == 'markdown': parts.append(c.source)
        else:
            if 'remove-input' not in tags: parts.append(f'```python\n{c.source}\n```')
            parts += [shown_output(o, path.stem, pictures) for o in c.outputs]
    return '\n\n'.join(parts), pictures


def on_files(files, config):
    from mkdocs.structure.files import File
    for file in [o for o in files if o.src_uri.endswith('.ipynb')]:
        files.remove(file)
        stem = file.src_uri.removesuffix('.ipynb')
        text, pictures = page(Path(file.abs_src_path))
        files.append(File.generated(config, f'{stem}.md', content=text))
        for i, png in enumerate(pictures, 1): files.append(File.generated(config, f'{stem}/{i}.png', content=png))


def on_page_markdown(markdown, page, config, files):
    return re.sub(r'(\]\([\w./-]+)\.ipynb', r'\1.md', markdown)  # links between pages
