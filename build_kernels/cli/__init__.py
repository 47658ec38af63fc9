"""The command `build-kernels`: one file per subcommand, and what they share."""
