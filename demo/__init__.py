"""The whole stack on one machine, with simulated devices, a live view, and an audit at the end."""
