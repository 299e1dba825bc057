"""`python -m gateway` is `veklom`."""

from gateway.cli import main

main(prog_name="veklom")
