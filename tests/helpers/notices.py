"""Warnings that must not come, and those that came."""

import contextlib
import warnings


@contextlib.contextmanager
def silent():
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def told():
    """A list that holds the messages of all warnings afterwards."""
    messages = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield messages
    messages += [str(one.message) for one in found]
