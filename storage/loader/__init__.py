"""The loader: follows the log of changes and puts it into the warehouse, every reading exactly once."""
