"""Export a network as a list of operations, and follow its channels from the input to the output.

`program.py` exports the operations, `handlers.py` defines what each kind of operation does to channels, `tracing.py` builds
channel groups from the result, `blocks.py` finds residual blocks. May import `core`.
"""
