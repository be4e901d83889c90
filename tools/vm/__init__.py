"""Virtual machines with Debian's kernels and this machine's files, to try this checkout on them."""
