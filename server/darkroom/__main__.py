"""`python -m darkroom`, which is how `darkroom up` starts its children."""

from darkroom.cli import main

main()
