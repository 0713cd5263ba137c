"""The application of a run as Ray Serve's own config files name it: `import_path: serve.builder:build`."""

# Ray looks at the annotation of `build` itself, so annotations must not be postponed here.
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rporec.config import override
from rporec.promotion import make_servable
from rporec.run import Run
from serve.deployments import application
from serve.served import Served


class Arguments(BaseModel):
    """`cuda`: whether reasoners take a GPU each; `overrides`: as `rporec serve` takes them, `serve.reasoners=2`."""

    model_config = ConfigDict(extra="forbid")

    run: Path
    cuda: bool = False
    overrides: list[str] = []


def build(arguments: Arguments) -> Any:
    """Always with a bearer token, for it is reached from other machines. ConfigError when there is no such run."""
    run = Run.open(arguments.run)
    make_servable(run)
    served = Served(run, override(run.config(), arguments.overrides))
    return application(served, guarded=True, cuda=arguments.cuda)
