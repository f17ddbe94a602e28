"""The demo from end to end, for the command line and the benchmark."""

from pathlib import Path

from deploy.consortium import read_consortium
from deploy.demo.digits import SCANNERS, write_consortium
from deploy.simulation.crew import sharing_cores
from deploy.simulation.engine import Engine
from deploy.simulation.simulate import merge_consortium
from server.output_folder import claim_output
from server.report.report import Report


def run_demo(output: Path, seed: int = 0, *, engine: Engine = "in-process", with_references: bool = True) -> Report:
    """Make the consortium in OUT/consortium and merge it. Returns the report.

    Each process computes on one thread: models this small gain nothing from a second one, and so the numbers do not
    depend on the machine's cores.
    """
    claim_output(output)
    with sharing_cores(len(SCANNERS), 0, has_helpers=engine == "in-process", most_threads=1) as crew:
        write_consortium(output / "consortium", seed)
        consortium = read_consortium((output / "consortium").resolve())
        return merge_consortium(consortium, output.resolve(), crew, engine=engine, with_references=with_references)
