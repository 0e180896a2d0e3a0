"""Whether two revisions leave the same bits: parameters, what is remembered, and bytes on the wire.

``__main__`` asks and compares, ``sides`` are the processes of a revision, ``serving`` is one of them. What both train
are cells: ``methods`` by ``grid``, and what happens once, in ``events`` and ``worlds``. These last speak to thinwire by
``public`` alone, so a name that changes is written there.
"""
