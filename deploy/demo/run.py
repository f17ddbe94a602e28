"""The demo from end to end, for the command line and the benchmark."""

from pathlib import Path

from deploy.demo.digits import write_consortium
from deploy.simulation.engine import Engine
from deploy.simulation.simulate import simulate
from server.output_folder import claim_output
from server.report.report import Report


def run_demo(output: Path, seed: int = 0, *, engine: Engine = "in-process", with_references: bool = True) -> Report:
    """Make the consortium in OUT/consortium and merge it. Returns the report."""
    claim_output(output)
    write_consortium(output / "consortium", seed)
    return simulate(output / "consortium", output, engine=engine, with_references=with_references)
