"""The process that operates the demo's node until it is killed: ``python -m hookline.demo.operator NODE``.

It applies the demo's service, says ``ready``, and then does what each line of standard input says: ``remove NAMESPACE/POD``
takes a pod out of what the node knows, so that services drop it. Each line is answered by one. It holds the node open in between,
as an agent would; the demo kills it with SIGKILL.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from hookline.api import Node
from hookline.model import ExternalHost, Namespace, Pod
from hookline.model import Node as NodeResource

SERVICE = Path(__file__).with_name("orders.yaml")


def main() -> None:
    """Operates the node named on the command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the demo ends its processes itself
    with Node(sys.argv[1]) as node:
        node.apply(SERVICE)
        print("ready", flush=True)
        for line in sys.stdin:
            pod = line.split()[1]
            owned = [
                r for r in node.resources() if isinstance(r, Pod | Namespace | NodeResource | ExternalHost)
            ]
            node.apply([r for r in owned if r.reference != f"Pod/{pod}"], owner="lab")
            print("done", flush=True)


if __name__ == "__main__":
    main()
