"""Comparison of two revisions, bit by bit: parameters, states, and bytes on the wire.

``__main__`` starts the cells and compares, ``sides`` are the processes of a revision, ``serving`` is one of them. They
train cells: ``methods`` by ``grid``, and what happens once, in ``events`` and ``worlds``. These last speak to
thinwire by ``public`` alone, so a name that changes is written there.
"""
