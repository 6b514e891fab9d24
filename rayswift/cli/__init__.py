"""The command line: `main` reads arguments and calls one function per command; `jobs`, `adapters` and `data` are the
commands that take words. Nothing heavy is imported before a command runs."""
