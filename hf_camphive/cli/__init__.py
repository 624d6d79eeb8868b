"""The command line; the only room that prints.

May import every room. `main.py` dispatches to one file per command in `commands/`; `arguments.py` parses options,
`inputs.py` loads the network and the data that they name, `output.py` holds what commands share in printing.
"""
