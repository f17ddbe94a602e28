"""The parts of Flower that the guard, the pin and the fork server rely on, exactly as they were when tested."""

import hashlib
import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from common.errors import EngineError
from common.text import shown

VERSION = "1.42.0"
# Files of Flower that a launcher changes or relies on, as released: SHA-256 of each.
TRIED = {
    "supercore/app_utils.py": "3f9e7c0ceaf96b850fc8e7510b16c342e79017e2fe91273aab3a2e3cfbaa8f45",
    "supercore/object_ref.py": "37023b5244a7e43501dae546d7cdf2242b110167451800df64918e0325d7b082",
    "supercore/superexec/executor/factory.py": "9b96f2a63673dca38d12812a64d2b88bdfa938b550b2088643bdd8eeb7ceefc1",
    "supercore/superexec/executor/subprocess_executor.py": (
        "8fca14d06c1531f0895952719e9194a3f62e9cd0de4148a6d2cdd5cdaf051f39"
    ),
    "superlink/cli/flower_superlink.py": "53a0528b289cbb7b2e48e3ad9ae4373bd2dfaac34050ccb94db7db3f35e8e742",
    "superlink/cli/flwr_serverapp.py": "dd5408fc7a702d59cb2e34edad1ac5560d8d6e3237026761fe52cc379bdfcb14",
    "superlink/extensions.py": "569829ba366c324e2c2b20022f33100208b7a3707ca8a444f7528a09f4e3bce1",
    "superlink/main.py": "500f01979e167243df1121d556fbc925b033b725dce58adb0c9f07b7c0f8642e",
    "superlink/routers/fleet/node_auth.py": "8646e6bfd8e5b47d062a03c824d1609ae1897c3e71f97b028be1381cd23b3255",
    "supernode/cli/flower_supernode.py": "e637b07a731536a63cb3d4e7d9293fef613c425b65363c4c64840aad263de1d9",
    "supernode/cli/flwr_clientapp.py": "e87dccf7a82b0447c6dac323c6bbfc1ffd2e70e7837d7f5c39b18b86b7b39c98",
    "supernode/fleet_http_connection.py": "8b90826f407ab5d30564379fd1d475f66565b87547ff612eb5672277e92a33c8",
    "supernode/start_client_internal.py": "d6342f743fdf768f63305b88414ae2654e9a21bda153739da19c608e8d375067",
}
# What the launchers need from each file; check_flower.py compares these between versions.
RELIED_ON = {
    "supercore/app_utils.py": ("start_parent_process_monitor",),  # a launcher ends with whoever started it
    "supercore/object_ref.py": ("load_app",),  # which modules an app gets: the bundle's, unless imported already
    "supercore/superexec/executor/factory.py": ("get_executor",),
    "supercore/superexec/executor/subprocess_executor.py": ("SubprocessExecutor.launch",),  # starts an app
    "superlink/cli/flower_superlink.py": ("flower_superlink", "_run_superlink_http_api"),
    "superlink/cli/flwr_serverapp.py": ("flwr_serverapp",),  # the coordinator's app
    "superlink/extensions.py": ("get_middleware",),  # where the guard enters
    "superlink/main.py": ("_get_middleware", "create_app"),  # that the guard is outermost
    "superlink/routers/fleet/node_auth.py": ("authenticate_node",),  # what a node's headers must prove
    "supernode/cli/flower_supernode.py": ("flower_supernode",),
    "supernode/cli/flwr_clientapp.py": ("flwr_clientapp",),  # an owner's app
    "supernode/fleet_http_connection.py": ("http_request_response",),  # the callbacks that the gate wraps
    "supernode/start_client_internal.py": (
        "start_client_internal",
        "_pull_and_store_message",
        "_push_messages",
        "_init_connection",
    ),
}
TOLD = "told.log"  # what a launcher says itself; Flower's own log may hold what other parties wrote


def check_internals(version: str = VERSION, tried: dict[str, str] = TRIED) -> None:
    """Raise EngineError unless the installed Flower is exactly the one that the launchers were tested with."""
    installed = metadata.version("flwr")
    if installed != version:  # check: flower-is-of-that-version
        raise EngineError(
            f"flwr {installed} is installed; guard and pin were made for {version}", hint=f"install flwr=={version}"
        )
    found = find_spec("flwr")  # where it is, without importing it
    if found is None or found.origin is None:
        raise EngineError("flwr cannot be found", hint=f"install flwr=={version}")
    folder = Path(found.origin).parent
    for name, digest in tried.items():
        path = folder / name
        if (
            not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest
        ):  # check: flower-is-as-released
            raise EngineError(
                f"{path}: is not the file that flwr {version} has there", hint=f"reinstall flwr {version}"
            )


def tell(folder: Path, message: str) -> None:
    """Say something in one line to whoever started the launcher in `folder`."""
    line = shown(message)  # check: launchers-tell-one-line
    descriptor = os.open(folder / TOLD, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as told:
        told.write(f"{line}\n")
