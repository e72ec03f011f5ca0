"""Turn a checkpoint into a bundle: ONNX graphs with their attention exposed, verified before they are written.

Torch-free (what a server imports): `manifest`, what a bundle says of itself; `runtime`, which runs its graphs; `cpu`,
on how many processors.
"""

import os

# Official builds of ONNX Runtime tell Microsoft of their use unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
