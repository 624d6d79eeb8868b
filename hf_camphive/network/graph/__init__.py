"""A network as a list of operations whose channels are followed from one end to the other.

`program.py` exports the operations, `handlers.py` says what each kind of operation does to channels, `tracing.py` makes
channel groups of what was found, `blocks.py` finds residual blocks. May import `core`.
"""
