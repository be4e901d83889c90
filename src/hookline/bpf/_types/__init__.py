"""BTF, NumPy's dtypes, and values of Python as their bytes."""
