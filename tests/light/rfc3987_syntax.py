"""Stands before the real package in processes of Ray: its grammar takes 5 s of a core to load.

Ray imports jsonschema, which imports the package where another extra has brought it.
"""

raise ImportError("not needed here")
