"""`python -m vtrain.cli`, for launchers that start modules (torchrun, accelerate launch)."""

from vtrain.cli.app import main

main()
