"What `to_fastest` added to a Learner: one record, from which it is taken away again."


def added_by_to_fastest(learn) -> dict: # `callbacks`; `optimizer`: a `fused`, or None
    return vars(learn).get('_added_by_to_fastest') or dict(callbacks=[], optimizer=None)


def record_added(learn, **kwargs):
    "Change the record. It holds what an exported Learner holds anyway, so it loads where this library is not installed."
    learn._added_by_to_fastest = {**added_by_to_fastest(learn), **kwargs}
