"""`python -m edge_inspector.cli`."""

from edge_inspector.cli import main

main()
