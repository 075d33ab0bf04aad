"HTML of texts that name code in backticks, as messages do."
import html
import re


def tag_code(markup) -> str:
    "HTML with `code` in backticks as `<code>` elements."
    return re.sub(r'`([^`<>]+)`', r'<code>\1</code>', markup)


def paragraph(text) -> str:
    """A text as an HTML paragraph.

    >>> from channelslast.core.markup import paragraph
    >>> paragraph('Pass `n<2`')
    '<p>Pass <code>n&lt;2</code></p>'"""
    return f'<p>{tag_code(html.escape(text, quote=False))}</p>'
