"""Without the native library the package imports, says so once, and the references serve."""

import os
import subprocess
import sys

SETUP = """
import torch, attn_ops
from attn_ops import _library
from tests.conformance.evaluate import DTYPES, assert_agrees
from tests.conformance.spec import all_specs
assert not _library.loaded_libraries, _library.loaded_libraries
"""

NUMERICS = """
names = {"everything", "packed, causal, window", "packed and causal", "merged batch and heads"}
for spec in all_specs():
    for name in names & spec.cases.keys():
        for dtype in DTYPES:
            assert_agrees(spec, spec.cases[name], dtype, torch.device("cpu"))
"""

SCHEMAS = """
for room in _library.ROOMS:
    for line in _library.schemas(room):
        schema = getattr(torch.ops.attn, line.split("(")[0]).default._schema
        assert str(schema) == str(torch._C.parse_schema(f"attn::{line}"))
"""

OPCHECK = """
for spec in all_specs():
    arguments = spec.build(spec.cases["plain"], torch.float32, torch.device("cpu"))
    for x in spec.floating(arguments).values():
        x.requires_grad_()
    torch.library.opcheck(spec.ops[0].default, (), arguments)
"""


def run(*programs: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: x for name, x in os.environ.items() if name != "ATTN_OPS_NO_NATIVE"}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(programs)],
        env={**inherited, **paths, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_references_serve_and_the_schemas_are_the_same() -> None:
    run(SETUP, NUMERICS, SCHEMAS, OPCHECK, ATTN_OPS_NO_NATIVE="1")


def test_a_library_that_was_switched_off_is_not_complained_about() -> None:
    done = run("import attn_ops", ATTN_OPS_NO_NATIVE="1")
    assert "reference formulas" not in done.stderr


MISSING = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: self.name != "libattn_ops.so" and exists(self)
"""


def test_a_missing_library_is_said_once_with_what_to_do() -> None:
    done = run(MISSING, SETUP, "import attn_ops.cosine_sim.api, attn_ops.info")
    assert done.stderr.count("The slower reference formulas serve") == 1
    assert "install a C++ compiler" in done.stderr


BROKEN = """
import sys, pathlib, torch
def refuse(path):
    raise OSError("undefined symbol: something")
torch.ops.load_library = refuse
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: self.name == "libattn_ops.so" or exists(self)
"""


def test_a_library_that_does_not_load_is_said_with_the_reason() -> None:
    done = run(BROKEN, SETUP, OPCHECK)
    assert "libattn_ops.so does not load: undefined symbol: something" in done.stderr
