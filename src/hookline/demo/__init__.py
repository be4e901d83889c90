"""The demo: real connections balanced in the kernel while backends come and go and Hookline itself is killed.

It makes a lab of its own (a client network, a balancing node, five backends on it and beyond it), applies ``orders.yaml``, runs
TCP and UDP clients for some seconds, and changes things under them: a backend leaves, the operating process gets SIGKILL, another
process adopts what it finds, a backend joins. In the end the clients', the servers' and the kernel's counts must agree, and no
connection to a backend that stayed may have broken.
"""

from hookline.demo._run import Backend, Progress, Result, run

__all__ = ["Backend", "Progress", "Result", "run"]
