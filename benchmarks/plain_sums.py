"""A mean over owners by NVFlare and by OpenFL, each by its own aggregator and its own messages. Nothing is masked.

PYTHON benchmarks/plain_sums.py nvflare|openfl NUMBERS OWNERS

`benchmarks.secagg` calls this, with the Python of an environment that has one of them: neither can be installed beside
Amalgram, and this file imports nothing of ours. Prints one JSON object with the costs that secagg.py names.

NVFlare: a DXO in a Shareable through FOBS, then its InTimeAccumulateWeightedAggregator, float64. OpenFL: a NamedTensor
through its own pipeline, which has float32, then its WeightedAverage. Both serve the mean in the same way to one owner.
"""

import json
import logging
import re
import sys
from importlib.metadata import version
from pathlib import Path
from time import process_time

import numpy as np

LARGEST = 4.0


def main() -> None:
    way, numbers, owners = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    logging.disable(logging.CRITICAL)
    random = np.random.default_rng(0)
    vectors = [random.uniform(-LARGEST, LARGEST, numbers) for _ in range(owners)]
    mean, seconds, num_bytes = {"nvflare": by_nvflare, "openfl": by_openfl}[way](vectors)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    found = {
        "version": version(way),
        "seconds": seconds,
        "bytes": num_bytes / owners,
        "peak": int(peak[1]) * 1024 / 1e6 if peak else 0.0,
        "error": float(np.abs(mean.astype(np.float64) * owners - sum(vectors)).max()),
    }
    print(json.dumps(found))


def by_nvflare(vectors: list) -> tuple:
    from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import ReservedKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.utils.decomposers import flare_decomposers
    from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.decomposers import numpy_decomposers
    from nvflare.fuel.utils import fobs

    flare_decomposers.register()
    fobs.register(numpy_decomposers.NumpyArrayDecomposer)
    context = FLContext()
    context.set_prop(AppConstants.CURRENT_ROUND, 0, private=True, sticky=True)
    aggregator = InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS)
    aggregator.handle_event(EventType.START_RUN, context)
    num_bytes, started = 0, process_time()
    for number, vector in enumerate(vectors):
        sent = DXO(DataKind.WEIGHTS, {"vector": vector}, {MetaKey.NUM_STEPS_CURRENT_ROUND: 1}).to_shareable()
        message = fobs.dumps(sent)
        num_bytes += len(message)
        arrived = fobs.loads(message)
        arrived.set_peer_props({ReservedKey.IDENTITY_NAME: f"o{number}"})
        arrived.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
        if not aggregator.accept(arrived, context):
            raise SystemExit("nvflare did not accept a contribution")
    served = fobs.dumps(aggregator.aggregate(context))
    num_bytes += len(served) * len(vectors)
    for _ in vectors:
        mean = from_shareable(fobs.loads(served)).data["vector"]
    return mean, process_time() - started, num_bytes


def by_openfl(vectors: list) -> tuple:
    from openfl.interface.aggregation_functions import WeightedAverage
    from openfl.pipelines import NoCompressionPipeline
    from openfl.protocols import base_pb2
    from openfl.protocols.utils import construct_named_tensor
    from openfl.utilities import LocalTensor

    pipeline = NoCompressionPipeline()

    def sent(vector: np.ndarray, name: str) -> bytes:
        content, metadata = pipeline.forward(vector)
        key = ("vector", name, 0, False, ("trained",))
        message: bytes = construct_named_tensor(key, content, metadata, lossless=True).SerializeToString()
        return message

    def arrived(message: bytes) -> np.ndarray:
        tensor = base_pb2.NamedTensor.FromString(message)
        metadata = [
            {
                "int_to_float": dict(each.int_to_float),
                "int_list": list(each.int_list),
                "bool_list": list(each.bool_list),
            }
            for each in tensor.transformer_metadata
        ]
        vector: np.ndarray = pipeline.backward(data=tensor.data_bytes, transformer_metadata=metadata)
        return vector

    num_bytes, local, started = 0, [], process_time()
    for number, vector in enumerate(vectors):
        message = sent(vector, f"o{number}")
        num_bytes += len(message)
        local.append(LocalTensor(col_name=f"o{number}", tensor=arrived(message), weight=1 / len(vectors)))
    served = sent(WeightedAverage().call(local), "aggregator")
    num_bytes += len(served) * len(vectors)
    for _ in vectors:
        mean = arrived(served)
    return mean, process_time() - started, num_bytes


if __name__ == "__main__":
    main()
