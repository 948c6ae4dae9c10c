"""The command line, and the order of the stages. The only layer that imports them."""
