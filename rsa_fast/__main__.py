"""`python -m rsa_fast` equals `rsa-fast`."""

from rsa_fast.cli import main

main(prog_name="rsa-fast")
