"""The `atlasco` command line."""
