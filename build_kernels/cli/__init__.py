"""The command `build-kernels` and what its subcommands share."""
