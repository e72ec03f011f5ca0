"""`python -m serve` is the `limelight` command; torchrun starts it this way."""

from serve.cli import main

main()
