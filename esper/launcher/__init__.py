"""From a command line to a finished run: compose, check, start torchrun, supervise."""
