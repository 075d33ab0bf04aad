"Notes on exceptions, in all Python versions."

__all__ = ['add_note']


def add_note(e, note):
    "Add a note to an exception; before Python 3.11, which has no notes, add it to the message."
    if hasattr(e, 'add_note'): e.add_note(note)
    else: e.args = (f"{e.args[0] if e.args else ''}\n{note}", *e.args[1:])
