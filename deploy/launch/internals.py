"""What the guard and the pin rest on: Flower's own code, as it was when they were made and tried."""

import hashlib
from importlib import metadata
from pathlib import Path

import flwr

from common.errors import EngineError

VERSION = "1.41.0"
# Files whose inner workings the two launchers change or rely on, as released.
TRIED = {
    "superlink/cli/flower_superlink.py": "53a0528b289cbb7b2e48e3ad9ae4373bd2dfaac34050ccb94db7db3f35e8e742",
    "superlink/extensions.py": "569829ba366c324e2c2b20022f33100208b7a3707ca8a444f7528a09f4e3bce1",
    "superlink/main.py": "3e94714b6f1433fdf74d9e640bc96cf92e5a62bd61216ddb5c18a306c8052920",
    "supernode/cli/flower_supernode.py": "e637b07a731536a63cb3d4e7d9293fef613c425b65363c4c64840aad263de1d9",
    "supernode/fleet_http_connection.py": "8b90826f407ab5d30564379fd1d475f66565b87547ff612eb5672277e92a33c8",
    "supernode/start_client_internal.py": "d6342f743fdf768f63305b88414ae2654e9a21bda153739da19c608e8d375067",
}
MARK = "amalgram: "  # begins the lines of a launcher's log that are for people


def check_internals(version: str = VERSION, tried: dict[str, str] = TRIED) -> None:
    """Raise EngineError unless the installed Flower is the one that the guard and the pin were made for."""
    installed = metadata.version("flwr")
    if installed != version:
        raise EngineError(f"flwr {installed} is installed; guard and pin were made for {version}: install that one")
    folder = Path(flwr.__file__).parent
    for name, digest in tried.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise EngineError(f"{path}: is not the file that flwr {version} has there; install flwr {version} anew")


def tell(message: str) -> None:
    """Say something to whoever started the launcher."""
    print(f"{MARK}{message}", flush=True)
