"""Streams a text file of measurements as the devices in it would have."""
