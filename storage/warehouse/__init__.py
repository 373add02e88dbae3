"""The warehouse, where analytics run: `port` says what one does; `local` and `redshift` are the two there are."""
