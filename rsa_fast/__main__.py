"""`python -m rsa_fast` does the same as `rsa-fast`."""

from rsa_fast.cli import main

main(prog_name="rsa-fast")
