"""`python -m mot_lora.cli`."""

from mot_lora.cli import main

main()
