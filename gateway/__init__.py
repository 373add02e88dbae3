"""The gateway: device streams in, acks out, queries answered."""
