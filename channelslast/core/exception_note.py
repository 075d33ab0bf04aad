"Notes on exceptions."

__all__ = ['add_note']


def add_note(e, note):
    "Add a note to an exception; to its message before Python 3.11, which has no notes."
    if hasattr(e, 'add_note'): e.add_note(note)
    else: e.args = (f"{e.args[0] if e.args else ''}\n{note}", *e.args[1:])
