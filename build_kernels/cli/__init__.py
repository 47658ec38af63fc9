"""The command `build-kernels`: one file per subcommand, and their shared parts."""
