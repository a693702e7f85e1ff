"""The command line; importing it loads neither torch nor a subcommand."""
