"""Hookline: an eBPF data plane for a Linux node, operated from Python."""

__version__ = "0.1.0"
